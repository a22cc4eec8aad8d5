"""One-step regression: distillation on pairs."""

import torch
from torch import Tensor

from models.interpolant import Interpolant
from models.sampler import DenoiserLike
from trainer.draws import Draws
from trainer.errors import Error, Squared
from trainer.lpips import Perceptual
from trainer.objectives.base import Objective
from trainer.objectives.matching import answering


class Regression(Objective):
    """From the noise eps, in the one step that a sampler takes from t = 1 to 0, straight to x (2209.03003, 2309.06380).

    On pairs, best after rectification; on independent x and eps all samples become the mean. It teaches one step and no more:
    two or four of them draw worse than one (2410.07303). LPIPS-Huber (2405.20320) is pseudo-Huber with `perceptual`; the paper
    weighs its Huber part by 1 - t, which here, at t = 1, would leave LPIPS alone.

    Args:
        error: squared, by default, or pseudo-Huber.
        perceptual: LPIPS, in the images that x stands for, added to the error; it needs its weights as a file.
    """

    def __init__(self, error: Error | None = None, perceptual: Perceptual | None = None):
        self.error, self.perceptual = error or Squared(), perceptual

    def __call__(
        self, denoiser: DenoiserLike, x: Tensor, eps: Tensor, cond: Tensor | None = None, draws: Draws | None = None
    ) -> Tensor:
        answering(denoiser)
        interpolant: Interpolant = denoiser.interpolant  # type: ignore[attr-defined]
        one = torch.ones(len(x), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        jump = (0 * one,) if getattr(denoiser, "jumps", False) else ()
        landed = interpolant.mix(*denoiser(interpolant.mix(torch.zeros_like(eps), eps, one), one, cond, *jump), 0 * one)
        errors = self.error(landed - x).flatten(1).mean(1)
        if self.perceptual:
            errors = errors + self.perceptual(landed, x)
        self.seen = one, errors.detach()
        return errors.mean()
