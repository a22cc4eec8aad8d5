"""Our trajectories equal those of diffusers' schedulers on the same network outputs."""

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
from models.prediction import NoisePrediction, Velocity, VPrediction
from models.sampler import DDIM, Ancestral, DPMSolver2M, EDMHeun, Euler, karras, trailing

# diffusers' name of a schedule -> diffusers' arguments, and our interpolant.
SCHEDULES = {
    "linear": (
        {"beta_start": 1e-4, "beta_end": 0.02},
        Discrete.linear(),
    ),
    "scaled_linear": (
        {"beta_start": 0.00085, "beta_end": 0.012},
        Discrete.scaled_linear(beta_start=0.00085, beta_end=0.012),
    ),
}
# diffusers' name of a prediction type -> our prediction.
PREDICTION_TYPES = {"epsilon": NoisePrediction(), "v_prediction": VPrediction()}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)
every_prediction_type = pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
every_count = pytest.mark.parametrize("steps", [1, 4, 25])
EPS = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def ddpm_index(t):
    """Return DDPM's index of t = (index + 1) / 1000."""
    return 1000 * t - 1


def flow_timestep(t):
    """Return the time input of flow networks in diffusers."""
    return 1000 * t


def rounded_flow_timestep(t):
    """Return the same without its fraction: the multistep scheduler has integer timesteps."""
    return (1000 * t + 1e-3).floor()


class Network(torch.nn.Module):
    """A smooth function of the state and of DDPM's index, which both sides evaluate."""

    def forward(self, x_t, index, cond=None):
        x_t = x_t.double()
        index = torch.as_tensor(index, dtype=torch.float64).reshape(-1, 1, 1, 1) / 1000
        return torch.sin(2 * x_t + index) + index * x_t.roll(1, -1) / 2


NET = Network()


def scheduler_config(schedule, prediction_type):
    """Return the arguments of a diffusers scheduler."""
    return {
        **SCHEDULES[schedule][0],
        "beta_schedule": schedule,
        "prediction_type": prediction_type,
        "timestep_spacing": "trailing",
    }


def our_states(sampler, schedule, prediction_type, eps=EPS, noise=None):
    """Return the states of our sampler, started from eps unscaled, as diffusers starts."""
    interpolant = SCHEDULES[schedule][1]
    denoiser = Denoiser(NET, interpolant, PREDICTION_TYPES[prediction_type], ddpm_index)
    return sampler.integrate(denoiser, eps, noise=noise)


def scheduler_states(scheduler, start=EPS, scale_input=False, **arguments):
    """Return the states of a diffusers scheduler."""
    states = [start]
    for t in scheduler.timesteps:
        x_t = states[-1]
        x_in = scheduler.scale_model_input(x_t, t) if scale_input else x_t
        y = NET(x_in, t)
        states.append(scheduler.step(y, t, x_t, **arguments).prev_sample.double())
    return states


def assert_equal_states(found, expected):
    """Assert that states are equal to 1e-5 of the largest value."""
    assert len(found) == len(expected)
    largest = max(state.abs().max().item() for state in expected)
    for ours, theirs in zip(found, expected):
        assert (ours - theirs).abs().max().item() < 1e-5 * largest


@every_schedule
@every_prediction_type
@every_count
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim(schedule, prediction_type, steps, eta):
    scheduler = DDIMScheduler(**scheduler_config(schedule, prediction_type), clip_sample=False)
    scheduler.set_timesteps(steps)
    expected = scheduler_states(scheduler, eta=eta, generator=torch.Generator().manual_seed(5))
    sampler = DDIM(steps, trailing(steps), eta=eta)
    noise = torch.Generator().manual_seed(5)
    assert_equal_states(our_states(sampler, schedule, prediction_type, noise=noise), expected)


@every_schedule
@every_prediction_type
@every_count
def test_ddpm(schedule, prediction_type, steps):
    scheduler = DDPMScheduler(**scheduler_config(schedule, prediction_type), clip_sample=False)
    scheduler.set_timesteps(steps)
    expected = scheduler_states(scheduler, generator=torch.Generator().manual_seed(5))
    sampler = Ancestral(steps, trailing(steps))
    noise = torch.Generator().manual_seed(5)
    assert_equal_states(our_states(sampler, schedule, prediction_type, noise=noise), expected)


@every_schedule
@every_prediction_type
@every_count
def test_dpm_solver(schedule, prediction_type, steps):
    scheduler = DPMSolverMultistepScheduler(**scheduler_config(schedule, prediction_type))
    scheduler.set_timesteps(steps)
    sampler = DPMSolver2M(steps, trailing(steps))
    found = our_states(sampler, schedule, prediction_type)
    assert_equal_states(found, scheduler_states(scheduler))


@every_schedule
@every_prediction_type
@every_count
def test_edm_heun_on_karras_sigmas(schedule, prediction_type, steps):
    """diffusers steps x / alpha and, like us, rounds no index.

    It interpolates between indices a little less smoothly.
    """
    config = scheduler_config(schedule, prediction_type)
    scheduler = HeunDiscreteScheduler(**config, use_karras_sigmas=True)
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.double()
    # diffusers: two states a step, and one for the last step, which has one evaluation.
    states = scheduler_states(scheduler, EPS * sigmas[0], scale_input=True)
    assert len(states) == 2 * steps
    expected = [*states[0:-1:2], states[-1]]
    # Ours, on the same noise levels.
    interpolant = SCHEDULES[schedule][1]
    times = karras(steps, interpolant, sigmas[-2].item(), sigmas[0].item())
    alpha = interpolant(torch.tensor(times, dtype=torch.float64))[0]
    start = EPS * sigmas[0] * alpha[0]
    found = our_states(EDMHeun(steps, times), schedule, prediction_type, eps=start)
    assert_equal_states([x / a for x, a in zip(found, alpha)], expected)


@every_count
@pytest.mark.parametrize("sampler", [Euler, DDIM])
def test_flow_euler(steps, sampler):
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, steps + 1)[:-1])
    denoiser = Denoiser(NET, Linear(), Velocity(), flow_timestep)
    found = sampler(steps).integrate(denoiser, EPS)
    assert_equal_states(found, scheduler_states(scheduler))


@every_count
def test_flow_dpm_solver(steps):
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    scheduler.set_timesteps(steps)
    times = scheduler.sigmas.double().tolist()
    denoiser = Denoiser(NET, Linear(), Velocity(), rounded_flow_timestep)
    found = DPMSolver2M(steps, times).integrate(denoiser, EPS)
    assert_equal_states(found, scheduler_states(scheduler))
