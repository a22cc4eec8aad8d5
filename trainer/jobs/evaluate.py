"""Evaluation: sample quality against the number of network evaluations."""

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from data.files import atomic_path, canonical, digest, file_digest, read_json, write_json
from data.images import Images, read_all
from data.progress import Meter
from models.codec import KL, Codec
from models.condition import ClassLabel
from models.diffusers.text import Prompts
from trainer.jobs import job
from trainer.jobs.options import (
    DEFAULT_SAMPLING,
    AnySampler,
    DeterministicSampler,
    SamplingOptions,
)
from trainer.jobs.run_sampler import RunSampler, tile_images
from trainer.jobs.sampling_model import check_frozen_parts, check_guidance_options
from trainer.metrics.classifier import load_or_train_classifier
from trainer.metrics.extractor import Extractor, FeatureFunction, ResizeFilter
from trainer.metrics.sample_distances import frechet_distance, nearest_distance, recall
from trainer.metrics.trajectories import measure_trajectories

SAMPLE_CHUNK = 250  # samples generated at once
TRAJECTORY_COUNT = 250  # trajectories that are measured
GRID_ROWS = 4
GRID_COLUMNS = 10  # without classes; else a column for each class


class _ChunkResult(NamedTuple):
    start: int  # index of the first sample
    features: Tensor
    hits: Tensor | None  # whether the classifier predicts the requested class


def share_chunks(samples: int, state: PartialState) -> list[range]:
    """Return the indices of the samples that this process generates, in chunks."""
    chunks = []
    for start in range(0, samples, SAMPLE_CHUNK):
        chunks.append(range(start, min(samples, start + SAMPLE_CHUNK)))
    return job.share(state, chunks)


def measure_samples(
    run_sampler: RunSampler,
    features: FeatureFunction,
    real: Tensor,
    steps: int,
    samples: int,
    state: PartialState,
    meter: Meter,
) -> dict[str, Any]:
    """Return the metrics of samples at one number of steps.

    Args:
        run_sampler: generates the samples, in chunks that are divided among the processes.
        features: the feature function.
        real: features of real images, (n, d).
        steps: steps of the sampler.
        samples: number of samples.
        state: this process.
        meter: counts network evaluations.

    Returns:
        Frechet distance (fd), recall, precision, mean distance to the nearest real image, network
        evaluations per sample (nfe), and with classes the accuracy.
    """
    # Generate this process's chunks. Prompts have no classes to compare with.
    reads_prompts = isinstance(run_sampler.condition, Prompts)
    results: list[_ChunkResult] = []
    for chunk in share_chunks(samples, state):
        images, raw = run_sampler.draw_images(chunk, steps)
        fake, logits = features(images)
        correct = None
        if raw is not None and logits is not None and not reads_prompts:
            correct = logits.argmax(1) == raw
        results.append(_ChunkResult(chunk.start, fake, correct))
        meter.add(len(chunk) * steps)

    # Gather those of all processes.
    gathered = sorted(gather_object(results), key=lambda result: result.start)
    fake = torch.cat([result.features for result in gathered])
    hits = [result.hits for result in gathered if result.hits is not None]

    # Compare with the real images.
    metrics: dict[str, Any] = {
        "fd": frechet_distance(real, fake),
        "recall": recall(real, fake),
        "precision": recall(fake, real),
        "nearest": nearest_distance(real, fake),
        "nfe": run_sampler.build_sampler(steps).nfe(run_sampler.denoiser),
    }
    if len(hits) == len(gathered):
        all_hits = torch.cat(hits).float()
        metrics["accuracy"] = all_hits.mean().item()
    return metrics


def measure_samplers(
    run_sampler: RunSampler,
    names: dict[Path, AnySampler],
    teacher_sampler: RunSampler | None,
    features: FeatureFunction,
    real: Tensor,
    steps: list[int],
    samples: int,
    state: PartialState,
) -> dict[Path, dict[str, Any]]:
    """Return the metrics of each sampler, by output folder.

    Args:
        run_sampler: generates the run's samples.
        names: the samplers' names, by output folder.
        teacher_sampler: generates the teacher's samples, or None.
        features: the feature function.
        real: features of real images, (n, d).
        steps: numbers of steps.
        samples: number of samples at each number of steps.
        state: this process.

    Returns:
        `steps`: metrics by number of steps. With a teacher also `teacher`: its metrics at the
        largest number of steps.
    """
    # Count the evaluations of this process, for the progress line.
    most = max(steps)
    evaluations = sum(steps)
    if teacher_sampler:
        evaluations += most
    share = sum(map(len, share_chunks(samples, state)))
    total = share * evaluations * len(names)

    found: dict[Path, dict[str, Any]] = {}
    title = f"evaluate {run_sampler.run.name}"
    with Meter(title, total, "evaluations", shown=state.is_main_process) as meter:
        for folder, name in names.items():
            # The run.
            run_sampler.with_sampler(name)
            by_steps = {}
            for n in steps:
                metrics = measure_samples(run_sampler, features, real, n, samples, state, meter)
                by_steps[str(n)] = metrics
            found[folder] = {"steps": by_steps}
            if not teacher_sampler:
                continue

            # Its teacher, from the same noises, with a sampler that draws no further noise.
            is_deterministic = name in get_args(DeterministicSampler)
            teacher_sampler.with_sampler(name if is_deterministic else "DDIM")
            metrics = measure_samples(teacher_sampler, features, real, most, samples, state, meter)
            found[folder] = {
                "steps": add_drift(by_steps, metrics),
                "teacher": {
                    "run": str(teacher_sampler.run),
                    "denoiser": teacher_sampler.fingerprint,
                    "steps": most,
                    **metrics,
                },
            }
    return found


def add_drift(
    by_steps: dict[str, dict[str, Any]], teacher: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Return a student's metrics with its drift.

    The drift is how much farther its samples are from the nearest real images than its teacher's.

    Args:
        by_steps: the student's metrics, by number of steps.
        teacher: the teacher's metrics.
    """
    found = {}
    for steps, metrics in by_steps.items():
        found[steps] = {**metrics, "drift": metrics["nearest"] - teacher["nearest"]}
    return found


def describe_classifier(images: Path) -> dict[str, Any]:
    """Return what identifies the features of a set's classifier, like `Extractor.describe`."""
    path = images / "classifier.safetensors"
    return {"extractor": path.name, "sha256": file_digest(path), "size": None, "resize": "none"}


def load_features(
    images: Path, sets: list[Images], extractor: Extractor | None, state: PartialState
) -> tuple[FeatureFunction, dict[str, Any]]:
    """Return the feature function and its description.

    The features are the extractor's, or else the classifier's of the image set. The logits are the
    classifier's; a set without classes has none.

    Args:
        images: folder of the image sets, in which the classifier is stored.
        sets: its train and heldout sets.
        extractor: a network that the user provides, or None.
        state: this process.

    Raises:
        ValueError: there is neither an extractor nor a set with classes.
    """
    if extractor and not sets[0].manifest["classes"]:
        return extractor.with_classifier(None), {"features": extractor.describe()}
    with state.main_process_first(), torch.inference_mode(False):
        classifier, accuracy = load_or_train_classifier(images, *sets)
    if extractor is None:
        description = describe_classifier(images)
        function: FeatureFunction = classifier
    else:
        description = extractor.describe()
        function = extractor.with_classifier(classifier)
    return function, {"features": description, "classifier_accuracy_heldout": accuracy}


def load_or_measure_floors(
    images: Path,
    description: dict[str, Any],
    codec: Codec,
    features: FeatureFunction,
    sets: list[Images],
    samples: int,
    seed: int,
) -> dict[str, float]:
    """Return the floors, which are stored as IMAGES/floors-*.json.

    Later evaluations with the same features, codec, number of samples and seed read them.

    Args:
        images: folder of the image sets.
        description: what identifies the features.
        codec: the run's codec.
        features: the feature function.
        sets: the image sets, the held-out one last.
        samples: number of samples of the evaluation.
        seed: seed of the evaluation.
    """
    listings = [part.manifest["listing"] for part in sets]
    weights = codec.weights() if isinstance(codec, KL) else None
    key = digest(canonical([description, listings, weights, samples, seed]))
    path = images / f"floors-{key[:16]}.json"
    if path.exists():
        return read_json(path)["floors"]
    floors = measure_floors(codec, features, sets, samples, seed)
    if os.access(images, os.W_OK):
        write_json(path, {"format": 1, "floors": floors})
    return floors


def measure_floors(
    codec: Codec, features: FeatureFunction, sets: list[Images], samples: int, seed: int
) -> dict[str, float]:
    """Return the Frechet distances that no sampler can be expected to beat.

    - autoencoder: real images to real images that the codec encoded and decoded.
    - autoencoder_psnr_heldout: peak signal-to-noise ratio of these, on the held-out set, in dB.
    - bootstrap: real images to a bootstrap sample of them.

    Args:
        codec: the run's codec.
        features: the feature function.
        sets: the image sets, the held-out one last.
        samples: size of the bootstrap sample.
        seed: seed of the bootstrap sample.
    """
    # Features of real and of decoded images; squared errors, which are kept for the last set.
    real = []
    decoded = []
    errors: list[Tensor] = []
    for images in sets:
        errors = []
        for x, _ in read_all(images, len(images)):
            again = codec.decode(codec.encode(x)).clamp(-1, 1)
            errors.append((again - x).square().mean((1, 2, 3)))
            real.append(features(x)[0])
            decoded.append(features(again)[0])
    real_features = torch.cat(real)
    decoded_features = torch.cat(decoded)

    # Peak signal-to-noise ratio; the images' range of 2 gives the peak 4.
    squares = torch.cat(errors)
    psnr = float("inf")
    if squares.any():
        ratio = 4 / squares.mean().item()
        psnr = float(10 * np.log10(ratio))

    # Bootstrap sample.
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(real_features), (samples,), generator=generator)
    return {
        "autoencoder": frechet_distance(real_features, decoded_features),
        "autoencoder_psnr_heldout": psnr,
        "bootstrap": frechet_distance(real_features, real_features[chosen]),
    }


def write_sample_grids(
    run_sampler: RunSampler, names: dict[Path, AnySampler], steps: list[int], columns: int
) -> None:
    """Write FOLDER/samples-STEPS.png for each output folder, with its sampler."""
    for folder, name in names.items():
        run_sampler.with_sampler(name)
        for n in steps:
            images, _ = run_sampler.draw_images(range(GRID_ROWS * columns), n)
            with atomic_path(folder / f"samples-{n}.png") as temporary:
                tile_images(images, columns).save(temporary, "png")


def limit_classes(run_samplers: Iterable[RunSampler], classes: int) -> None:
    """Sample only the classes of the image set if a network has more."""
    for run_sampler in run_samplers:
        condition = run_sampler.condition
        has_more = isinstance(condition, ClassLabel) and 0 < classes < condition.classes
        run_sampler.classes = classes if has_more else None


@torch.inference_mode()
def evaluate(
    run: Path,
    images: Path,
    out: Path,
    steps: list[int] = [1, 2, 4, 8, 32],  # noqa: B006  (read only; jsonargparse shows it in --help)
    samples: int = 2000,
    teacher: Path | None = None,
    teacher_guidance: float = 1.0,
    extractor: Path | None = None,
    extractor_size: int | None = None,
    resize: ResizeFilter = "bicubic",
    seed: int = 2,
    sampler: AnySampler | list[AnySampler] = "DDIM",
    sampling: SamplingOptions = DEFAULT_SAMPLING,
) -> None:
    """Measure a run's samples at several numbers of steps.

    Writes OUT/evaluation.json and a grid of samples for each number of steps.

    - Frechet distance to all real images, accuracy of the requested class, precision and recall,
      in the features of a small classifier that is trained on IMAGES/train and stored beside it,
      or in those of an extractor.
    - The mean distance to the nearest real image, and how much larger it is than the teacher's
      (drift).
    - First-orderness, straightness and curvature of the trajectories.
    - Floors: the Frechet distances of the autoencoder alone and of real images.

    Args:
        run: run folder or checkpoint.
        images: folder made by `rectify pack`, with train and heldout sets. Without class labels it
            needs an extractor, and there is no accuracy.
        out: folder for the results.
        steps: numbers of steps of the sampler.
        samples: number of samples at each number of steps.
        teacher: the run or checkpoint that the run was distilled from. It is sampled from the same
            noises, with the largest number of steps and the same options. It must have the run's
            codec and text encoders.
        teacher_guidance: guidance scale of the teacher: the one that the student learnt.
        extractor: measure distances in the features of your network instead: a transformers folder
            (CLIP, DINO, ViT), or a TorchScript file, which contains code that is executed: take it
            only from sources that you trust. The accuracy is still the classifier's.
        extractor_size: height and width that images are resized to for the extractor; by default
            the folder's size, for a file the images' size.
        resize: filter that resizes them, antialiased.
        seed: seed of the noises; use other seeds than for collecting pairs.
        sampler: the sampler, or a list, each of which writes to OUT/SAMPLER. Trajectories are
            always those of DDIM, which also samples the teacher where this sampler draws noise in
            its steps.
        sampling: guidance of the run, times and interpolant. The teacher is sampled with the same
            options, but with `teacher_guidance`.
    """
    # Check the options before anything is sampled.
    if not steps or min(steps) < 1:
        raise ValueError(f"steps is {steps}; give at least one number, each at least 1")
    if samples < 100:
        raise ValueError(f"samples is {samples}; it must be at least 100")
    if not sampler:
        raise ValueError(f"sampler is {sampler}; give at least one")
    began = time.monotonic()
    state = job.start()
    run_sampler = RunSampler(run, sampling, sampling.guidance, seed, state.device)
    run_samplers = [run_sampler]
    teacher_sampler = None
    if teacher:
        teacher_sampler = RunSampler(teacher, sampling, teacher_guidance, seed, state.device)
        check_frozen_parts(
            f"teacher: {teacher}",
            teacher_sampler.codec,
            teacher_sampler.condition,
            run_sampler.model,
            "give the run that this one was distilled from",
        )
        run_samplers.append(teacher_sampler)
    check_guidance_options(sampling, [one.model for one in run_samplers])
    names: dict[Path, AnySampler] = {}
    if isinstance(sampler, str):
        names[out] = sampler
    else:
        for name in sampler:
            names[out / name] = name
    for n in steps:
        run_sampler.build_sampler(n)
    if teacher_sampler:
        teacher_sampler.build_sampler(max(steps))

    # Features of the real images.
    network = None
    if extractor:
        network = Extractor(extractor, extractor_size, resize, state.device)
    sets = [Images(str(images / split)) for split in ("train", "heldout")]
    features, description = load_features(images, sets, network, state)
    parts = []
    for image_set in sets:
        for x, _ in read_all(image_set, len(image_set)):
            parts.append(features(x)[0])
    real = torch.cat(parts)

    # Sample, and measure the samples.
    classes = len(sets[0].manifest["classes"] or [])
    limit_classes(run_samplers, classes)
    eps, _, cond = run_sampler.draw_inputs(range(TRAJECTORY_COUNT))
    results = measure_samplers(
        run_sampler, names, teacher_sampler, features, real, steps, samples, state
    )
    if not state.is_main_process:
        return

    # Write the grids, and measure what all samplers share.
    write_sample_grids(run_sampler, names, steps, classes or GRID_COLUMNS)
    codec = run_sampler.codec.cpu()
    shared = {
        "format": 1,
        "run": str(run),
        "denoiser": run_sampler.fingerprint,
        "reference": sets[0].manifest["listing"],
        **description,
        **measure_trajectories(run_sampler.denoiser, eps, cond),
        "floors": load_or_measure_floors(images, description, codec, features, sets, samples, seed),
        "seconds": round(time.monotonic() - began, 1),
    }

    # Write the results of each sampler.
    settings: dict[str, Any] = {
        "samples": samples,
        "guidance": sampling.guidance,
        "seed": seed,
        "edges": sampling.edges,
    }
    for one in run_samplers:
        settings |= one.model.record_options()
    if teacher:
        settings["teacher_guidance"] = teacher_guidance
    if isinstance(run_sampler.condition, Prompts):
        settings["prompts"] = run_sampler.condition.digest
    for folder, name in names.items():
        evaluation = {**shared, **results[folder], "settings": {**settings, "sampler": name}}
        write_json(folder / "evaluation.json", evaluation)
