"""One-step regression: distillation of pairs into a single step."""

import torch
from torch import Tensor

from models.denoiser import is_two_time
from models.sampler import DenoiserLike
from trainer.objectives.base import Loss, Objective
from trainer.objectives.matching import check_solvable_at_noise
from trainer.objectives.parts.distances import Distance, Squared
from trainer.objectives.parts.lpips import Perceptual
from trainer.step_outputs import PerSample
from trainer.step_random import StepRandom


class Regression(Objective):
    """The distance of x from the student's sample, drawn in one step from the noise eps.

    Liu et al. 2022 (arXiv 2209.03003), Liu et al. 2023 (arXiv 2309.06380).

    It is meant for pairs, best after rectification; with independent x and eps all samples
    become the mean. It teaches one step only: two or four steps are worse than one (Wang et al.
    2024, arXiv 2410.07303). LPIPS-Huber (Lee et al. 2024, arXiv 2405.20320) is the pseudo-Huber
    distance with `perceptual`; the paper multiplies its Huber part by 1 - t, which here, at
    t = 1, would leave LPIPS alone.

    Args:
        distance: of the sample from x; squared by default.
        perceptual: LPIPS of the decoded images, added to the distance; needs a file of weights.
    """

    def __init__(self, distance: Distance | None = None, perceptual: Perceptual | None = None):
        self.distance = distance or Squared()
        self.perceptual = perceptual

    def __call__(
        self,
        denoiser: DenoiserLike,
        x: Tensor,
        eps: Tensor,
        cond: Tensor | None = None,
        random: StepRandom | None = None,
    ) -> Loss:
        check_solvable_at_noise(denoiser)
        interpolant = denoiser.interpolant

        # 1. The step from t = 1, where the state is pure noise, to s = 0.
        dtype = torch.promote_types(x.dtype, torch.float32)
        t = torch.ones(len(x), dtype=dtype, device=x.device)
        s = 0 * t
        start = interpolant.mix(torch.zeros_like(eps), eps, t)
        if is_two_time(denoiser):
            x_hat, eps_hat = denoiser(start, t, cond, s)
        else:
            x_hat, eps_hat = denoiser(start, t, cond)
        sample = interpolant.mix(x_hat, eps_hat, s)

        # 2. Its distance from x.
        errors = self.distance(sample - x).flatten(1).mean(1)
        parts = {}
        if self.perceptual:
            perceptual = self.perceptual(sample, x)
            parts["distance"] = errors.detach().mean()
            parts["perceptual"] = perceptual.detach().mean()
            errors = errors + perceptual
        return Loss(errors.mean(), parts, PerSample(t, errors.detach()))
