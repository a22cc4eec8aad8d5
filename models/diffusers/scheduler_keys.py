"""Configs of schedulers: every key is applied, replaced by an option of ours, or refused by name.

The keys of a class are those of its constructor, with its defaults. What each group of them means
for us is stated beside the group; a key that is in no group must have the class's default.
"""

import inspect
from pathlib import Path
from typing import Any, NamedTuple

from models.diffusers.parts import read_config

CONFIG = "scheduler_config.json"
CHAINS = (
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
)
FLOWS = (
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
)
EDM = (
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
)
SUPPORTED = (*CHAINS, *FLOWS, *EDM)

# What a network was trained with: applied by `read_scheduler`. A class without one of these keys
# ignores it; as it changes the network's meaning, it must then have the value given here.
NETWORK_KEYS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": None,
    "beta_end": None,
    "beta_schedule": None,
    "trained_betas": None,
    "prediction_type": None,
    "rescale_betas_zero_snr": False,
    "sigma_data": None,
    "timestep_type": "discrete",
    "use_flow_sigmas": False,
}
# How diffusers limits estimates of the data: applied by `read_clipping`.
CLIPPING_KEYS = ("clip_sample", "clip_sample_range")
# Which noise levels diffusers' steps have: applied on the grid `scheduler`; other grids replace
# them.
GRID_KEYS = (
    "base_image_seq_len",
    "base_shift",
    "final_sigmas_type",
    "flow_shift",
    "interpolation_type",
    "lambda_min_clipped",
    "max_image_seq_len",
    "max_shift",
    "original_inference_steps",
    "rho",
    "set_alpha_to_one",
    "shift",
    "shift_terminal",
    "sigma_max",
    "sigma_min",
    "sigma_schedule",
    "steps_offset",
    "time_shift_type",
    "timestep_spacing",
    "use_beta_sigmas",
    "use_dynamic_shifting",
    "use_exponential_sigmas",
    "use_karras_sigmas",
    "use_lu_lambdas",
)
# How diffusers steps from level to level: our sampler replaces it. The last three have no effect
# without `thresholding` and `scale_factors`, which are refused.
SOLVER_KEYS = (
    "algorithm_type",
    "corrector_order",
    "disable_corrector",
    "euler_at_final",
    "lower_order_final",
    "predict_x0",
    "predictor_order",
    "skip_prk_steps",
    "solver_order",
    "solver_p",
    "solver_type",
    "stochastic_sampling",
    "tau_func",
    "variance_type",
    "dynamic_thresholding_ratio",
    "sample_max_value",
    "upscale_mode",
)
# Types of values that the classes themselves do not check.
KEY_TYPES: dict[str, tuple[type, ...]] = {
    "beta_schedule": (str,),
    "clip_sample_range": (int, float),
    "prediction_type": (str,),
    "timestep_spacing": (str,),
    "timestep_type": (str,),
    "trained_betas": (list, tuple),
}
# Keys that diffusers has no more, with the only value that computes the same today.
FORMER_KEYS = {"predict_epsilon": True, "tensor_format": "pt"}
# StableDiffusionPipeline changes these in its scheduler, whatever the file says.
PIPELINE_CHANGES: dict[str, dict[str, Any]] = {
    "StableDiffusionPipeline": {"clip_sample": False, "steps_offset": 1}
}


class LoadedScheduler(NamedTuple):
    """A scheduler of diffusers whose config was checked."""

    folder: Path
    name: str  # of its class
    scheduler: Any
    config: dict[str, Any]  # the keys that its class reads


def load_scheduler(folder: Path, pipeline: str = "") -> LoadedScheduler:
    """Load a scheduler, and check every key of its config.

    Args:
        folder: the scheduler's.
        pipeline: class of the pipeline, some of which change their scheduler.

    Raises:
        ValueError: its class or the value of a key is not supported; the message names it.
    """
    import diffusers

    path = folder / CONFIG
    stored = read_config(path)
    name = stored.get("_class_name")
    if name not in SUPPORTED:
        raise ValueError(f"{path}: _class_name is {name}; supported are {', '.join(SUPPORTED)}")
    cls = getattr(diffusers, name)
    keys = _defaults(cls)
    _check_foreign_keys(path, name, stored, keys)
    n = stored.get("num_train_timesteps", keys["num_train_timesteps"])
    if type(n) is not int or n < 1:
        raise ValueError(f"{path}: num_train_timesteps is {n}; it must be a whole number from 1")
    # the class checks the values that it reads
    changes = {}
    for key, value in PIPELINE_CHANGES.get(pipeline, {}).items():
        if key in keys:
            changes[key] = value
    try:
        scheduler = cls.from_config(stored, **changes)
    except Exception as error:  # diffusers and torch raise different kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: not a config of {name} ({reason})") from None
    config = {key: scheduler.config[key] for key in keys}
    _check_values(path, name, config, keys)
    return LoadedScheduler(folder, name, scheduler, config)


def _defaults(cls: Any) -> dict[str, Any]:
    """Return the keys that a class reads, with their defaults."""
    parameters = inspect.signature(cls.__init__).parameters
    return {key: part.default for key, part in parameters.items() if key != "self"}


def _check_foreign_keys(
    path: Path, name: str, stored: dict[str, Any], keys: dict[str, Any]
) -> None:
    """Check the keys that a class does not read, as those of another class that was replaced."""
    import diffusers

    known: set[str] = set()
    for other in SUPPORTED:
        known |= _defaults(getattr(diffusers, other)).keys()
    for key, value in stored.items():
        if key in FORMER_KEYS and value == FORMER_KEYS[key]:
            continue
        is_off = value in (None, False) and key not in FORMER_KEYS
        if key in keys or key.startswith("_") or is_off:
            continue
        changes_network = name not in FLOWS and NETWORK_KEYS.get(key) not in (None, value)
        if changes_network:
            raise ValueError(
                f"{path}: {key} is {value}, which a {name} does not apply; remove the key, or "
                "use a class of scheduler that applies it"
            )
        if key not in known:
            raise ValueError(
                f"{path}: {key} is {value}, which this version of diffusers does not know; "
                "remove the key if it changes nothing"
            )


def _check_values(path: Path, name: str, config: dict[str, Any], keys: dict[str, Any]) -> None:
    """Check that the keys of a class which we cannot apply have the class's defaults."""
    applied = (*NETWORK_KEYS, *CLIPPING_KEYS, *GRID_KEYS, *SOLVER_KEYS)
    for key, value in config.items():
        if key not in applied and value != keys[key]:
            raise ValueError(f"{path}: {key} is {value}; of a {name} only {keys[key]} is supported")
    for key, kinds in KEY_TYPES.items():
        value = config.get(key)
        if value is not None and not isinstance(value, kinds):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{path}: {key} is {value!r}; it must be of type {names}")
    n = config["num_train_timesteps"]
    betas = config.get("trained_betas")
    if betas is not None and len(betas) != n:
        raise ValueError(
            f"{path}: num_train_timesteps is {n}, but trained_betas has {len(betas)} numbers; "
            "make them equal"
        )
    flows = config.get("prediction_type") == "flow_prediction"
    if name in CHAINS and flows != bool(config.get("use_flow_sigmas")):
        raise ValueError(
            f"{path}: prediction_type is {config.get('prediction_type')} and use_flow_sigmas is "
            f"{config.get('use_flow_sigmas')}; flow_prediction and use_flow_sigmas true belong "
            "together"
        )
    continuous = config.get("timestep_type") == "continuous"
    if continuous and config.get("rescale_betas_zero_snr"):
        raise ValueError(
            f"{path}: timestep_type is continuous and rescale_betas_zero_snr is true; the "
            "network's time would be infinite at pure noise"
        )


def read_clipping(loaded: LoadedScheduler) -> float | None:
    """Return the largest |x| of a scheduler's estimates of the data, or None for no limit."""
    if not loaded.config.get("clip_sample"):
        return None
    return float(loaded.config.get("clip_sample_range", 1.0))
