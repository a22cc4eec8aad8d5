"""Evaluation: quality against the number of network evaluations."""

import os
import time
from itertools import product
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor

from data.files import canonical, digest, file_digest, read_json, replacing, write_json
from data.images import Images, read_all
from data.noise import noises, underway
from data.progress import Meter
from models import sampler as samplers
from models import teacher as teachers
from models.codec import KL, Codec, to_uint8
from models.guidance import at
from models.text import Prompts, prompted
from trainer import job
from trainer.collect import asked, told
from trainer.evaluate.classifier import trained
from trainer.evaluate.extractor import Extractor, Filter, Look
from trainer.evaluate.measures import frechet, nearest, recall, trajectories

CHUNK, TRAJECTORIES = 250, 250  # samples drawn at once; whose trajectories are measured
ROWS, COLUMNS = 4, 10  # of the sample grid; a column is a class, where there are classes


class Drawing:
    """A model that draws images of asked classes from noises by index.

    Args:
        run: run folder or checkpoint.
        guidance: scale of guidance.
        seed: of the noises.
        state: the process.
        sampler: what walks from noise to data.
        edges: of windows, all of which it steps on.
        prompts: that are asked for, if not those that it was trained on.
    """

    classes: int | None = None  # that are asked for, if not all

    def __init__(
        self,
        run: Path,
        guidance: float,
        seed: int,
        state: PartialState,
        sampler: job.Sampling = "DDIM",
        edges: list[float] | None = None,
        prompts: Path | None = None,
    ):
        denoiser, codec, self.condition = teachers.load(run)
        self.condition = prompted(self.condition, prompts, run)
        self.denoiser, self.codec = at(denoiser, guidance).to(state.device), codec.to(state.device)
        self.fingerprint, self.shape = teachers.fingerprint(denoiser), denoiser.shape
        self.run, self.seed, self.state, self.edges = run, seed, state, edges
        self.walking(sampler)

    def walking(self, sampler: job.Sampling) -> "Drawing":
        """Take another sampler; return this."""
        self.sampler = getattr(samplers, sampler)
        return self

    def walk(self, steps: int) -> samplers.Sampler:
        """Return the sampler of a number of steps."""
        return self.sampler(steps, samplers.through(steps, self.edges) if self.edges else None)

    def start(self, indices: range) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return (noises, raw conditions, conditions as the network reads them) of indices."""
        eps = noises(self.seed, indices, self.shape).to(self.state.device)
        raw = asked(self.condition, indices, self.classes)
        return eps, raw, told(self.condition, raw, self.state.device)

    def images(self, indices: range, steps: int) -> tuple[Tensor, Tensor | None]:
        """Return images in [-1, 1], on the CPU, and the classes asked."""
        eps, raw, told = self.start(indices)

        def renewed(step: int) -> Tensor:
            return torch.stack([underway(self.seed, i, step, self.shape) for i in indices])

        try:
            x = self.walk(steps)(self.denoiser, eps, told, renewed)
        except ValueError as error:
            raise ValueError(f"{self.run}: {error}") from None
        return self.codec.decode(x).clamp(-1, 1).cpu(), raw


def grid(images: Tensor, columns: int) -> Image.Image:
    """Return images in [-1, 1], (B, C, H, W), side by side."""
    rows = [torch.cat(list(row), dim=-1) for row in to_uint8(images).split(columns)]
    return Image.fromarray(torch.cat(rows, dim=-2).permute(1, 2, 0).squeeze(-1).numpy())


def measure(drawing: Drawing, look: Look, real: Tensor, steps: int, samples: int, meter: Meter) -> dict[str, Any]:
    """Return distance, accuracy and recall of samples at a number of steps, drawn by all ranks in strided chunks."""
    chunks = [range(start, min(samples, start + CHUNK)) for start in range(0, samples, CHUNK)]
    found: list[tuple[int, Tensor, Tensor | None]] = []
    for chunk in job.share(drawing.state, chunks):
        images, raw = drawing.images(chunk, steps)
        features, logits = look(images)
        hit = None if raw is None or logits is None or isinstance(drawing.condition, Prompts) else logits.argmax(1) == raw
        found.append((chunk.start, features, hit))
        meter.add(len(chunk) * steps)
    whole = sorted(gather_object(found), key=lambda part: part[0])
    fake, hits = torch.cat([part[1] for part in whole]), [part[2] for part in whole]
    result = {"fd": frechet(real, fake), "recall": recall(real, fake), "precision": recall(fake, real)}
    result["nearest"] = nearest(real, fake)
    result["nfe"] = drawing.walk(steps).nfe(drawing.denoiser)
    return result if None in hits else {**result, "accuracy": torch.cat(hits).float().mean().item()}


def rows(
    drawing: Drawing,
    walks: dict[Path, job.Sampling],
    teacher: Drawing | None,
    look: Look,
    real: Tensor,
    steps: list[int],
    samples: int,
) -> dict[Path, dict[str, Any]]:
    """Return, by place, what `measure` finds with each sampler: `steps`, a row for each; `teacher`, its row at the largest."""
    state, passes = drawing.state, sum(steps) + (max(steps) if teacher else 0)
    work = -(-samples // state.num_processes) * passes * len(walks)
    found: dict[Path, dict[str, Any]] = {}
    with Meter(f"evaluate {drawing.run.name}", work, "evaluations", shown=state.is_main_process) as meter:
        for place, name in walks.items():
            own = {str(n): measure(drawing.walking(name), look, real, n, samples, meter) for n in steps}
            found[place] = {"steps": own}
            if teacher:
                own_walk = name if name in get_args(job.Deterministic) else "DDIM"
                row = measure(teacher.walking(own_walk), look, real, max(steps), samples, meter)
                whose = {"run": str(teacher.run), "denoiser": teacher.fingerprint, "steps": max(steps)}
                found[place] = {"steps": drift(own, row), "teacher": {**whose, **row}}
    return found


def drift(found: dict[str, dict[str, Any]], own: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return a student's rows with how much farther its samples lie from the nearest real ones than its teacher's do."""
    return {steps: {**row, "drift": row["nearest"] - own["nearest"]} for steps, row in found.items()}


def own_features(images: Path) -> dict[str, Any]:
    """Return what tells of the features of a set's own classifier, as `Extractor.about` does."""
    file = images / "classifier.safetensors"
    return {"extractor": file.name, "sha256": file_digest(file), "size": None, "resize": "none"}


def looking(images: Path, sets: list[Images], eyes: Extractor | None, state: PartialState) -> tuple[Look, dict[str, Any]]:
    """Return what looks at images, and what is told of it: a network of the user's own, the set's classifier, or both.

    Raises:
        ValueError: there is neither: the set has no classes.
    """
    if eyes and not sets[0].manifest["classes"]:
        return eyes.beside(None), {"features": eyes.about()}
    with state.main_process_first(), torch.inference_mode(False):
        classifier, score = trained(images, *sets)
    told = {"features": eyes.about() if eyes else own_features(images), "classifier_accuracy_heldout": score}
    return eyes.beside(classifier) if eyes else classifier, told


def kept_floors(
    images: Path, about: dict[str, Any], codec: Codec, look: Look, sets: list[Images], samples: int, seed: int
) -> dict[str, float]:
    """Return `floors`, kept as IMAGES/floors-*.json for whoever evaluates in the same features, through the same codec, again."""
    origin = [about, [part.manifest["listing"] for part in sets], codec.weights() if isinstance(codec, KL) else None]
    path = images / f"floors-{digest(canonical([*origin, samples, seed]))[:16]}.json"
    if path.exists():
        return read_json(path)["floors"]
    found = floors(codec, look, sets, samples, seed)
    if os.access(images, os.W_OK):
        write_json(path, {"format": 1, "floors": found})
    return found


def floors(codec: Codec, look: Look, sets: list[Images], samples: int, seed: int) -> dict[str, float]:
    """Return what cannot be beaten: real images through the autoencoder alone, and real against bootstrapped real."""
    real, through = [], []
    squares: list[Tensor] = []
    for images in sets:
        squares = []  # of the last set, the held-out one
        for x, _ in read_all(images, len(images)):
            again = codec.decode(codec.encode(x)).clamp(-1, 1)
            squares.append((again - x).square().mean((1, 2, 3)))
            real.append(look(x)[0])
            through.append(look(again)[0])
    features, again = torch.cat(real), torch.cat(through)
    drawn = torch.randint(len(features), (samples,), generator=torch.Generator().manual_seed(seed))
    psnr = 10 * np.log10(4 / torch.cat(squares).mean().item()) if torch.cat(squares).any() else float("inf")
    return {
        "autoencoder": frechet(features, again),
        "autoencoder_psnr_heldout": float(psnr),
        "bootstrap": frechet(features, features[drawn]),
    }


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
    resize: Filter = "bicubic",
    guidance: float = 1.0,
    seed: int = 2,
    sampler: job.Sampling | list[job.Sampling] = "DDIM",
    edges: list[float] | None = None,
    prompts: Path | None = None,
) -> None:
    """Measure a run's samples at several numbers of steps, and write OUT/evaluation.json with sample grids.

    Frechet distance to all real images, accuracy of the asked class, precision and recall, in the features of a small
    classifier trained on IMAGES/train (kept beside them), or of an extractor; the mean distance to the nearest real image, and
    how much more that is than the teacher's (drift); first-orderness, straightness and curvature of the trajectories; the floor.

    Args:
        run: run folder or checkpoint.
        images: folder made by `rectify pack`, with train and heldout sets; without class labels they need an extractor, and
            accuracy is left out.
        out: folder for the results.
        steps: of the sampler.
        samples: drawn at each number of steps.
        teacher: run or checkpoint that the run learnt from, drawn from the same noises at the largest number of steps.
        teacher_guidance: scale at which the teacher draws: the one that is baked into the student.
        extractor: measure distances in the features of a network of your own instead: a transformers folder (CLIP, DINO, ViT), or
            a TorchScript file, which is code that is run, so take it only from whom you trust; accuracy stays the classifier's.
        extractor_size: height and width of what the extractor is shown; by default the folder's own, for a file the images'.
        resize: filter that brings images to this size, antialiased.
        guidance: scale w of u + w (c - u); a student that reads scales is told it.
        seed: of the noises; keep it apart from those of collected pairs.
        sampler: what walks from noise to data, or a list, of which each writes into OUT/SAMPLER; trajectories are measured
            along DDIM's walk, which the teacher takes too where this one draws noise on its way.
        edges: of a phased student's windows, falling from 1 to 0, if they are not equal: all are stepped on.
        prompts: what networks that are told texts are asked for, one a line; by default what they were trained on.
    """
    if not steps or min(steps) < 1 or samples < 100 or not sampler:
        raise ValueError(f"steps {steps} must all be at least 1, samples ({samples}) at least 100, and sampler ({sampler}) given")
    began, state = time.monotonic(), job.start()
    drawing = Drawing(run, guidance, seed, state, edges=edges, prompts=prompts)
    taught = Drawing(teacher, teacher_guidance, seed, state, edges=edges, prompts=prompts) if teacher else None
    eyes = Extractor(extractor, extractor_size, resize, state.device) if extractor else None
    walks = {out: sampler} if isinstance(sampler, str) else {out / name: name for name in sampler}
    for n in steps:
        drawing.walk(n)  # refused before anything is drawn
    sets = [Images(str(images / split)) for split in ("train", "heldout")]
    look, about = looking(images, sets, eyes, state)
    real = torch.cat([look(x)[0] for part in sets for x, _ in read_all(part, len(part))])
    classes = len(sets[0].manifest["classes"] or [])
    for one in (drawing, taught) if taught else (drawing,):
        more = 0 < classes < getattr(one.condition, "classes", 0)  # a network may know more than the set
        one.classes = classes if more else None
    eps, _, told = drawing.start(range(TRAJECTORIES))
    results, columns = rows(drawing, walks, taught, look, real, steps, samples), classes or COLUMNS
    if state.is_main_process:
        for place, n in product(walks, steps):
            with replacing(place / f"samples-{n}.png") as temporary:
                grid(drawing.walking(walks[place]).images(range(ROWS * columns), n)[0], columns).save(temporary, "png")
        origin = {"format": 1, "run": str(run), "denoiser": drawing.fingerprint, "reference": sets[0].manifest["listing"]}
        shared = {
            **about,
            **trajectories(drawing.denoiser, eps, told),
            "floors": kept_floors(images, about, drawing.codec.cpu(), look, sets, samples, seed),
            "seconds": round(time.monotonic() - began, 1),
        }
        told_of: dict[str, Any] = {
            "samples": samples,
            "guidance": guidance,
            "seed": seed,
            **({"teacher_guidance": teacher_guidance} if taught else {}),
        }
        if isinstance(drawing.condition, Prompts):
            told_of["prompts"] = drawing.condition.digest
        for place, name in walks.items():
            settings = {**told_of, "sampler": name, "edges": edges}
            write_json(place / "evaluation.json", {**origin, **results[place], **shared, "settings": settings})
