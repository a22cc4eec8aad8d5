"""Distribution matching distillation: one-step samples are moved towards the teacher's."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from models.denoiser import add_evaluations, prediction_of
from models.interpolant import Interpolant, expand
from models.nets import Net
from models.prediction import Data
from models.sampler import DDIM, DenoiserLike
from trainer.objectives.base import Loss, Objective, sum_loss
from trainer.objectives.parts.distances import Distance, Squared, mean_per_sample
from trainer.objectives.parts.time_distributions import TimeDistribution, Uniform
from trainer.objectives.parts.weightings import Weighting
from trainer.objectives.teachers import FrozenTeacher
from trainer.step_outputs import PerSample
from trainer.step_random import StepRandom, draw_normal, draw_stratified

# t is kept this far off 0 and 1, as in DMD: close to the data both denoisers return x_t itself.
TIME_MARGIN = 0.02


class DistributionMatching(Objective):
    """The gradient of KL(student || teacher) over all noise levels, for one-step samples x.

    DMD2, Yin et al. 2024 (arXiv 2405.14867), after DMD, Yin et al. 2023 (arXiv 2311.18828).

    A fake denoiser, initialised as the teacher, learns to denoise the student's samples. The
    student's samples are moved by -w (x_fake - x_teacher), the difference of the two denoisers'
    estimates from the same noised sample. With w = (alpha / sigma)^2 this is the gradient of
    the KL divergence; it is zero where student and teacher have the same distribution. Of the
    batch, only noise and condition are used. In one step both networks learn, each from its
    part of the loss: `fake`, `critic` and, where the student learns, `push`. The paper's two time
    scales (section 4.2) are `student_every` and `fake_rate`.

    Args:
        teacher: on the student's interpolant, with any prediction and guidance.
        student_every: the student learns in one step out of this many, the fake in all of them
            (section 4.2: 5); at least 1.
        fake_rate: learning rate of the fake relative to that of the student, positive.
        times: distribution of t, rescaled to [.02, .98].
        weighting: w, as for squared errors of data; by default 1 / mean |x - x_teacher| of each
            sample (arXiv 2311.18828, eq. 8).
        distance: of the fake's loss, in its prediction; squared by default.
        critic: network that distinguishes noised latents of the batch from noised samples; its
            logit is the mean of its output (section 4.3). None by default. It learns in every
            step, like the fake, and needs the batch's latents.
        adversarial: weight of -log sigmoid(logit) in the student's loss, at least 0.
    """

    def __init__(
        self,
        teacher: FrozenTeacher,
        student_every: int = 5,
        fake_rate: float = 1.0,
        times: TimeDistribution | None = None,
        weighting: Weighting | None = None,
        distance: Distance | None = None,
        critic: Net | None = None,
        adversarial: float = 1e-2,
    ):
        if not 0 <= adversarial < float("inf"):
            raise ValueError(
                f"DistributionMatching: adversarial is {adversarial}; it must be at least 0"
            )
        if student_every < 1:
            raise ValueError(
                f"DistributionMatching: student_every is {student_every}; it must be at least 1, "
                "which trains both networks in every step"
            )
        if not 0 < fake_rate < float("inf"):
            raise ValueError(f"DistributionMatching: fake_rate is {fake_rate}; it must be positive")
        self.teacher = teacher
        self.student_every = student_every
        self.learning_rate_ratio = fake_rate
        self.times = times or Uniform()
        self.weighting = weighting
        self.distance = distance or Squared()
        self.fake = copy.deepcopy(teacher.denoiser).requires_grad_(True)
        self.critic = critic
        self.adversarial = adversarial

    @property
    def networks(self) -> dict[str, nn.Module]:
        networks: dict[str, nn.Module] = {"fake": self.fake}
        if self.critic:
            networks["critic"] = self.critic
        return networks

    def student_learns(self, step: int) -> bool:
        return step % self.student_every == 0

    def __call__(
        self,
        denoiser: DenoiserLike,
        x: Tensor,
        eps: Tensor,
        cond: Tensor | None = None,
        random: StepRandom | None = None,
    ) -> Loss:
        interpolant = denoiser.interpolant
        teacher = self.teacher.for_student(denoiser, x)
        student_learns = random is None or self.student_learns(random.batch.step)

        # 1. The student's samples, in one step from the noise.
        with torch.set_grad_enabled(torch.is_grad_enabled() and student_learns):
            start_time = torch.ones(len(eps), device=eps.device)
            start = interpolant.mix(torch.zeros_like(eps), eps, start_time)
            samples = DDIM(1).integrate(denoiser, start, cond)[-1]
        fixed_samples = samples.detach()

        # 2. The same samples, noised to a random t.
        noise = draw_normal(random, "extra", samples)
        times = self.times.for_shape(samples.shape).for_interpolant(interpolant)
        u = times(draw_stratified(random, "time", samples))
        t = TIME_MARGIN + (1 - 2 * TIME_MARGIN) * u
        x_t = interpolant.mix(fixed_samples, noise, t)

        # 3. The fake's loss: denoising the samples.
        x_fake, eps_fake = self.fake(x_t, t, cond)
        gap = prediction_of(self.fake).target(
            interpolant, x_fake - fixed_samples, eps_fake - noise, t
        )
        errors = self.distance(gap)
        per_sample = PerSample(t, mean_per_sample(errors))
        parts = {"fake": errors.mean()}

        # 4. The critic's loss: telling the batch from the samples.
        if self.critic:
            data_noise = draw_normal(random, "data", samples)
            data_logit = self.logit(interpolant, x, data_noise, t, cond)
            sample_logit = self.logit(interpolant, fixed_samples, noise, t, cond)
            parts["critic"] = (softplus(-data_logit) + softplus(sample_logit)).mean()
        if not student_learns:
            return sum_loss(parts, per_sample)

        # 5. The gradient of the student's samples: w (x_fake - x_teacher), and the critic's.
        with torch.no_grad():
            x_teacher = teacher(x_t, t, cond)[0]
            weight = self._weight(interpolant, fixed_samples, x_teacher, t)
            gradient = expand(weight, samples) * (x_fake - x_teacher)
        if self.critic and torch.is_grad_enabled():
            adversarial = self._adversarial_gradient(interpolant, fixed_samples, noise, t, cond)
            gradient = gradient + self.adversarial * adversarial

        # 6. The student's loss: its gradient in the samples is that one, per dimension.
        moved_samples = fixed_samples - gradient
        parts["push"] = (samples - moved_samples).square().mean() / 2
        return sum_loss(parts, per_sample)

    def logit(
        self, interpolant: Interpolant, x: Tensor, eps: Tensor, t: Tensor, cond: Tensor | None
    ) -> Tensor:
        """Return the critic's logits of x noised to t, (B,): positive for data of the batch."""
        assert self.critic is not None
        x_t = interpolant.mix(x, eps, t)
        length = torch.hypot(*interpolant(t))
        add_evaluations(len(x))
        output = self.critic(x_t / expand(length, x), self.critic.time_input(t), cond)
        return output.flatten(1).mean(1)

    def _weight(
        self, interpolant: Interpolant, samples: Tensor, x_teacher: Tensor, t: Tensor
    ) -> Tensor:
        """Return w of each sample, (B,)."""
        if self.weighting:
            return self.weighting(interpolant, Data(), t)
        distance = (samples - x_teacher).abs()
        return 1 / distance.flatten(1).mean(1)

    def _adversarial_gradient(
        self,
        interpolant: Interpolant,
        samples: Tensor,
        noise: Tensor,
        t: Tensor,
        cond: Tensor | None,
    ) -> Tensor:
        """Return the gradient of -log sigmoid(logit) in the samples; the critic has none."""
        samples = samples.detach().requires_grad_()
        logit = self.logit(interpolant, samples, noise, t, cond)
        loss = softplus(-logit).sum() * samples[0].numel()
        return torch.autograd.grad(loss, samples)[0]
