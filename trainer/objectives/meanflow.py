"""MeanFlow: the mean velocity over [s, t], learnt from its derivative along the trajectory."""

from typing import NamedTuple

import torch
from torch import Tensor

from models.denoiser import TwoTimeDenoiser, is_two_time, null_condition
from models.interpolant import Interpolant, expand
from models.prediction import Velocity
from models.sampler import DenoiserLike
from trainer.objectives.base import Loss, Objective, mean_loss
from trainer.objectives.parts.distances import AdaptiveDistance, Distance
from trainer.objectives.parts.time_distributions import LogitNormal, TimeDistribution
from trainer.step_random import StepRandom, draw_stratified, draw_uniform


def mean_velocity(
    interpolant: Interpolant, ends: tuple[Tensor, Tensor], t: Tensor, s: Tensor
) -> Tensor:
    """Return (x_t - x_s) / (t - s), or dx_t/dt where s = t, (B, ...).

    Like every prediction it is linear in x and eps; its coefficients are the divided differences
    of alpha and sigma. On Linear it is eps - x for every s.

    Args:
        interpolant: gives the states, x_t = alpha x + sigma eps.
        ends: (x, eps), (B, ...) each.
        t: times, (B,).
        s: times, (B,).
    """
    same = t == s
    gap = (t - s).where(~same, torch.ones_like(t))
    values = zip(interpolant(t), interpolant(s), interpolant.derivatives(t), strict=True)
    a, b = [(at_t - at_s).div(gap).where(~same, slope) for at_t, at_s, slope in values]
    x, eps = ends
    return expand(a, x) * x + expand(b, eps) * eps


def find_dropped(denoiser: DenoiserLike, cond: Tensor | None, like: Tensor) -> Tensor:
    """Return which samples have a dropped condition, (B,) like `like`; none if it is not known."""
    empty = null_condition(denoiser, cond)
    if cond is None or empty is None:
        return torch.zeros_like(like, dtype=torch.bool)
    # an empty text that was encoded in another batch differs in the last bits
    same = torch.isclose(cond, empty, rtol=0, atol=1e-3)
    return same.reshape(len(cond), -1).all(1)


class IntervalTimes(NamedTuple):
    """Times of each sample, (B,) each."""

    t: Tensor
    s: Tensor  # at most t
    is_interval: Tensor  # bool, on the CPU: whether the sample learns over [s, t], or at s = t


class MeanFlow(Objective):
    """E |ubar - sg(u - (t - s) d ubar/dt)|^2, without a teacher.

    Geng et al. 2025 (arXiv 2505.13447), eq. 6 and 9 to 11.

    ubar(x_t, t, s) is the mean velocity of the denoiser's step from t to s. d/dt is the
    derivative along dx_t/dt = u = alpha' x + sigma' eps, by one forward-mode pass; sg stops the
    gradient. It needs a network with two_time, and works with every prediction and interpolant.
    The paper's case is Linear with Velocity, where ubar is the network's output. On fresh noise
    it trains from scratch, on pairs along the rectified trajectories (arXiv 2511.23342).

    Args:
        times: distribution of two times, of which t is the later and s the earlier (section
            4.3); LogitNormal(-0.4, 1) by default.
        interval: distribution of t - s; t alone then follows `times`, and s is 0 where the
            interval is longer than t.
        matching_share: share of the samples, in [0, 1), with s = t, where the loss is flow
            matching (table 1a).
        guidance: scale w of the velocity u + w (c - u) that is learnt, so that sampling needs
            one evaluation per step (eq. 13 and 19 with kappa = 0). u is the denoiser's velocity
            without condition: one more evaluation unless w = 1. The condition needs dropout.
            Samples with a dropped condition learn their plain velocity, as in the paper's code.
        distance: of the difference; adaptive by default (eq. 22).
    """

    uses_jvp = True

    def __init__(
        self,
        times: TimeDistribution | None = None,
        interval: TimeDistribution | None = None,
        matching_share: float = 0.75,
        guidance: float = 1.0,
        distance: Distance | None = None,
    ):
        if not 0 <= matching_share < 1:
            raise ValueError(
                f"MeanFlow: matching_share is {matching_share}; it must lie in [0, 1), and 1 is "
                "the objective Matching"
            )
        if not guidance > 0:
            raise ValueError(
                f"MeanFlow: guidance is {guidance}; it must be positive, and 1 turns it off"
            )
        self.times = times or LogitNormal(-0.4, 1.0)
        self.interval = interval
        self.matching_share = matching_share
        self.guidance = guidance
        self.distance = distance or AdaptiveDistance()

    def __call__(
        self,
        denoiser: DenoiserLike,
        x: Tensor,
        eps: Tensor,
        cond: Tensor | None = None,
        random: StepRandom | None = None,
    ) -> Loss:
        if not is_two_time(denoiser):
            raise ValueError(
                "MeanFlow: the network reads one time; build it with "
                "model.denoiser.net.init_args.two_time true"
            )
        interpolant = denoiser.interpolant

        # 1. Two times for each sample. Those with s = t need no derivative, which costs twice as
        #    much as the rest: the batch is split.
        t, s, is_interval = self.sample_times(interpolant, x, random)
        groups = (is_interval.nonzero().flatten(), (~is_interval).nonzero().flatten())

        # 2. The difference of ubar from its target, for both groups.
        gaps = []
        for group, has_interval in zip(groups, (True, False), strict=True):
            if len(group):
                group_s = s[group] if has_interval else None
                group_cond = None if cond is None else cond[group]
                gap = self.gap(denoiser, x[group], eps[group], t[group], group_s, group_cond)
                gaps.append(gap)

        # 3. The mean error, with the samples back in the batch's order.
        order = torch.cat(groups).argsort()
        errors = self.distance(torch.cat(gaps)[order])
        return mean_loss(errors, t)

    def sample_times(
        self, interpolant: Interpolant, x: Tensor, random: StepRandom | None
    ) -> IntervalTimes:
        """Draw the times of a batch x, at least float32.

        The samples that learn over an interval are evenly spread over the positions of the
        global batch, like the stratified times. Their choice needs no device sync.
        """
        # Two independent times, or a time and an interval.
        times = self.times.for_shape(x.shape).for_interpolant(interpolant)
        dtype = torch.promote_types(x.dtype, torch.float32)
        first = times(draw_stratified(random, "time", x)).to(dtype)
        u = draw_uniform(random, "end_time", first).to(dtype)
        if self.interval:
            t = first
            s = (first - self.interval(u)).clamp(min=0)
        else:
            second = times(u)
            t = torch.maximum(first, second)
            s = torch.minimum(first, second)

        # Which samples learn over [s, t].
        start = random.batch.start if random else 0
        positions = torch.arange(len(x) + 1) + start
        counts = (positions * (1 - self.matching_share)).floor()
        is_interval = counts.diff() > 0
        return IntervalTimes(t, s, is_interval)

    def gap(
        self,
        denoiser: TwoTimeDenoiser,
        x: Tensor,
        eps: Tensor,
        t: Tensor,
        s: Tensor | None = None,
        cond: Tensor | None = None,
    ) -> Tensor:
        """Return ubar - sg(u - (t - s) d ubar/dt), (B, C, H, W); s is t by default."""
        interpolant = denoiser.interpolant

        # 1. The state and its velocity, with guidance.
        x_t = interpolant.mix(x, eps, t)
        u = Velocity().target(interpolant, x, eps, t)
        if self.guidance != 1:
            with torch.no_grad():
                x_hat, eps_hat = denoiser(x_t, t, None)
                unconditional = Velocity().target(interpolant, x_hat, eps_hat, t)
                guided = self.guidance * u + (1 - self.guidance) * unconditional
                dropped = find_dropped(denoiser, cond, t)
                u = u.where(expand(dropped, u), guided)

        # 2. At s = t, ubar is the denoiser's velocity, and its target is u.
        if s is None:
            x_hat, eps_hat = denoiser(x_t, t, cond)
            return Velocity().target(interpolant, x_hat, eps_hat, t) - u

        # 3. Elsewhere, ubar and its derivative along (dx_t/dt, dt/dt) = (u, 1).
        def velocity_to_s(x_t: Tensor, t: Tensor) -> Tensor:
            return mean_velocity(interpolant, denoiser(x_t, t, cond, s), t, s)

        tangents = (u, torch.ones_like(t))
        ubar, derivative = torch.func.jvp(velocity_to_s, (x_t, t), tangents)[:2]
        target = u - expand(t - s, u) * derivative
        return ubar - target.detach()
