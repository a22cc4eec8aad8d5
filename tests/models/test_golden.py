"""Our trajectories equal those of diffusers' schedulers, stepped on the same network outputs."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
)

from models.denoiser import Denoiser
from models.interpolant import Discrete, Linear
from models.prediction import Angular, Noise, Velocity
from models.sampler import DDIM, Ancestral, DPMSolver2M, EDMHeun, Euler, karras, trailing

BETAS = {
    "linear": ({"beta_start": 1e-4, "beta_end": 0.02}, Discrete.linear()),
    "scaled_linear": ({"beta_start": 0.00085, "beta_end": 0.012}, Discrete.scaled_linear(beta_start=0.00085, beta_end=0.012)),
}
ROWS = {"epsilon": Noise(), "v_prediction": Angular()}
every_schedule = pytest.mark.parametrize("schedule", BETAS)
every_row = pytest.mark.parametrize("row", ROWS)
every_count = pytest.mark.parametrize("steps", [1, 4, 25])
EPS = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def index(t):
    """Return DDPM's index of t = (i + 1) / 1000."""
    return 1000 * t - 1


def level(t):
    """Return what networks of flows read."""
    return 1000 * t


def rounded(t):
    """Return the same without its fraction, as the multistep scheduler's timesteps are."""
    return (1000 * t + 1e-3).floor()


class Network(torch.nn.Module):
    """A smooth function of the state and of DDPM's index, on which both sides are stepped."""

    def forward(self, x_t, index, cond=None):
        x_t, index = x_t.double(), torch.as_tensor(index, dtype=torch.float64).reshape(-1, 1, 1, 1) / 1000
        return torch.sin(2 * x_t + index) + index * x_t.roll(1, -1) / 2


NET = Network()


def config(schedule, row):
    start = {**BETAS[schedule][0], "beta_schedule": schedule, "prediction_type": row}
    return {**start, "timestep_spacing": "trailing"}


def ours(sampler, schedule, row, eps=EPS, noise=None):
    """Return the states of our walk from eps itself, as diffusers starts."""
    denoiser = Denoiser(NET, BETAS[schedule][1], ROWS[row], index)
    return sampler.walk(denoiser, eps, noise=noise)


def theirs(scheduler, start=EPS, scaled=False, **arguments):
    """Return the states of a scheduler's walk."""
    states = [start]
    for t in scheduler.timesteps:
        y = NET(scheduler.scale_model_input(states[-1], t) if scaled else states[-1], t)
        states.append(scheduler.step(y, t, states[-1], **arguments).prev_sample.double())
    return states


def equal(a, b):
    largest = max(x.abs().max().item() for x in b)
    assert len(a) == len(b)
    assert max((x - y).abs().max().item() for x, y in zip(a, b)) < 1e-5 * largest


@every_schedule
@every_row
@every_count
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim(schedule, row, steps, eta):
    scheduler = DDIMScheduler(**config(schedule, row), clip_sample=False)
    scheduler.set_timesteps(steps)
    z = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    walk = DDIM(steps, trailing(steps), eta=eta)
    equal(ours(walk, schedule, row, noise=z[0]), theirs(scheduler, eta=eta, generator=z[1]))


@every_schedule
@every_row
@every_count
def test_ddpm(schedule, row, steps):
    scheduler = DDPMScheduler(**config(schedule, row), clip_sample=False)
    scheduler.set_timesteps(steps)
    z = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    walk = Ancestral(steps, trailing(steps))
    equal(ours(walk, schedule, row, noise=z[0]), theirs(scheduler, generator=z[1]))


@every_schedule
@every_row
@every_count
def test_dpm_solver(schedule, row, steps):
    scheduler = DPMSolverMultistepScheduler(**config(schedule, row))
    scheduler.set_timesteps(steps)
    equal(ours(DPMSolver2M(steps, trailing(steps)), schedule, row), theirs(scheduler))


@every_schedule
@every_row
@every_count
def test_edm_heun_on_karras_sigmas(schedule, row, steps):
    """Theirs walks x / alpha; it rounds no index, and ours interpolates it a little more smoothly."""
    scheduler = HeunDiscreteScheduler(**config(schedule, row), use_karras_sigmas=True)
    scheduler.set_timesteps(steps)
    interpolant, sigmas = BETAS[schedule][1], scheduler.sigmas.double()
    times = karras(steps, interpolant, sigmas[-2].item(), sigmas[0].item())
    alpha = interpolant(torch.tensor(times, dtype=torch.float64))[0]
    start = EPS * sigmas[0]
    found = theirs(scheduler, start, scaled=True)
    assert len(found) == 2 * steps  # a last step of one evaluation
    walked = ours(EDMHeun(steps, times), schedule, row, eps=start * alpha[0])
    equal([x / a for x, a in zip(walked, alpha)], [*found[0:-1:2], found[-1]])


@every_count
@pytest.mark.parametrize("sampler", [Euler, DDIM])
def test_flow_euler(steps, sampler):
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, steps + 1)[:-1])
    denoiser = Denoiser(NET, Linear(), Velocity(), level)
    equal(sampler(steps).walk(denoiser, EPS), theirs(scheduler))


@every_count
def test_flow_dpm_solver(steps):
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    scheduler.set_timesteps(steps)
    times = scheduler.sigmas.double().tolist()
    denoiser = Denoiser(NET, Linear(), Velocity(), rounded)
    equal(DPMSolver2M(steps, times).walk(denoiser, EPS), theirs(scheduler))
