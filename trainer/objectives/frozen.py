"""Teachers inside objectives: asked, never trained, never in checkpoints; and the way that they carry a state."""

from pathlib import Path

import torch
from torch import Tensor

from models import teacher as teachers
from models.codec import Codec
from models.condition import Condition
from models.denoiser import Denoiser
from models.guidance import Guided
from models.interpolant import Interpolant
from models.sampler import DDIM, DenoiserLike, Walk


class Frozen:
    """A teacher that an objective asks.

    Args:
        run: run folder or checkpoint.
        guidance: scale w of u + w (c - u) at which it is asked.
    """

    def __init__(self, run: Path, guidance: float = 1.0):
        self.run, self.guidance = run, guidance
        parts: tuple[Denoiser, Codec, Condition] = teachers.load(run)
        self.denoiser, _, self.condition = parts

    def on(self, student: DenoiserLike, like: Tensor, interpolant: Interpolant | None = None) -> Guided:
        """Return the guided teacher where `like` is, having looked that it is a teacher of this student.

        Args:
            student: that learns from it.
            like: a tensor where it is needed.
            interpolant: of the states that it is asked about; by default the student's own.

        Raises:
            ValueError: the two are on different interpolants.
        """
        here, there = repr(interpolant or student.interpolant), repr(self.denoiser.interpolant)  # type: ignore[attr-defined]
        if here != there:
            raise ValueError(f"{self.run}: the teacher is on {there}, the student on {here}; give both the same interpolant")
        return Guided(self.denoiser.to(like.device), self.guidance)


@torch.no_grad()
def carry(denoiser: DenoiserLike, x_t: Tensor, t: Tensor, s: Tensor, cond: Tensor | None = None, steps: int = 1) -> Tensor:
    """Return the states at s from those at t by equal DDIM steps of time, sample by sample; t and s of shape (B,)."""
    walk, sampler = Walk(denoiser, cond), DDIM(1)
    for i in range(steps):
        x_t = sampler.step(walk, x_t, t + (s - t) * (i / steps), t + (s - t) * ((i + 1) / steps))
    return x_t
