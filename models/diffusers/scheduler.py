"""Schedulers of diffusers: interpolant, prediction and time input from a scheduler, and back."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from models.denoiser import Denoiser
from models.interpolant import Discrete, Interpolant, Linear
from models.prediction import Data, NoisePrediction, Prediction, Velocity, VPrediction
from models.sampler import DDIM
from models.time_input import ScaledTime, TabulatedTime, TimeInput, TimestepIndex

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler  # slow to import

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


class Parametrisation(NamedTuple):
    """How a network was trained."""

    interpolant: Interpolant
    prediction: Prediction
    time_input: TimeInput


def read_scheduler(folder: Path) -> Parametrisation:
    """Return the parametrisation of a scheduler's network.

    Args:
        folder: of a scheduler of a chain of noising steps (DDPM, DDIM, DPM-Solver, ...), or of flow
            matching.

    Raises:
        ValueError: it is neither.
    """
    name, config = _read_config(folder)
    n = config.get("num_train_timesteps", 0)
    prediction = config.get("prediction_type", "")
    schedule = config.get("beta_schedule", "")
    if name.startswith("FlowMatch") or prediction == "flow_prediction":
        return Parametrisation(Linear(), Velocity(), ScaledTime(float(n)))
    betas = config.get("trained_betas")
    if prediction not in PREDICTIONS or (betas is None and schedule not in SCHEDULES):
        raise ValueError(
            f"{folder}: {name} with prediction_type {prediction} and beta_schedule {schedule} is "
            f"not supported; prediction_type must be one of {', '.join(PREDICTIONS)} and "
            f"beta_schedule one of {', '.join(SCHEDULES)}"
        )
    zero_snr = bool(config.get("rescale_betas_zero_snr"))
    if betas is None:
        chain = SCHEDULES[schedule](n, config["beta_start"], config["beta_end"], zero_snr)
    else:
        chain = Discrete(list(betas), zero_snr)
    return Parametrisation(chain, PREDICTIONS[prediction](), TimestepIndex(n))


def _read_config(folder: Path) -> tuple[str, dict[str, Any]]:
    """Return the class of a scheduler, and its config complete with its defaults."""
    import diffusers

    try:
        name = json.loads((folder / "scheduler_config.json").read_bytes())["_class_name"]
        scheduler = getattr(diffusers, name).from_pretrained(folder)
    except Exception as error:  # diffusers and torch raise different kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{folder}: not a readable scheduler's folder ({reason})") from None
    return name, dict(scheduler.config)


def chain_scheduler(denoiser: Denoiser) -> "DDIMScheduler":
    """Return the scheduler that samples a chain of noising steps as our DDIM does.

    Its timesteps are trailing, and it ends at the data itself.
    """
    from diffusers import DDIMScheduler

    chain = denoiser.interpolant
    assert isinstance(chain, Discrete)
    names = {prediction: name for name, prediction in PREDICTIONS.items()}
    return DDIMScheduler(
        num_train_timesteps=len(chain.betas),
        trained_betas=chain.betas,
        prediction_type=names[type(denoiser.prediction)],
        timestep_spacing="trailing",
        rescale_betas_zero_snr=chain.zero_terminal_snr,
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
    """Return our sampler on a scheduler's sigmas, and our denoiser with its integer timesteps."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        scheduler.set_timesteps(sigmas=[1 - step / steps for step in range(steps)])
    else:
        scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.tolist()
    time_input = TabulatedTime(sigmas[:-1], scheduler.timesteps.tolist())
    timed = Denoiser(denoiser.net, denoiser.interpolant, denoiser.prediction, time_input)
    return DDIM(steps, sigmas), timed
