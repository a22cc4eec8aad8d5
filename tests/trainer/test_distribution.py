"""Distribution matching on Gaussians, whose KL divergence and its gradient have closed forms."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import softplus

from data.batch import Batch
from models.denoiser import Denoiser
from models.interpolant import Linear, expand
from models.prediction import Velocity
from tests.examples import every_interpolant
from tests.helpers.denoisers import FixedTeacher, FixedTime, tiny_dit
from tests.helpers.refusals import refused
from trainer.module import Generator
from trainer.objectives import DistributionMatching
from trainer.objectives.distribution import TIME_MARGIN
from trainer.objectives.parts.weightings import SNR
from trainer.step_random import StepRandom, draw_normal

TEACHER_MEAN = 0.5
TEACHER_STD = 0.7


def float64(value):
    return torch.tensor(value, dtype=torch.float64)


class GaussianDenoiser(nn.Module):
    """The exact denoiser of N(mean, std^2) with learnable mean and std; counts its evaluations."""

    def __init__(self, interpolant, mean, std):
        super().__init__()
        self.interpolant = interpolant
        self.evaluated = 0
        self.mean = nn.Parameter(float64(mean))
        self.log_std = nn.Parameter(torch.tensor(std).log().double())

    def forward(self, x_t, t, cond=None):
        self.evaluated += len(x_t)
        alpha, sigma = (expand(value.double(), x_t) for value in self.interpolant(t))
        variance = (2 * self.log_std).exp()
        gap = (x_t - alpha * self.mean) / (alpha**2 * variance + sigma**2)
        return self.mean + alpha * variance * gap, sigma * gap


class AffineStudent(nn.Module):
    """A student with x_hat = mean + std eps, whose samples are Gaussian; counts its evaluations."""

    def __init__(self, interpolant, mean, std):
        super().__init__()
        self.interpolant = interpolant
        self.evaluated = 0
        self.mean = nn.Parameter(float64(mean))
        self.std = nn.Parameter(float64(std))

    def coefficients_at_the_ends(self):
        """Return alpha at t = 0 and 1, sigma at t = 0 and 1."""
        alpha, sigma = self.interpolant(torch.tensor([0.0, 1.0], dtype=torch.float64))
        return alpha.tolist() + sigma.tolist()

    def sample_moments(self):
        """Return mean and std of the samples, and their derivative by the mean of x_hat.

        On some interpolants a sample keeps some noise at t = 0.
        """
        alpha_0, alpha_1, sigma_0, sigma_1 = self.coefficients_at_the_ends()
        scale = alpha_0 - sigma_0 * alpha_1 / sigma_1
        return scale * self.mean.item(), scale * self.std.item() + sigma_0, scale

    def forward(self, x_t, t, cond=None):
        self.evaluated += len(x_t)
        _, alpha_1, _, sigma_1 = self.coefficients_at_the_ends()
        x_hat = self.mean + self.std * x_t / sigma_1
        return x_hat, (x_t - alpha_1 * x_hat) / sigma_1


def fixed_time(t):
    """Return the distribution for which the objective, which avoids both ends, takes time t."""
    return FixedTime((t - TIME_MARGIN) / (1 - 2 * TIME_MARGIN))


class LinearCritic(nn.Module):
    """A critic a x_t + b: the logit between two Gaussians of one spread is affine."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(float64(0.7))
        self.offset = nn.Parameter(float64(-0.2))
        self.time_input = lambda t: t

    def forward(self, x_t, time_input, cond=None):
        return self.slope * x_t + self.offset


def gaussian_teacher(interpolant):
    denoiser = GaussianDenoiser(interpolant, TEACHER_MEAN, TEACHER_STD)
    return FixedTeacher(denoiser.requires_grad_(False))


def small_denoiser():
    return Denoiser(tiny_dit(channels=2), Linear(), Velocity())


def zeros(count):
    return torch.zeros(count, 1, 1, 1, dtype=torch.float64)


def make_random(x, step):
    return StepRandom(Batch(x, True, seed=1, step=step, size=len(x)))


def backpropagate(interpolant, student, fake_mean, fake_std, t, n=200_000):
    """Compute the gradients of student and fake at one time; return the objective.

    The weight is that of the KL divergence.
    """
    objective = DistributionMatching(
        gaussian_teacher(interpolant), times=fixed_time(t), weighting=SNR()
    )
    with torch.no_grad():
        objective.fake.mean.copy_(fake_mean)
        objective.fake.log_std.copy_(torch.tensor(fake_std).log())
    torch.manual_seed(0)
    eps = torch.randn(n, 1, 1, 1, dtype=torch.float64)
    eps = (eps - eps.mean()) / eps.std()
    objective(student, eps, eps).total.backward()
    return objective


@every_interpolant
@pytest.mark.parametrize("t", [0.2, 0.5, 0.8])
def test_the_gradient_is_that_of_the_divergence(interpolant, t):
    """The KL divergence of N(a m, v) from N(a m', v'), with v = a^2 s^2 + sigma^2.

    Its derivative is a^2 (m - m') / v' by m, and a^2 s (1 / v' - 1 / v) by s.
    """
    student = AffineStudent(interpolant, -0.3, 1.2)
    mean, std, scale = student.sample_moments()
    backpropagate(interpolant, student, mean, std, t)

    alpha, sigma = (value.item() for value in interpolant(float64(t)))
    student_variance = alpha**2 * std**2 + sigma**2
    teacher_variance = alpha**2 * TEACHER_STD**2 + sigma**2
    by_mean = scale * alpha**2 * (mean - TEACHER_MEAN) / teacher_variance
    by_std = scale * alpha**2 * std * (1 / teacher_variance - 1 / student_variance)

    tolerance = 0.02 * max(abs(by_mean), abs(by_std))
    assert student.mean.grad.item() == pytest.approx(by_mean, rel=0.02, abs=tolerance)
    assert student.std.grad.item() == pytest.approx(by_std, rel=0.02, abs=tolerance)


@every_interpolant
def test_the_gradient_is_zero_at_the_truth(interpolant):
    student = AffineStudent(interpolant, TEACHER_MEAN, TEACHER_STD)
    backpropagate(interpolant, student, TEACHER_MEAN, TEACHER_STD, 0.4, 1000)
    assert student.mean.grad.item() == pytest.approx(0, abs=1e-9)
    assert student.std.grad.item() == pytest.approx(0, abs=1e-9)


def test_the_fake_learns_and_the_teacher_does_not():
    student = AffineStudent(Linear(), TEACHER_MEAN, TEACHER_STD)
    objective = backpropagate(Linear(), student, TEACHER_MEAN, TEACHER_STD, 0.4, 1000)
    assert objective.fake.mean.grad is not None
    assert objective.teacher.denoiser.mean.grad is None


@pytest.mark.parametrize(("step", "student_learns"), [(5, True), (9, False)])
def test_the_student_learns_in_one_of_its_turns_and_the_fake_in_every_step(step, student_learns):
    student = AffineStudent(Linear(), 0.0, 1.0)
    objective = DistributionMatching(gaussian_teacher(Linear()), student_every=5)
    x = zeros(64)
    objective(student, x, torch.ones_like(x), None, make_random(x, step)).total.backward()
    assert objective.student_learns(step) is student_learns
    assert (student.mean.grad is not None) is student_learns
    assert objective.fake.mean.grad is not None


def test_a_cycle_costs_the_papers_evaluations():
    """Five batches for the fake, and one evaluation of the teacher for one of them.

    The fake's prediction serves both losses.
    """
    student = AffineStudent(Linear(), 0.0, 1.0)
    objective = DistributionMatching(gaussian_teacher(Linear()))
    x = zeros(64)
    for step in range(5):
        objective(student, x, torch.ones_like(x), None, make_random(x, step))
    assert student.evaluated == 5 * 64
    assert objective.fake.evaluated == 5 * 64
    assert objective.teacher.denoiser.evaluated == 64


def test_a_student_converges_to_the_teachers_distribution():
    student = AffineStudent(Linear(), -1.0, 1.5)
    objective = DistributionMatching(gaussian_teacher(Linear()), student_every=3)
    student_optimizer = torch.optim.Adam(student.parameters(), 0.06, betas=(0.0, 0.99))
    fake_optimizer = torch.optim.Adam(objective.fake.parameters(), 0.06)
    x = zeros(256)
    for step in range(600):
        random = make_random(x, step)
        objective(student, x, random.noise(x).double(), None, random).total.backward()
        optimizers = [fake_optimizer]
        if objective.student_learns(step):
            optimizers.append(student_optimizer)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 0.06 * (1 - step / 600)
            optimizer.step()
            optimizer.zero_grad()
    assert student.mean.item() == pytest.approx(TEACHER_MEAN, abs=0.05)
    assert abs(student.std.item()) == pytest.approx(TEACHER_STD, abs=0.05)


DATA = torch.full((64, 1, 1, 1), 0.5, dtype=torch.float64)


def adversarial_gradients(share):
    """Compute the gradients of a student and a critic, and return the two networks.

    Teacher and fake are equal, so that only the critic moves the student.
    """
    student = AffineStudent(Linear(), 0.1, 0.9)
    critic = LinearCritic()
    objective = DistributionMatching(
        gaussian_teacher(Linear()), times=fixed_time(0.4), critic=critic, adversarial=share
    )
    random = make_random(DATA, 0)
    objective(student, DATA, random.noise(DATA).double(), None, random).total.backward()
    return student, critic


@pytest.mark.parametrize(
    ("step", "named"), [(0, ["fake", "critic", "push"]), (1, ["fake", "critic"])]
)
def test_the_parts_of_the_loss_are_named_and_add_up(step, named):
    student = AffineStudent(Linear(), 0.1, 0.9)
    objective = DistributionMatching(gaussian_teacher(Linear()), critic=LinearCritic())
    random = make_random(DATA, step)
    loss = objective(student, DATA, random.noise(DATA).double(), None, random)
    assert list(loss.parts) == named
    assert not any(part.requires_grad for part in loss.parts.values())
    torch.testing.assert_close(sum(loss.parts.values()), loss.total.detach())


def test_the_critic_separates_data_from_samples_and_the_student_pleases_it():
    """Both gradients are those of the two losses, written out."""
    student, critic = adversarial_gradients(0.3)

    # the same random numbers and fresh parameters
    random = make_random(DATA, 0)
    eps = random.noise(DATA).double()
    sample_noise = draw_normal(random, "extra", DATA).double()
    data_noise = draw_normal(random, "data", DATA).double()
    mean = student.mean.detach().requires_grad_()
    std = student.std.detach().requires_grad_()
    plain = LinearCritic()

    # the critic's logits of noised data and noised samples, at unit length of the coefficients
    length = (0.6**2 + 0.4**2) ** 0.5
    sample_t = 0.6 * (mean + std * eps) + 0.4 * sample_noise
    data_t = 0.6 * DATA + 0.4 * data_noise
    data_logit = plain(data_t / length, None)
    sample_logit = plain(sample_t / length, None)

    critic_loss = (softplus(-data_logit) + softplus(sample_logit)).mean()
    critic_loss.backward(inputs=list(plain.parameters()), retain_graph=True)
    student_loss = (0.3 * softplus(-sample_logit)).mean()
    student_loss.backward(inputs=[mean, std])

    found = [student.mean, student.std, *critic.parameters()]
    expected = [mean, std, *plain.parameters()]
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual.grad, wanted.grad, rtol=1e-5, atol=1e-7)


def test_the_adversarial_share_does_not_change_the_critics_gradient():
    student, critic = adversarial_gradients(0.0)
    _, other = adversarial_gradients(0.3)
    assert student.mean.grad.abs() < 1e-9
    for plain, weighted in zip(critic.parameters(), other.parameters(), strict=True):
        assert torch.equal(plain.grad, weighted.grad)


def test_the_module_keeps_the_critic_and_trains_it_with_the_fake():
    teacher = FixedTeacher(small_denoiser().requires_grad_(False))
    objective = DistributionMatching(teacher, critic=tiny_dit(channels=2))
    module = Generator(small_denoiser(), objective)
    assert set(module.networks) == {"fake", "critic"}

    _, trained_too = module.parameter_groups()
    assert len(trained_too.parameters) == 2 * len(list(tiny_dit(channels=2).parameters()))

    batch = Batch(torch.randn(4, 2, 4, 4), True, seed=0, step=0, size=4)
    module.training_step(batch, 0)["loss"].backward()
    for parameter in module.networks["critic"].out.parameters():
        assert parameter.grad is not None


@pytest.fixture
def module():
    teacher = FixedTeacher(small_denoiser().requires_grad_(False))
    return Generator(small_denoiser(), DistributionMatching(teacher, fake_rate=3.0))


def test_the_module_keeps_the_fake_and_not_the_teacher(module):
    names = {name.split(".")[0] for name in module.state_dict()}
    assert names == {"denoiser", "networks"}
    assert list(module.networks.fake.state_dict()) == list(module.denoiser.state_dict())


def test_the_module_trains_student_and_fake_at_their_learning_rates(module):
    assert all(parameter.requires_grad for parameter in module.parameters())
    module.make_optimizer = partial(torch.optim.AdamW, lr=0.1)
    student, fake = module.configure_optimizers().param_groups
    assert student["lr"] == 0.1
    assert fake["lr"] == pytest.approx(0.3)
    assert fake["params"][0] is next(module.objective.fake.parameters())
    grouped = [id(parameter) for parameter in student["params"] + fake["params"]]
    assert grouped == [id(parameter) for parameter in module.parameters()]


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [("student_every", 0, (1,)), ("fake_rate", 0.0, ()), ("adversarial", -1.0, ())],
)
def test_impossible_options_are_refused(option, value, named):
    with refused("DistributionMatching", option, value, *named):
        DistributionMatching(gaussian_teacher(Linear()), **{option: value})
