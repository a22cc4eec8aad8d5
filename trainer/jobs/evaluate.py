"""Evaluation: sample quality against the number of network evaluations."""

import logging
import os
import shutil
import time
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor

from data.attempts import begin_attempt
from data.files import (
    atomic_file,
    atomic_path,
    canonical,
    digest,
    file_digest,
    read_json,
    remove_leftovers,
    write_json,
)
from data.images import Images, read_all
from data.shards.claims import check_lease, claim_units
from models.codec import Codec, LatentCodec, describe_codec
from models.condition import ClassLabel
from models.diffusers.text import Prompts
from models.tensors import read_safetensors, to_safetensors
from trainer.jobs import job
from trainer.jobs.collect import provenance
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

log = logging.getLogger(__name__)
SAMPLE_CHUNK = 250  # samples generated at once
TRAJECTORY_COUNT = 250  # trajectories that are measured
GRID_ROWS = 4
GRID_COLUMNS = 10  # without classes; else a column for each class
# Entries of an evaluation that do not identify it; `steps` and `teacher` have figures, too.
FIGURES = ("first_orderness", "straightness", "curvature", "floors", "seconds")


class Chunk(NamedTuple):
    """Samples that one process measures at once."""

    folder: Path  # of its sampler's results
    sampler: AnySampler
    of_teacher: bool
    steps: int
    indices: range


def list_chunks(
    names: dict[Path, AnySampler], steps: list[int], samples: int, has_teacher: bool
) -> list[Chunk]:
    """Return the chunks of all samples, those that take longest first.

    Args:
        names: the samplers' names, by output folder.
        steps: numbers of steps.
        samples: number of samples at each number of steps.
        has_teacher: whether a teacher is sampled, too.
    """
    # The teacher is sampled with the most steps, by a sampler that draws no further noise.
    sampled: list[tuple[Path, AnySampler, bool, int]] = []
    for folder, name in names.items():
        if has_teacher:
            is_deterministic = name in get_args(DeterministicSampler)
            sampled.append((folder, name if is_deterministic else "DDIM", True, max(steps)))
        sampled += [(folder, name, False, n) for n in set(steps)]
    sampled.sort(key=lambda item: item[-1], reverse=True)

    # Samples depend on their indices, not on the process.
    chunks = []
    for item in sampled:
        for start in range(0, samples, SAMPLE_CHUNK):
            chunks.append(Chunk(*item, range(start, min(samples, start + SAMPLE_CHUNK))))
    return chunks


def identify(evaluation: dict[str, Any]) -> bytes:
    """Return what identifies an evaluation: its entries but the figures."""
    identity = {key: value for key, value in evaluation.items() if key not in FIGURES}
    identity["steps"] = sorted(evaluation.get("steps", {}))
    if "teacher" in evaluation:
        teacher = evaluation["teacher"]
        identity["teacher"] = [teacher.get(key) for key in ("run", "denoiser", "steps")]
    return canonical(identity)


class EvaluationFiles:
    """The files of an evaluation: its measured chunks until it is finished, and its results.

    The chunks are OUT/.chunks-HEX.tmp/N.safetensors. HEX identifies the evaluation, so that another
    one in OUT uses none of them. What is left of killed evaluations is removed as temporary files
    are (`data.files.remove_leftovers`).

    Args:
        out: folder for the results.
        evaluations: contents of evaluation.json without the figures, by output folder.
        inputs: plain values that identify what is evaluated, beside these.
    """

    def __init__(self, out: Path, evaluations: dict[Path, dict[str, Any]], inputs: list[Any]):
        self.identities = {folder: identify(found) for folder, found in evaluations.items()}
        texts = [identity.decode() for identity in self.identities.values()]
        self.folder = out / f".chunks-{digest(canonical([*texts, *inputs]))[:16]}.tmp"

    def is_written(self) -> bool:
        """Whether the results of this evaluation are written."""
        for folder, identity in self.identities.items():
            path = folder / "evaluation.json"
            if not path.exists() or identify(read_json(path)) != identity:
                return False
        return True

    def path(self, number: int) -> Path:
        """Return the file of a chunk."""
        return self.folder / f"{number:06d}.safetensors"

    def write(self, number: int, tensors: dict[str, Tensor]) -> None:
        """Write what was measured of a chunk."""
        try:
            with atomic_file(self.path(number)) as file:
                file.write(to_safetensors(tensors, {}))
        except FileNotFoundError:
            # Another process may have measured this chunk too, and removed the folder at the end.
            if not self.is_written():
                raise

    def read(self, number: int) -> dict[str, Tensor]:
        """Return what was measured of a chunk."""
        return read_safetensors(self.path(number))[0]

    def remove(self) -> None:
        """Remove the chunks, and what is left of other evaluations."""
        shutil.rmtree(self.folder, ignore_errors=True)  # another process may do it, too
        remove_leftovers(self.folder.parent)


def measure_chunk(
    run_sampler: RunSampler, features: FeatureFunction, chunk: Chunk
) -> dict[str, Tensor]:
    """Return the features of a chunk of samples.

    With classes also `hits`: whether the classifier predicts the requested class.
    """
    # Prompts have no classes to compare with.
    reads_prompts = isinstance(run_sampler.condition, Prompts)
    run_sampler.with_sampler(chunk.sampler)
    images, raw = run_sampler.draw_images(chunk.indices, chunk.steps)
    fake, logits = features(images)
    tensors = {"features": fake}
    if raw is not None and logits is not None and not reads_prompts:
        tensors["hits"] = logits.argmax(1) == raw
    return tensors


def compare_samples(parts: list[dict[str, Tensor]], real: Tensor) -> dict[str, float]:
    """Return the metrics of samples.

    Args:
        parts: what was measured of their chunks, in the order of their indices.
        real: features of real images, (n, d).

    Returns:
        Frechet distance (fd), recall, precision, mean distance to the nearest real image, and with
        classes the accuracy.
    """
    fake = torch.cat([part["features"] for part in parts])
    metrics = {
        "fd": frechet_distance(real, fake),
        "recall": recall(real, fake),
        "precision": recall(fake, real),
        "nearest": nearest_distance(real, fake),
    }
    if "hits" in parts[0]:
        all_hits = torch.cat([part["hits"] for part in parts]).float()
        metrics["accuracy"] = all_hits.mean().item()
    return metrics


def add_metrics(
    evaluations: dict[Path, dict[str, Any]],
    chunks: list[Chunk],
    files: EvaluationFiles,
    run_samplers: list[RunSampler],
    real: Tensor,
) -> None:
    """Add the metrics of all samples to the evaluations, with the drift if there is a teacher.

    Args:
        evaluations: by output folder.
        chunks: chunks of the samples.
        files: what was measured of them.
        run_samplers: generated the samples of the run, and of its teacher if there is one.
        real: features of real images, (n, d).
    """
    numbered = groupby(enumerate(chunks), key=lambda item: item[1][:-1])  # all but the indices
    for (folder, name, of_teacher, steps), group in numbered:
        sampler = run_samplers[of_teacher].with_sampler(name)
        metrics: dict[str, Any] = {
            **compare_samples([files.read(number) for number, _ in group], real),
            "nfe": sampler.build_sampler(steps).nfe(sampler.denoiser),
        }
        if of_teacher:
            evaluations[folder]["teacher"] |= metrics
        else:
            evaluations[folder]["steps"][str(steps)] = metrics
    for evaluation in evaluations.values():
        if "teacher" in evaluation:
            evaluation["steps"] = add_drift(evaluation["steps"], evaluation["teacher"])


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
    weights = codec.weights() if isinstance(codec, LatentCodec) else None
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


def describe_evaluations(
    run_samplers: list[RunSampler],
    names: dict[Path, AnySampler],
    steps: list[int],
    references: dict[str, Any],
    settings: dict[str, Any],
) -> dict[Path, dict[str, Any]]:
    """Return the contents of evaluation.json without the figures, by output folder.

    Args:
        run_samplers: generate the samples of the run, and of its teacher if there is one.
        names: the samplers' names, by output folder.
        steps: numbers of steps.
        references: what identifies the real images and the features.
        settings: options of the evaluation. Those of sampling that are not the default are added.
    """
    run_sampler, *teachers = run_samplers
    for one in run_samplers:
        settings = settings | one.model.record_options()
    if isinstance(run_sampler.condition, Prompts):
        settings["prompts"] = run_sampler.condition.digest
    evaluations: dict[Path, dict[str, Any]] = {}
    for folder, name in names.items():
        evaluations[folder] = {
            "format": 1,
            "run": str(run_sampler.run),
            "denoiser": run_sampler.fingerprint,
            **references,
            "steps": {str(n): {} for n in steps},
            "settings": {**settings, "sampler": name},
        }
        for teacher in teachers:
            evaluations[folder]["teacher"] = {
                "run": str(teacher.run),
                "denoiser": teacher.fingerprint,
                "steps": max(steps),
            }
    return evaluations


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
    lease: float = 0.0,
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
        lease: 0 divides the samples among the processes by rank. Otherwise processes, which may
            differ in speed, join and leave, claim chunks of samples through files in OUT, and a
            claim expires if it is not renewed within this many seconds (60, for example). What is
            finished is not measured again.
    """
    # Check the options before anything is sampled.
    if not steps or min(steps) < 1:
        raise ValueError(f"steps is {steps}; give at least one number, each at least 1")
    if samples < 100:
        raise ValueError(f"samples is {samples}; it must be at least 100")
    if not sampler:
        raise ValueError(f"sampler is {sampler}; give at least one")
    check_lease(lease)
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

    # The feature function.
    begin_attempt(out, state.num_processes, state.process_index)
    network = None
    if extractor:
        network = Extractor(extractor, extractor_size, resize, state.device)
    sets = [Images(str(images / split)) for split in ("train", "heldout")]
    features, description = load_features(images, sets, network, state)

    # What the evaluation is. A process that comes late finds it finished.
    settings = {
        "samples": samples,
        "guidance": sampling.guidance,
        "seed": seed,
        "edges": sampling.edges,
    }
    if teacher:
        settings["teacher_guidance"] = teacher_guidance
    listings = [part.manifest["listing"] for part in sets]
    references = {"reference": listings[0], **description}
    evaluations = describe_evaluations(run_samplers, names, steps, references, settings)
    origins = [provenance(one.model) for one in run_samplers]
    inputs = [*origins, describe_codec(run_sampler.codec), listings, SAMPLE_CHUNK]
    files = EvaluationFiles(out, evaluations, inputs)
    if lease and files.is_written():
        log.info("%s is finished", out)
        files.remove()
        return

    # Features of the real images.
    parts = []
    for image_set in sets:
        for x, _ in read_all(image_set, len(image_set)):
            parts.append(features(x)[0])
    real = torch.cat(parts)

    # Sample, and measure the samples.
    classes = len(sets[0].manifest["classes"] or [])
    limit_classes(run_samplers, classes)
    chunks = list_chunks(names, steps, samples, teacher is not None)
    sizes = [len(chunk.indices) * chunk.steps for chunk in chunks]

    def is_measured(number: int) -> bool:
        return files.path(number).exists() or (lease > 0 and files.is_written())

    for number in job.iterate_units(
        files.folder, sizes, is_measured, state, lease, f"evaluate {run.name}", "evaluations"
    ):
        chunk = chunks[number]
        tensors = measure_chunk(run_samplers[chunk.of_teacher], features, chunk)
        files.write(number, tensors)

    def finish() -> None:
        # Add the metrics of the samples.
        try:
            add_metrics(evaluations, chunks, files, run_samplers, real)
        except FileNotFoundError as error:
            if files.is_written():
                return  # another process has just finished
            raise FileNotFoundError(f"{error}; all nodes must share --out") from None

        # Write the grids, and measure what all samplers share.
        write_sample_grids(run_sampler, names, steps, classes or GRID_COLUMNS)
        codec = run_sampler.codec.cpu()
        eps, _, cond = run_sampler.draw_inputs(range(TRAJECTORY_COUNT))
        shared = {
            **measure_trajectories(run_sampler.denoiser, eps, cond),
            "floors": load_or_measure_floors(
                images, description, codec, features, sets, samples, seed
            ),
            "seconds": round(time.monotonic() - began, 1),
        }
        for folder, evaluation in evaluations.items():
            write_json(folder / "evaluation.json", {**evaluation, **shared})

    # One process writes the results.
    if lease:
        last = claim_units(files.folder, [len(chunks)], lambda _: files.is_written(), lease)
        for _, claimed in last:
            if claimed:
                finish()
    else:
        state.wait_for_everyone()
        if not state.is_main_process:
            return
        finish()
    files.remove()
