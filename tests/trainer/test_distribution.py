"""Distribution matching on Gaussians, where the divergence and its gradient are known."""

import pytest
import torch
from torch import nn
from torch.nn.functional import softplus

from data.batch import Batch
from models.denoiser import Denoiser
from models.interpolant import Linear, expand
from models.nets.dit import DiT
from models.prediction import Velocity
from tests.forms import every_interpolant
from trainer.draws import Draws, normal
from trainer.module import Generator
from trainer.objectives import DistributionMatching
from trainer.objectives.distribution import EDGE
from trainer.weights import SNR


class Gaussian(nn.Module):
    """The exact denoiser of N(mean, std^2), both to be learnt; it counts what it is asked."""

    def __init__(self, interpolant, mean, std):
        super().__init__()
        self.interpolant, self.asked = interpolant, 0
        self.mean, self.log_std = (nn.Parameter(torch.as_tensor(v, dtype=torch.float64)) for v in (mean, torch.tensor(std).log()))

    def forward(self, x_t, t, cond=None):
        self.asked += len(x_t)
        alpha, sigma = (expand(v.double(), x_t) for v in self.interpolant(t))
        variance = (2 * self.log_std).exp()
        gap = (x_t - alpha * self.mean) / (alpha**2 * variance + sigma**2)
        return self.mean + alpha * variance * gap, sigma * gap


class Affine(nn.Module):
    """A student whose x is mean + std eps; its samples are N(law()), for some noise is left at t = 0 on some interpolants."""

    def __init__(self, interpolant, mean, std):
        super().__init__()
        self.interpolant, self.asked = interpolant, 0
        self.mean, self.std = (nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (mean, std))

    def ends(self):
        return [v.item() for v in self.interpolant(torch.tensor([0.0, 1.0], dtype=torch.float64)) for v in v]

    def law(self):
        (first, last, clean, noisy), (mean, std) = self.ends(), (self.mean.item(), self.std.item())
        scale = first - clean * last / noisy
        return scale * mean, scale * std + clean, scale

    def forward(self, x_t, t, cond=None):
        self.asked += len(x_t)
        _, last, _, noisy = self.ends()
        x_hat = self.mean + self.std * x_t / noisy
        return x_hat, (x_t - last * x_hat) / noisy


class Teacher:
    """An exact teacher, where `Frozen` would be."""

    def __init__(self, denoiser):
        self.denoiser = denoiser.requires_grad_(False)

    def on(self, student, like):
        return self.denoiser


class At:
    """A law of one time (no `Times`, whose subclasses are all tested as laws)."""

    def __init__(self, t):
        self.t = (t - EDGE) / (1 - 2 * EDGE)

    def on(self, interpolant):
        return lambda u: torch.full_like(u, self.t)


def gradients(interpolant, student, fake, t, n=200_000):
    objective = DistributionMatching(Teacher(Gaussian(interpolant, 0.5, 0.7)), times=At(t), weight=SNR())
    with torch.no_grad():
        objective.fake.mean.copy_(fake[0]), objective.fake.log_std.copy_(torch.tensor(fake[1]).log())
    torch.manual_seed(0)
    eps = torch.randn(n, 1, 1, 1, dtype=torch.float64)
    eps = (eps - eps.mean()) / eps.std()
    objective(student, eps, eps).backward()
    return student.mean.grad.item(), student.std.grad.item(), objective


@every_interpolant
@pytest.mark.parametrize("t", [0.2, 0.5, 0.8])
def test_the_gradient_is_that_of_the_divergence(interpolant, t):
    """KL of N(a m, v) from N(a m', v'), v = a^2 s^2 + sigma^2: a^2 (m - m') / v' in m, a^2 s (1 / v' - 1 / v) in s."""
    student = Affine(interpolant, -0.3, 1.2)
    mean, std, scale = student.law()
    alpha, sigma = (v.item() for v in interpolant(torch.tensor(t, dtype=torch.float64)))
    v, there = alpha**2 * std**2 + sigma**2, alpha**2 * 0.7**2 + sigma**2
    expected = scale * alpha**2 * (mean - 0.5) / there, scale * alpha**2 * std * (1 / there - 1 / v)
    found = gradients(interpolant, student, (mean, std), t)[:2]
    assert found == pytest.approx(expected, rel=0.02, abs=0.02 * max(map(abs, expected)))


@every_interpolant
def test_it_is_zero_at_the_truth(interpolant):
    student = Affine(interpolant, 0.5, 0.7)
    *found, objective = gradients(interpolant, student, (0.5, 0.7), 0.4, 1000)
    assert found == pytest.approx([0.0, 0.0], abs=1e-9)
    assert objective.fake.mean.grad is not None and objective.teacher.denoiser.mean.grad is None


def test_each_network_learns_from_its_own_loss_alone():
    """The student's gradient does not depend on the fake's row of the loss, nor the fake's on whether the student learns."""
    found = {}
    for step in (0, 1):
        student, objective = Affine(Linear(), 0.0, 1.0), DistributionMatching(Teacher(Gaussian(Linear(), 0.5, 0.7)), turns=5)
        x = torch.zeros(64, 1, 1, 1, dtype=torch.float64)
        objective(
            student, x, torch.ones_like(x), None, Draws(Batch(x, True, seed=1, step=5 + 5 * step - step, size=64))
        ).backward()
        found[step] = objective.rests, student.mean.grad, objective.fake.mean.grad
    assert found[0][0] is False and found[1][0] is True
    assert found[0][1] is not None and found[1][1] is None and all(part[2] is not None for part in found.values())


def test_a_cycle_costs_what_the_paper_needs():
    """Five samples that the fake learns, and for one of them the teacher: the fake's answer serves both losses."""
    student, objective = Affine(Linear(), 0.0, 1.0), DistributionMatching(Teacher(Gaussian(Linear(), 0.5, 0.7)))
    x = torch.zeros(64, 1, 1, 1, dtype=torch.float64)
    for step in range(5):
        objective(student, x, torch.ones_like(x), None, Draws(Batch(x, True, seed=1, step=step, size=64)))
    assert [part.asked for part in (student, objective.fake, objective.teacher.denoiser)] == [5 * 64, 5 * 64, 64]


def test_a_student_converges_to_the_teachers_law():
    student = Affine(Linear(), -1.0, 1.5)
    objective = DistributionMatching(Teacher(Gaussian(Linear(), 0.5, 0.7)), turns=3)
    slow = torch.optim.Adam(student.parameters(), 0.06, betas=(0.0, 0.99))
    fast = torch.optim.Adam(objective.fake.parameters(), 0.06)
    x = torch.zeros(256, 1, 1, 1, dtype=torch.float64)
    for step in range(600):
        draws = Draws(Batch(x, True, seed=1, step=step, size=256))
        objective(student, x, draws.noise(x).double(), None, draws).backward()
        for optimizer in (fast,) if objective.rests else (fast, slow):
            optimizer.param_groups[0]["lr"] = 0.06 * (1 - step / 600)
            optimizer.step(), optimizer.zero_grad()
    assert student.mean.item() == pytest.approx(0.5, abs=0.05) and abs(student.std.item()) == pytest.approx(0.7, abs=0.05)


class Critic(nn.Module):
    """Says a x_t + b: the form of the logit of two Gaussians of one spread."""

    def __init__(self):
        super().__init__()
        self.slope, self.offset = (nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (0.7, -0.2))
        self.clock = lambda t: t

    def forward(self, x_t, clock, cond=None):
        return self.slope * x_t + self.offset


def adversarial(share):
    """Return the gradients of (student, critic) where fake and teacher agree, so that they push nothing; and what they saw."""
    student, critic = Affine(Linear(), 0.1, 0.9), Critic()
    objective = DistributionMatching(Teacher(Gaussian(Linear(), 0.5, 0.7)), times=At(0.4), critic=critic, adversarial=share)
    draws = Draws(Batch(data := torch.full((64, 1, 1, 1), 0.5, dtype=torch.float64), True, seed=1, step=0, size=64))
    eps = draws.noise(data).double()
    objective(student, data, eps, None, draws).backward()
    seen = [normal(draws, purpose, data).double() for purpose in ("again", "data")]
    return student, critic, eps, data, seen


def test_the_critic_learns_real_from_drawn_and_the_student_what_pleases_it():
    """Both gradients are those of the two losses, written down; how much the student's counts is nothing to the critic."""
    student, critic, eps, data, (again, other) = adversarial(0.3)
    mean, std, plain = student.mean.detach().requires_grad_(), student.std.detach().requires_grad_(), Critic()
    x_t, data_t, length = 0.6 * (mean + std * eps) + 0.4 * again, 0.6 * data + 0.4 * other, (0.6**2 + 0.4**2) ** 0.5
    real, drawn = plain(data_t / length, None), plain(x_t / length, None)
    (softplus(-real) + softplus(drawn)).mean().backward(inputs=list(plain.parameters()), retain_graph=True)
    (0.3 * softplus(-drawn)).mean().backward(inputs=[mean, std])
    for found, wanted in zip((student.mean, student.std, *critic.parameters()), (mean, std, *plain.parameters())):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-5, atol=1e-7)
    silent, same, *_ = adversarial(0.0)
    assert silent.mean.grad.abs() < 1e-9 and all(
        torch.equal(a.grad, b.grad) for a, b in zip(critic.parameters(), same.parameters())
    )


def test_the_critic_is_kept_and_trained_with_the_fake():
    def net():
        return DiT(size=4, channels=2, patch=2, width=16, depth=1, heads=2)

    teacher = Teacher(Denoiser(net(), Linear(), Velocity()))
    module = Generator(Denoiser(net(), Linear(), Velocity()), DistributionMatching(teacher, critic=net()))
    assert set(module.networks) == {"fake", "critic"} and len(module.groups(0.1)[1]["params"]) == 2 * len(
        list(net().parameters())
    )
    module.training_step(Batch(torch.randn(4, 2, 4, 4), True, seed=0, step=0, size=4), 0).backward()
    assert all(value.grad is not None for value in module.networks["critic"].out.parameters())


def test_the_module_trains_and_keeps_the_fake_and_not_the_teacher():
    def denoiser():
        return Denoiser(DiT(size=4, channels=2, patch=2, width=16, depth=1, heads=2), Linear(), Velocity())

    module = Generator(denoiser(), DistributionMatching(Teacher(denoiser()), rate=3.0))
    names = {name.split(".")[0] for name in module.state_dict()}
    assert names == {"denoiser", "networks"} and all(p.requires_grad for p in module.parameters())
    student, fake = module.groups(0.1)
    assert fake["lr"] == pytest.approx(0.3) and fake["params"][0] is next(module.objective.fake.parameters())
    assert [id(p) for p in student["params"] + fake["params"]] == [id(p) for p in module.parameters()]
    assert list(module.networks.fake.state_dict()) == list(module.denoiser.state_dict())


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"turns": 0}, "turns is 0, it must be at least 1"),
        ({"rate": 0.0}, "rate is 0.0"),
        ({"adversarial": -1.0}, "adversarial is -1.0"),
    ],
)
def test_what_cannot_be_meant_is_refused(option, said):
    with pytest.raises(ValueError, match=said):
        DistributionMatching(Teacher(Gaussian(Linear(), 0.5, 0.7)), **option)
