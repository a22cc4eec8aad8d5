"""Schedulers of diffusers: interpolant, prediction and time input from a scheduler, and back."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from models.denoiser import Denoiser
from models.diffusers.scheduler_keys import CONFIG, EDM, FLOWS, load_scheduler
from models.interpolant import Discrete, Interpolant, Linear, Trigonometric
from models.prediction import (
    Data,
    EDMPreconditioned,
    NoisePrediction,
    Prediction,
    Velocity,
    VPrediction,
)
from models.sampler import DDIM
from models.time_input import (
    BoundedNoiseLevel,
    NoiseLevel,
    ScaledTime,
    TabulatedTime,
    TimeInput,
    TimestepIndex,
)

if TYPE_CHECKING:
    # slow to import
    from diffusers import (
        DDIMScheduler,
        DPMSolverMultistepScheduler,
        EulerDiscreteScheduler,
    )

PREDICTIONS: dict[str, type[Prediction]] = {
    "epsilon": NoisePrediction,
    "v_prediction": VPrediction,
    "sample": Data,
}
SCHEDULES: dict[str, Callable[[int, float, float, bool], Discrete]] = {
    "linear": Discrete.linear,
    "scaled_linear": Discrete.scaled_linear,
    "squaredcos_cap_v2": lambda n, start, end, zero: Discrete.squaredcos_cap_v2(n, zero),
}
LAST_ALPHA = 1e-7  # alpha^2 of the last step of a chain that ends at an SNR of zero


class Parametrisation(NamedTuple):
    """How a network was trained."""

    interpolant: Interpolant
    prediction: Prediction
    time_input: TimeInput


def read_scheduler(folder: Path, pipeline: str = "") -> Parametrisation:
    """Return the parametrisation of a scheduler's network.

    Args:
        folder: of a scheduler of a chain of noising steps (DDPM, DDIM, DPM-Solver, ...), or of flow
            matching, or of EDM.
        pipeline: class of its pipeline.

    Raises:
        ValueError: it is neither, or its config has a key that is not supported.
    """
    _, name, _, config = load_scheduler(folder, pipeline)
    if name in EDM:
        return _read_edm(folder / CONFIG, config)
    n = config["num_train_timesteps"]
    prediction = config.get("prediction_type", "")
    schedule = config.get("beta_schedule", "")
    if name in FLOWS or prediction == "flow_prediction":
        return Parametrisation(Linear(), Velocity(), ScaledTime(float(n)))
    # a chain
    betas = config.get("trained_betas")
    if prediction not in PREDICTIONS or (betas is None and schedule not in SCHEDULES):
        raise ValueError(
            f"{folder}: {name} with prediction_type {prediction} and beta_schedule {schedule} is "
            f"not supported; prediction_type must be one of {', '.join(PREDICTIONS)} and "
            f"beta_schedule one of {', '.join(SCHEDULES)}"
        )
    zero_snr = bool(config.get("rescale_betas_zero_snr"))
    try:
        if betas is None:
            chain = SCHEDULES[schedule](n, config["beta_start"], config["beta_end"], zero_snr)
        else:
            chain = Discrete(list(betas), zero_snr)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from None
    time_input: TimeInput = TimestepIndex(n)
    if config.get("timestep_type") == "continuous" and prediction == "v_prediction":
        time_input = NoiseLevel(chain)  # diffusers does so for this prediction alone
    return Parametrisation(chain, PREDICTIONS[prediction](), time_input)


def _read_edm(path: Path, config: dict[str, Any]) -> Parametrisation:
    """Return the parametrisation of EDM's network (Karras et al. 2022, arXiv 2206.00364).

    On the trigonometric path, which ends in pure noise, its preconditioning for data of standard
    deviation 1 is v (Lu & Song 2024, arXiv 2410.11081).
    """
    path_of_states = Trigonometric()
    time_input = BoundedNoiseLevel(path_of_states, config["sigma_min"], config["sigma_max"])
    kind = config["prediction_type"]
    sigma_data = config["sigma_data"]
    if kind == "epsilon":
        return Parametrisation(path_of_states, EDMPreconditioned(sigma_data), time_input)
    if kind == "v_prediction" and sigma_data == 1:
        return Parametrisation(path_of_states, VPrediction(), time_input)
    raise ValueError(
        f"{path}: prediction_type is {kind} and sigma_data is {sigma_data}; supported are epsilon, "
        "and v_prediction with sigma_data 1"
    )


def chain_scheduler(denoiser: Denoiser) -> "DPMSolverMultistepScheduler":
    """Return the scheduler that samples a chain of noising steps as our DDIM does.

    Its timesteps are trailing, and it ends at the data itself. DPM-Solver of order 1 is DDIM;
    diffusers' own DDIM steps over T // N indices, which are not those of its timesteps where N does
    not divide T. Its config has DDIM's keys too, for those who change the scheduler.
    """
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler.from_config(_ddim(denoiser).config, solver_order=1)


def euler_scheduler(denoiser: Denoiser) -> "EulerDiscreteScheduler":
    """Return the same for `PixArtAlphaPipeline`: Euler's steps in sigma / alpha, from sigma eps on.

    In one step that pipeline takes the estimate of the data, which DPM-Solver does not return.
    """
    from diffusers import EulerDiscreteScheduler

    return EulerDiscreteScheduler.from_config(_ddim(denoiser).config)


def _ddim(denoiser: Denoiser) -> "DDIMScheduler":
    """Return diffusers' DDIM with the chain of a denoiser, on trailing timesteps."""
    from diffusers import DDIMScheduler

    chain = denoiser.interpolant
    assert isinstance(chain, Discrete)
    names = {prediction: name for name, prediction in PREDICTIONS.items()}
    return DDIMScheduler(
        num_train_timesteps=len(chain.betas),
        trained_betas=_chain_betas(chain),
        prediction_type=names[type(denoiser.prediction)],
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,  # no effect on trailing timesteps; StableDiffusionPipeline requires it
    )


def flow_scheduler() -> "DPMSolverMultistepScheduler":
    """Return the scheduler that samples Linear + Velocity by DDIM, from sigma .999 on."""
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=1
    )


def on_scheduler_grid(scheduler: Any, denoiser: Denoiser, steps: int) -> tuple[DDIM, Denoiser]:
    """Return our sampler on a scheduler's times, and our denoiser with its integer timesteps.

    Raises:
        ValueError: the scheduler makes another number of steps.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    interpolant = denoiser.interpolant
    if isinstance(interpolant, Discrete):
        scheduler.set_timesteps(steps)
        made = len(scheduler.timesteps)
        if made != steps:
            raise ValueError(
                f"steps is {steps}: diffusers' {type(scheduler).__name__} makes {made} steps of "
                "it, by a rounding error; choose another --steps"
            )
        levels = len(interpolant.betas)
        times = [(index + 1) / levels for index in scheduler.timesteps.tolist()]
        return DDIM(steps, [*times, 0.0]), denoiser
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        scheduler.set_timesteps(sigmas=[1 - step / steps for step in range(steps)])
    else:
        scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.tolist()
    time_input = TabulatedTime(sigmas[:-1], scheduler.timesteps.tolist())
    timed = Denoiser(denoiser.net, denoiser.interpolant, denoiser.prediction, time_input)
    return DDIM(steps, sigmas), timed


def _chain_betas(chain: Discrete) -> list[float]:
    """Return the betas of a chain for a scheduler.

    Where diffusers rescales them to a terminal SNR of zero, DPM-Solver takes one of 2^-24 instead,
    which shows in images. One of 1e-7 of the SNR before it does not.
    """
    if not chain.zero_terminal_snr:
        return chain.betas
    n = len(chain.betas)
    alpha, _ = chain(torch.arange(n + 1, dtype=torch.float64) / n)
    steps = 1 - (alpha[1:] / alpha[:-1]).square()
    return steps.clamp(max=1 - LAST_ALPHA).tolist()
