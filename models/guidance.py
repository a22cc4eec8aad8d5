"""Classifier-free guidance in one convention: `u + w (c - u)`; w = 1 is none."""

import logging
from abc import ABC, abstractmethod
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.denoiser import (
    Denoiser,
    DenoiserLike,
    NetworkDenoiser,
    is_two_time,
    jump,
    null_condition,
)
from models.description import identity
from models.interpolant import Interpolant, expand
from models.prediction import Prediction

log = logging.getLogger(__name__)

# The largest batch that is evaluated with and without condition in one batch of twice its size.
# Larger ones gain nothing by it, and would need twice the memory.
LARGEST_DOUBLED = 16


class Estimates(NamedTuple):
    """Estimates (x_hat, eps_hat) of a denoiser and of the negative."""

    conditional: tuple[Tensor, Tensor]
    negative: tuple[Tensor, Tensor]


class Guided(nn.Module):
    """A denoiser with classifier-free guidance: from the negative's output u past its own c.

    Ho & Salimans 2022 (arXiv 2207.12598). Batches of at most 16 are evaluated with and without
    condition in one batch of twice the size, if the network has a condition that means none (a
    class for "no class", an empty text); others in two calls. The results differ in the last bits.

    Args:
        denoiser: called as denoiser(x_t, t, cond) and, without a condition, denoiser(x_t, t, None).
        scale: w, a number or one for each sample, (B,). 0 is the negative alone; 1 is the denoiser
            itself at its own cost.
        low: least t at which guidance acts, in [0, 1]; elsewhere it is the denoiser itself at its
            own cost (Kynkaanniemi et al. 2024, arXiv 2404.07724).
        high: largest t at which guidance acts, at least `low`.
        rescale: how far the guided x_hat is rescaled to the standard deviation of the denoiser's
            own, sample by sample, in [0, 1]; 0 not at all (Lin et al. 2023, arXiv 2305.08891, eq.
            15 and 16, there for the network's output).
        negative: a weaker denoiser on the same interpolant, called with cond too (autoguidance,
            Karras et al. 2024, arXiv 2406.02507). By default u is the denoiser without a condition.
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
            raise ValueError(
                f"Guided: low is {low} and high is {high}; they must satisfy 0 <= low <= high <= 1"
            )
        if not 0 <= rescale <= 1:
            raise ValueError(f"Guided: rescale is {rescale}; it must lie in [0, 1]")
        if negative is not None:
            _check_same_interpolant(denoiser, negative)
        self.denoiser = denoiser
        self.scale = scale
        self.low = low
        self.high = high
        self.rescale = rescale
        self.negative = negative

    @property
    def interpolant(self) -> Interpolant:
        """The denoiser's interpolant."""
        return self.denoiser.interpolant

    @property
    def two_time(self) -> bool:
        """Whether the denoiser takes a second time."""
        return is_two_time(self.denoiser)

    def acts(self, t: Tensor) -> Tensor:
        """Return where guidance acts, with t's shape."""
        t = t.float()  # the same result at an end of the interval for every precision of the state
        return (t >= self.low) & (t <= self.high) & (self.scale != 1)

    def evaluations(self, t: Tensor) -> int:
        """Return the network evaluations of one call at t, shape (B,), per sample.

        The negative's evaluation counts as one too.
        """
        always = self._acts_always
        if always is None:
            always = bool(self.acts(t).any())
        return 2 if always else 1

    @property
    def _acts_always(self) -> bool | None:
        """Whether guidance acts at every t (True) or at none (False); None if it depends on t.

        Where scale and interval decide it, no device sync is needed.
        """
        if isinstance(self.scale, Tensor):
            return None
        if self.scale == 1:
            return False
        return True if (self.low, self.high) == (0, 1) else None

    def forward(
        self, x_t: Tensor, t: Tensor, cond: Tensor | None = None, s: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the guided (x_hat, eps_hat).

        Both are linear in the network's output, so that every prediction gives the same result.
        """
        always = self._acts_always
        active = self.acts(t)
        if always is False or (always is None and not active.any()):
            return jump(self.denoiser, x_t, t, cond, s)
        # u + w (c - u)
        (x_cond, eps_cond), (x_negative, eps_negative) = self._estimate_both(x_t, t, cond, s)
        w = expand(self.scale, x_t) if isinstance(self.scale, Tensor) else self.scale
        x_hat = x_negative + w * (x_cond - x_negative)
        eps_hat = eps_negative + w * (eps_cond - eps_negative)
        if self.rescale:
            x_hat, eps_hat = self._rescale(x_hat, eps_hat, x_cond, t)
        if always or active.all():
            return x_hat, eps_hat
        # outside the interval, the denoiser itself
        active = expand(active, x_hat)
        return x_hat.where(active, x_cond), eps_hat.where(active, eps_cond)

    def _estimate_both(
        self, x_t: Tensor, t: Tensor, cond: Tensor | None, s: Tensor | None
    ) -> Estimates:
        """Evaluate the denoiser and the negative, in one batch where that is quicker."""
        # two denoisers, or two calls
        if self.negative is not None:
            found = jump(self.denoiser, x_t, t, cond, s)
            return Estimates(found, jump(self.negative, x_t, t, cond, s))
        empty = None
        if len(x_t) <= LARGEST_DOUBLED and isinstance(self.denoiser, Denoiser):
            empty = null_condition(self.denoiser, cond)
        if cond is None or empty is None:
            found = jump(self.denoiser, x_t, t, cond, s)
            return Estimates(found, jump(self.denoiser, x_t, t, None, s))
        # one call: the first half with the condition, the second without
        times = t.expand(len(x_t)).repeat(2)
        ends = None if s is None else s.expand(len(x_t)).repeat(2)
        both = jump(self.denoiser, torch.cat([x_t, x_t]), times, torch.cat([cond, empty]), ends)
        (x_cond, x_empty), (eps_cond, eps_empty) = (value.chunk(2) for value in both)
        return Estimates((x_cond, eps_cond), (x_empty, eps_empty))

    def _rescale(
        self, x_hat: Tensor, eps_hat: Tensor, x_cond: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return x_hat with a deviation nearer to x_cond's, and the eps_hat that x_t implies."""
        ratio = x_cond.flatten(1).std(1) / x_hat.flatten(1).std(1)
        alpha, sigma = self.interpolant(t.to(x_hat.dtype).expand(len(x_hat)))
        factor = expand(self.rescale * ratio + 1 - self.rescale, x_hat)
        return factor * x_hat, eps_hat + expand(alpha / sigma, x_hat) * (1 - factor) * x_hat


def _check_same_interpolant(denoiser: DenoiserLike, negative: DenoiserLike) -> None:
    """Check that a negative has the denoiser's interpolant."""
    expected = denoiser.interpolant
    found = negative.interpolant
    if found is not expected and identity(found) != identity(expected):
        raise ValueError(
            f"Guided: negative's interpolant is {found!r}, the denoiser's is {expected!r}; "
            "wrap the negative in Retimed"
        )


class DenoiserWrapper(nn.Module, ABC):
    """A denoiser with the interpolant, prediction and inputs of the one that it wraps."""

    denoiser: NetworkDenoiser

    @property
    def interpolant(self) -> Interpolant:
        """The denoiser's interpolant."""
        return self.denoiser.interpolant

    @property
    def prediction(self) -> Prediction:
        """What the denoiser's network predicts."""
        return self.denoiser.prediction

    @property
    def two_time(self) -> bool:
        """Whether the denoiser takes a second time."""
        return self.denoiser.two_time

    def null_condition(self, cond: Tensor) -> Tensor | None:
        """Return conditions of the shape of `cond` that mean none; None if that is not known."""
        return null_condition(self.denoiser, cond)

    @abstractmethod
    def forward(
        self, x_t: Tensor, t: Tensor, cond: Tensor | None = None, s: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (x_hat, eps_hat), shapes (B, C, H, W)."""


class GuidanceConditioned(DenoiserWrapper):
    """A guidance-conditioned denoiser with a fixed scale: one evaluation instead of two.

    Meng et al. 2022 (arXiv 2210.03142).

    Args:
        denoiser: called as denoiser(x_t, t, cond, s, w).
        scale: w, a number or one for each sample, (B,).
    """

    def __init__(self, denoiser: NetworkDenoiser, scale: float | Tensor):
        super().__init__()
        self.denoiser = denoiser
        self.scale = scale

    def forward(
        self, x_t: Tensor, t: Tensor, cond: Tensor | None = None, s: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (x_hat, eps_hat) at the scale, shapes (B, C, H, W)."""
        w = torch.as_tensor(self.scale, device=x_t.device)
        return self.denoiser(x_t, t, cond, s, w)


def with_guidance(
    denoiser: Denoiser,
    scale: float | Tensor,
    interval: tuple[float, float] = (0.0, 1.0),
    rescale: float = 0.0,
    negative: DenoiserLike | None = None,
) -> Guided | GuidanceConditioned:
    """Return a denoiser at a guidance scale, by its own input for the scale if it has one.

    Warns once about a scale that it was not trained for.

    Args:
        denoiser: the denoiser.
        scale: w, a number or one for each sample, (B,).
        interval: least and largest t at which guidance acts; see `Guided`.
        rescale: see `Guided`.
        negative: see `Guided`.

    Raises:
        ValueError: the denoiser takes the scale as an input, which is guidance at every t, not
            rescaled, and without another negative.
    """
    if not isinstance(scale, Tensor):
        _warn_of_untrained(denoiser, scale)
    low, high = interval
    if not denoiser.reads_guidance:
        return Guided(denoiser, scale, low, high, rescale, negative)
    if (low, high) != (0, 1) or rescale or negative:
        raise ValueError(
            "guidance: this network takes the scale as an input (guidance_embedded); it cannot "
            "take an interval, a rescale or a negative"
        )
    return GuidanceConditioned(denoiser, scale)


def _warn_of_untrained(denoiser: Denoiser, scale: float) -> None:
    """Warn if a denoiser was not trained for a guidance scale."""
    trained = denoiser.guidance
    if denoiser.reads_guidance:
        if isinstance(trained, list) and not trained[0] <= scale <= trained[1]:
            _warn_once(
                f"guidance {scale:g}: this network was trained on scales from {trained[0]:g} to "
                f"{trained[1]:g}"
            )
        elif isinstance(trained, float | int) and scale != 1:
            _warn_once(
                f"guidance {scale:g}: this network was trained on pairs with guidance {trained:g}, "
                "its input for the scale being 1 throughout; other inputs are untrained"
            )
    elif scale != 1 and trained not in (None, 1):
        _warn_once(
            f"guidance {scale:g}: this network was trained on pairs with guidance {trained} "
            "already; the new scale acts on top of it"
        )


@cache
def _warn_once(line: str) -> None:
    log.warning(line)
