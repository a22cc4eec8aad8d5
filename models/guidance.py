"""Classifier-free guidance (2207.12598) in one convention: `u + w (c - u)`; w = 1 is none."""

import logging
from abc import ABC, abstractmethod
from functools import cache

import torch
from torch import Tensor, nn

from models.denoiser import Denoiser
from models.interpolant import Interpolant, expand
from models.prediction import Prediction
from models.sampler import DenoiserLike

log = logging.getLogger(__name__)


class Guided(nn.Module):
    """A denoiser pushed from what a negative says (u) towards, and past, what it says of cond itself (c).

    Args:
        denoiser: called as denoiser(x_t, t, cond) and, without a condition, denoiser(x_t, t, None).
        scale: w, a number or one for each sample, (B,); 0 is the negative alone, 1 is the denoiser itself at its own cost.
        low: least t at which guidance acts, in [0, 1]; below it, the denoiser itself at its own cost (2404.07724).
        high: largest t at which it acts, at least `low`.
        rescale: how far the guided x_hat gets back the standard deviation of the denoiser's own, sample by sample, in [0, 1]
            (2305.08891, eq. 15 and 16, there of the network's output); 0 not at all.
        negative: a weaker denoiser on the same interpolant, told cond too (autoguidance, 2406.02507); without it u is the
            denoiser told nothing.
    """

    def __init__(
        self,
        denoiser: DenoiserLike,
        scale: float | Tensor,
        low: float = 0.0,
        high: float = 1.0,
        rescale: float = 0.0,
        negative: DenoiserLike | None = None,
    ):
        super().__init__()
        if not 0 <= low <= high <= 1:
            raise ValueError(f"Guided: the interval of t is [{low}, {high}]; it must lie within [0, 1], low first")
        if not 0 <= rescale <= 1:
            raise ValueError(f"Guided: rescale is {rescale}, it must lie in [0, 1]")
        if negative is not None and repr(negative.interpolant) != repr(denoiser.interpolant):  # type: ignore[attr-defined]
            raise ValueError("Guided: the negative is on another interpolant than the denoiser; re-time it first")
        self.denoiser, self.scale, self.low, self.high = denoiser, scale, low, high
        self.rescale, self.negative = rescale, negative

    @property
    def interpolant(self) -> Interpolant:
        """The guided denoiser's own interpolant."""
        return self.denoiser.interpolant  # type: ignore[attr-defined]

    @property
    def jumps(self) -> bool:
        """Whether the denoiser reads a second time."""
        return getattr(self.denoiser, "jumps", False)

    def acts(self, t: Tensor) -> Tensor:
        """Return where guidance acts, of t's shape."""
        t = t.float()  # the same answer at an end of the interval whatever the state's precision
        return (t >= self.low) & (t <= self.high) & (self.scale != 1)

    def evaluations(self, t: Tensor) -> int:
        """Return the network evaluations of one call at t, shape (B,), per sample: the negative's counts as one too."""
        known = self._everywhere
        return 1 + int(self.acts(t).any()) if known is None else 1 + known

    @property
    def _everywhere(self) -> bool | None:
        """Whether guidance acts at every t or at none, where scale and interval say so: a look at t makes a device wait."""
        if isinstance(self.scale, Tensor) or (self.scale != 1 and (self.low, self.high) != (0, 1)):
            return None
        return self.scale != 1

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None, s: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the guided (x_hat, eps_hat); they are linear in the output, so that any row gives the same."""
        jump = () if s is None else (s,)
        c = self.denoiser(x_t, t, cond, *jump)
        known, acts = self._everywhere, self.acts(t)
        if not (acts.any() if known is None else known):
            return c
        u = self.denoiser(x_t, t, None, *jump) if self.negative is None else self.negative(x_t, t, cond, *jump)
        w = expand(self.scale, x_t) if isinstance(self.scale, Tensor) else self.scale
        x_hat, eps_hat = u[0] + w * (c[0] - u[0]), u[1] + w * (c[1] - u[1])
        if self.rescale:
            x_hat, eps_hat = self._rescaled(x_hat, eps_hat, c[0], t)
        if known or acts.all():
            return x_hat, eps_hat
        inside = expand(acts, x_hat)
        return x_hat.where(inside, c[0]), eps_hat.where(inside, c[1])

    def _rescaled(self, x_hat: Tensor, eps_hat: Tensor, c: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return x_hat with its spread drawn towards that of c, and the eps_hat that still makes up x_t with it."""
        ratio = c.flatten(1).std(1) / x_hat.flatten(1).std(1)
        alpha, sigma = self.interpolant(t.to(x_hat.dtype).expand(len(x_hat)))
        factor = expand(self.rescale * ratio + 1 - self.rescale, x_hat)
        return factor * x_hat, eps_hat + expand(alpha / sigma, x_hat) * (1 - factor) * x_hat


class Form(nn.Module, ABC):
    """A denoiser of another's form: `self.denoiser`'s."""

    denoiser: Denoiser

    @property
    def interpolant(self) -> Interpolant:
        """The denoiser's own interpolant."""
        return self.denoiser.interpolant

    @property
    def prediction(self) -> Prediction:
        """What the denoiser's network predicts."""
        return self.denoiser.prediction

    @property
    def jumps(self) -> bool:
        """Whether the denoiser reads a second time."""
        return self.denoiser.jumps

    @abstractmethod
    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None, s: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (x_hat, eps_hat), shapes (B, C, H, W)."""


class Told(Form):
    """A denoiser that reads a scale of guidance, told one: it is guided at the cost of one evaluation (2210.03142).

    Args:
        denoiser: called as denoiser(x_t, t, cond, s, w).
        scale: w, a number or one for each sample, (B,).
    """

    def __init__(self, denoiser: Denoiser, scale: float | Tensor):
        super().__init__()
        self.denoiser, self.scale = denoiser, scale

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None, s: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (x_hat, eps_hat) at the scale, shapes (B, C, H, W)."""
        return self.denoiser(x_t, t, cond, s, torch.as_tensor(self.scale, device=x_t.device))


def at(denoiser: Denoiser, scale: float | Tensor) -> Guided | Told:
    """Return a denoiser at a scale of guidance, told it if it reads one; warns once of one that it was not trained for."""
    trained = denoiser.guidance
    if not isinstance(scale, Tensor):
        if denoiser.told_scale and isinstance(trained, list) and not trained[0] <= scale <= trained[1]:
            _warn(f"guidance {scale:g}: this network was trained on scales from {trained[0]:g} to {trained[1]:g}")
        if not denoiser.told_scale and scale != 1 and trained not in (None, 1):
            _warn(f"guidance {scale:g}: {trained} is in the pairs that this network was trained on already; it acts on top")
    return Told(denoiser, scale) if denoiser.told_scale else Guided(denoiser, scale)


@cache
def _warn(line: str) -> None:
    log.warning(line)
