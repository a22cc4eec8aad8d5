"""Teachers inside objectives, asked and never trained: frozen ones, or the student's average; how they carry a state."""

from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from models import teacher as teachers
from models.codec import Codec
from models.condition import Condition, Unconditional
from models.denoiser import Denoiser
from models.guidance import Form, Guided, Told, at
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

    def on(self, student: DenoiserLike, like: Tensor, interpolant: Interpolant | None = None) -> Guided | Told:
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
        return at(self.denoiser.to(like.device), self.guidance)


class Average(Form):
    """A denoiser with the averages of its weights in their place.

    Args:
        denoiser: whose `averages` the EMA callback keeps.
    """

    def __init__(self, denoiser: Denoiser):
        super().__init__()
        if denoiser.averages is None:
            raise ValueError(
                "Averaged: the run keeps no average of its weights; give it the callback EMA, and trainer.num_sanity_val_steps 0"
            )
        self.denoiser, self.averages = denoiser, denoiser.averages
        if any(isinstance(value, DTensor) for value in self.averages.values()):
            raise ValueError("Averaged: the weights are sharded; train with another trainer.strategy than fsdp2")

    def forward(self, *states: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return (x_hat, eps_hat), shapes (B, C, H, W)."""
        return torch.func.functional_call(self.denoiser, self.averages, states)


class Averaged:
    """The student's own average, moving as it learns, where a teacher is asked: that of the callback EMA.

    Args:
        guidance: scale w of u + w (c - u) at which it is asked.
        condition: what it is asked for where no batch says it (Online): the student's own condition.
    """

    run = "the student's average"

    def __init__(self, guidance: float = 1.0, condition: Condition | None = None):
        self.guidance, self.condition = guidance, condition or Unconditional()

    def on(self, student: DenoiserLike, like: Tensor, interpolant: Interpolant | None = None) -> Guided:
        """Return the guided average.

        Raises:
            ValueError: the run keeps none, or in shards.
        """
        if isinstance(student, Told):  # a scale, which the average is told too
            return Guided(Told(Average(student.denoiser), student.scale), self.guidance)  # type: ignore[arg-type]
        return Guided(Average(student), self.guidance)  # type: ignore[arg-type]


@torch.no_grad()
def carry(denoiser: DenoiserLike, x_t: Tensor, t: Tensor, s: Tensor, cond: Tensor | None = None, steps: int = 1) -> Tensor:
    """Return the states at s from those at t by equal DDIM steps of time, sample by sample; t and s of shape (B,)."""
    walk, sampler = Walk(denoiser, cond), DDIM(1)
    for i in range(steps):
        x_t = sampler.step(walk, x_t, t + (s - t) * (i / steps), t + (s - t) * ((i + 1) / steps))
    return x_t
