"""Teachers inside objectives: a frozen model, or the student's average. They are never trained."""

from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from models.checkpoint import load_checkpoint
from models.codec import describe_codec
from models.condition import Condition, Unconditional
from models.denoiser import Denoiser
from models.description import identity
from models.guidance import DenoiserWrapper, GuidanceConditioned, Guided, with_guidance
from models.interpolant import Interpolant
from models.sampler import DDIM, DenoiserLike, Trajectory


class FrozenTeacher:
    """A trained denoiser that an objective evaluates.

    Args:
        run: run folder or checkpoint.
        guidance: scale w of the guidance u + w (c - u); 1 turns it off.
    """

    def __init__(self, run: Path, guidance: float = 1.0):
        self.run = run
        self.guidance = guidance
        model = load_checkpoint(run)
        self.denoiser = model.denoiser
        self.condition = model.condition
        self.codec = describe_codec(model.codec)  # what identifies the codec of its latents

    def for_student(
        self, student: DenoiserLike, like: Tensor, interpolant: Interpolant | None = None
    ) -> Guided | GuidanceConditioned:
        """Return the guided teacher, after checking that it has the student's interpolant.

        Args:
            student: the denoiser that learns from it.
            like: a tensor on the device where the teacher is needed.
            interpolant: of the states that the teacher receives; by default the student's.

        Raises:
            ValueError: the teacher has another interpolant.
        """
        expected = interpolant or student.interpolant
        found = self.denoiser.interpolant
        if identity(found) != identity(expected):
            raise ValueError(
                f"{self.run}: the teacher's interpolant is {found!r}, the student's is "
                f"{expected!r}; give both the same interpolant"
            )
        return with_guidance(self.denoiser.to(like.device), self.guidance)


class EMADenoiser(DenoiserWrapper):
    """A denoiser evaluated with the averages of its weights.

    Args:
        denoiser: a Denoiser; its `averages` are kept by the callback EMA.

    Raises:
        ValueError: there are no averages, or they are sharded.
    """

    denoiser: Denoiser

    def __init__(self, denoiser: DenoiserLike):
        super().__init__()
        assert isinstance(denoiser, Denoiser)
        if denoiser.averages is None:
            raise ValueError(
                "EMATeacher: the run keeps no average of its weights; add the callback EMA to "
                "trainer.callbacks, and set trainer.num_sanity_val_steps to 0"
            )
        if any(isinstance(value, DTensor) for value in denoiser.averages.values()):
            raise ValueError(
                "EMATeacher: the weights are sharded; use another trainer.strategy than fsdp2"
            )
        self.denoiser = denoiser
        self.averages = denoiser.averages
        self.dtypes = {name: value.dtype for name, value in denoiser.state_dict().items()}

    def forward(self, *args: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return (x_hat, eps_hat), shapes (B, C, H, W)."""
        averages = {name: value.to(self.dtypes[name]) for name, value in self.averages.items()}
        return torch.func.functional_call(self.denoiser, averages, args)


class EMATeacher:
    """The student's moving average, which the callback EMA keeps, as a teacher.

    Args:
        guidance: scale w of the guidance u + w (c - u); 1 turns it off.
        condition: gives the conditions of pairs that Online draws: the student's condition.
    """

    run = "the student's average"

    def __init__(self, guidance: float = 1.0, condition: Condition | None = None):
        self.guidance = guidance
        self.condition = condition or Unconditional()

    def for_student(
        self, student: DenoiserLike, like: Tensor, interpolant: Interpolant | None = None
    ) -> Guided:
        """Return the guided average of the student.

        Args:
            student: the denoiser that learns from its average.
            like: unused; the average is where the student is.
            interpolant: unused; it is the student's.

        Raises:
            ValueError: the run keeps no average, or its weights are sharded.
        """
        # A guidance-conditioned student has a scale for each sample: so has its average.
        if isinstance(student, GuidanceConditioned):
            average = EMADenoiser(student.denoiser)
            return Guided(GuidanceConditioned(average, student.scale), self.guidance)
        return Guided(EMADenoiser(student), self.guidance)


@torch.no_grad()
def ddim_between(
    denoiser: DenoiserLike,
    x_t: Tensor,
    t: Tensor,
    s: Tensor,
    cond: Tensor | None = None,
    steps: int = 1,
) -> Tensor:
    """Return the states at s, from those at t by DDIM in equal steps of time, without gradient.

    Args:
        denoiser: called as denoiser(x_t, t, cond).
        x_t: states, (B, C, H, W).
        t: times of the states, (B,).
        s: times to arrive at, (B,).
        cond: encoded condition, if any.
        steps: number of DDIM steps, at least 1.
    """
    trajectory = Trajectory(denoiser, cond)
    sampler = DDIM(1)
    for i in range(steps):
        start = t + (s - t) * (i / steps)
        end = t + (s - t) * ((i + 1) / steps)
        x_t = sampler.step(trajectory, x_t, start, end)
    return x_t
