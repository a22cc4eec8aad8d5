"""Distribution matching: the student's samples are pushed from where a fake denoiser sees them to where the teacher does."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from models.denoiser import Denoiser
from models.interpolant import Interpolant, expand
from models.nets import Net
from models.prediction import Data, Prediction, Velocity
from models.sampler import DDIM, DenoiserLike
from trainer.draws import Draws, normal, uniform
from trainer.errors import Error, Squared
from trainer.objectives.base import Objective
from trainer.objectives.frozen import Frozen
from trainer.times import Times, Uniform
from trainer.weights import Weight

EDGE = 0.02  # t is kept off both ends, as by DMD's authors: near the data neither denoiser has anything to say


class DistributionMatching(Objective):
    """The gradient of KL(student || teacher) over the noise levels, in samples x of one step (DMD2, 2405.14867; 2311.18828).

    A fake denoiser, begun as the teacher, learns the student's samples as they are, and the student moves its samples by
    w (x_fake - x_teacher), what the two see in the same noised sample: w = (alpha / sigma)^2 is the KL's own, which is zero
    where the laws agree. Of the batch only noise and condition are used. In one step both networks learn, each from its own
    loss; two time scales (section 4.2) are the fake's share of steps and its learning rate.

    Args:
        teacher: of the same interpolant, in any row, guided or not.
        turns: the student learns in one step of so many, the fake in all of them (section 4.2: 5), at least 1.
        rate: learning rate of the fake over that of the student, positive.
        times: law of t, within [.02, .98].
        weight: w of a squared error of data; by default each sample's own, 1 / mean |x - x_teacher| (2311.18828, eq. 8).
        error: of the fake; squared, by default, in the row that it predicts.
        critic: tells noised latents of the batch from noised samples, by the mean of what it puts out, its logit (section 4.3);
            none by default. It learns in every step, as the fake does, and the batch's latents are then used.
        adversarial: how much of the student's loss -log sigmoid(logit) is, not negative.
    """

    def __init__(
        self,
        teacher: Frozen,
        turns: int = 5,
        rate: float = 1.0,
        times: Times | None = None,
        weight: Weight | None = None,
        error: Error | None = None,
        critic: Net | None = None,
        adversarial: float = 1e-2,
    ):
        if not 0 <= adversarial < float("inf"):
            raise ValueError(f"DistributionMatching: adversarial is {adversarial}, it must not be negative")
        if turns < 1:
            raise ValueError(f"DistributionMatching: turns is {turns}, it must be at least 1, which trains both in every step")
        if not 0 < rate < float("inf"):
            raise ValueError(f"DistributionMatching: rate is {rate}, it must be positive")
        self.teacher, self.turns, self.rate = teacher, turns, rate
        self.times, self.weight, self.error = times or Uniform(), weight, error or Squared()
        self.fake = copy.deepcopy(teacher.denoiser).requires_grad_(True)
        self.critic, self.adversarial = critic, adversarial

    @property
    def networks(self) -> dict[str, nn.Module]:
        return {"fake": self.fake, **({"critic": self.critic} if self.critic else {})}

    def logit(self, interpolant: Interpolant, x: Tensor, eps: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        """Return the critic's logits, (B,), of data x noised to t: positive for what it takes for the batch's own."""
        assert self.critic is not None
        length = torch.hypot(*interpolant(t))
        Denoiser.spent += len(x)
        return self.critic(interpolant.mix(x, eps, t) / expand(length, x), self.critic.clock(t), cond).flatten(1).mean(1)

    def __call__(
        self, denoiser: DenoiserLike, x: Tensor, eps: Tensor, cond: Tensor | None = None, draws: Draws | None = None
    ) -> Tensor:
        interpolant: Interpolant = denoiser.interpolant  # type: ignore[attr-defined]
        self.rests = draws is not None and draws.batch.step % self.turns != 0
        real, data = self.teacher.on(denoiser, x), x
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.rests):
            start = interpolant.mix(torch.zeros_like(eps), eps, torch.ones(len(eps), device=eps.device))
            x = DDIM(1).walk(denoiser, start, cond)[-1]
        here, noise = x.detach(), normal(draws, "again", x)
        t = EDGE + (1 - 2 * EDGE) * self.times.on(interpolant)(uniform(draws, "time", x))
        x_t = interpolant.mix(here, noise, t)
        x_fake, eps_fake = self.fake(x_t, t, cond)
        row: Prediction = getattr(self.fake, "prediction", None) or Velocity()
        errors = self.error(row.target(interpolant, x_fake - here, eps_fake - noise, t))
        self.seen, loss = (t, errors.detach().flatten(1).mean(1)), errors.mean()
        if self.critic:
            told = self.logit(interpolant, data, normal(draws, "data", x), t, cond)
            loss = loss + (softplus(-told) + softplus(self.logit(interpolant, here, noise, t, cond))).mean()
        if self.rests:
            return loss
        with torch.no_grad():
            x_real = real(x_t, t, cond)[0]
            near = (here - x_real).abs().flatten(1).mean(1)
            weight = self.weight(interpolant, Data(), t) if self.weight else 1 / near
            push = expand(weight, x) * (x_fake - x_real)
        if self.critic and torch.is_grad_enabled():
            seen = here.requires_grad_()  # the critic itself learns nothing from what pleases it
            worse = softplus(-self.logit(interpolant, seen, noise, t, cond)).sum() * here[0].numel()
            push = push + self.adversarial * torch.autograd.grad(worse, seen)[0]
            here = here.detach()
        return loss + (x - (here - push)).square().mean() / 2  # whose gradient in x is the push
