"""MeanFlow: the mean velocity over [s, t], learnt from its own derivative along the path."""

import torch
from torch import Tensor

from models.interpolant import Interpolant, expand
from models.prediction import Velocity
from models.sampler import DenoiserLike
from trainer.draws import Draws, uniform
from trainer.errors import Adaptive, Error
from trainer.objectives.base import Objective
from trainer.times import LogitNormal, Times


def mean_velocity(interpolant: Interpolant, ends: tuple[Tensor, Tensor], t: Tensor, s: Tensor) -> Tensor:
    """Return (x_t - x_s) / (t - s) of the chord with these ends (x, eps), and the velocity where s = t; t and s (B,).

    It is a row, the divided differences of alpha and sigma: on Linear eps - x, whatever s.
    """
    still = t == s
    gap = (t - s).where(~still, torch.ones_like(t))
    row = zip(interpolant(t), interpolant(s), interpolant.rates(t))
    a, b = ((there - here).div(gap).where(~still, rate) for there, here, rate in row)
    return expand(a, ends[0]) * ends[0] + expand(b, ends[1]) * ends[1]


class MeanFlow(Objective):
    """E |ubar - sg(u - (t - s) d ubar/dt)|^2 (2505.13447, eq. 6 and 9 to 11): no teacher, one evaluation and its derivative.

    ubar(x_t, t, s) is the mean velocity of the denoiser's jump from t to s, and d/dt goes along dx_t/dt = u = alpha' x +
    sigma' eps. For a network that reads a second time (`jumps`), in every row and on every interpolant; in the paper Linear
    and Velocity, where ubar is the network's output. On fresh noise it trains from scratch, on pairs along the rectified
    trajectories (2511.23342).

    Args:
        times: law of two times, of which t is the later one and s the earlier (section 4.3; LogitNormal(-0.4, 1) by default).
        interval: law of t - s instead, so that t itself is of the law `times` and s = 0 where the interval is longer than t.
        same: share of the samples, in [0, 1), with s = t, on which it is flow matching (table 1a).
        guidance: w of the field u + w (c - u) that is learnt, to be sampled at one evaluation (eq. 13 and 19, kappa = 0); u is
            the denoiser told nothing, one more evaluation unless w = 1. Wants a condition that is dropped now and then.
        error: adaptive, by default (eq. 22).
    """

    derives = True

    def __init__(
        self,
        times: Times | None = None,
        interval: Times | None = None,
        same: float = 0.75,
        guidance: float = 1.0,
        error: Error | None = None,
    ):
        if not 0 <= same < 1:
            raise ValueError(f"MeanFlow: same is {same}, it must lie in [0, 1); 1 is Matching")
        if not guidance > 0:
            raise ValueError(f"MeanFlow: guidance is {guidance}, it must be positive (1 is none)")
        self.times, self.interval, self.same = times or LogitNormal(-0.4, 1.0), interval, same
        self.guidance, self.error = guidance, error or Adaptive()

    def __call__(
        self, denoiser: DenoiserLike, x: Tensor, eps: Tensor, cond: Tensor | None = None, draws: Draws | None = None
    ) -> Tensor:
        if not getattr(denoiser, "jumps", False):
            raise ValueError("MeanFlow: the network reads no second time; build it with model.denoiser.net.init_args.jumps true")
        t, s, jumps = self.drawn(denoiser.interpolant, x, draws)  # type: ignore[attr-defined]
        order, gaps = [part.nonzero().flatten() for part in (jumps, ~jumps)], []
        for far, i in zip((True, False), order):  # only those that jump need the derivative, twice the cost of the rest
            told = None if cond is None else cond[i]
            gaps.append(self.gap(denoiser, x[i], eps[i], t[i], s[i] if far else None, told)) if len(i) else None
        errors = self.error(torch.cat(gaps)[torch.cat(order).argsort()])
        self.seen = t, errors.detach().flatten(1).mean(1)
        return errors.mean()

    def drawn(self, interpolant: Interpolant, x: Tensor, draws: Draws | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return t, s <= t, at least float32, and (without waiting for a device) which samples jump, (B,) each.

        Those that do are evenly spread over the places of the global batch, like the stratified times.
        """
        law, dtype = self.times.on(interpolant), torch.promote_types(x.dtype, torch.float32)
        first = law(uniform(draws, "time", x)).to(dtype)
        other = (draws.uniform("until") if draws else torch.rand_like(first)).to(dtype)
        if self.interval:
            t, s = first, (first - self.interval(other)).clamp(min=0)
        else:
            t, s = torch.maximum(first, law(other)), torch.minimum(first, law(other))
        places = torch.arange(len(x) + 1) + (draws.batch.start if draws else 0)
        return t, s, (places * (1 - self.same)).floor().diff() > 0

    def gap(
        self, denoiser: DenoiserLike, x: Tensor, eps: Tensor, t: Tensor, s: Tensor | None = None, cond: Tensor | None = None
    ) -> Tensor:
        """Return ubar - sg(u - (t - s) d ubar/dt), (B, C, H, W); without s, at s = t."""
        interpolant: Interpolant = denoiser.interpolant  # type: ignore[attr-defined]
        x_t, u = interpolant.mix(x, eps, t), Velocity().target(interpolant, x, eps, t)
        if self.guidance != 1:
            with torch.no_grad():
                u = self.guidance * u + (1 - self.guidance) * Velocity().target(interpolant, *denoiser(x_t, t, None), t)
        if s is None:
            return Velocity().target(interpolant, *denoiser(x_t, t, cond), t) - u

        def mean(x_t: Tensor, t: Tensor) -> Tensor:
            return mean_velocity(interpolant, denoiser(x_t, t, cond, s), t, s)

        ubar, rate = torch.func.jvp(mean, (x_t, t), (u, torch.ones_like(t)))[:2]
        return ubar - (u - expand(t - s, u) * rate).detach()
