"""Configs of schedulers: each key is applied as its class does, or refused by name."""

import inspect
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from models.checkpoint import load_checkpoint
from models.diffusers.networks import Pretrained
from models.diffusers.scheduler import read_scheduler
from models.diffusers.scheduler_grid import build_scheduler_grid
from models.diffusers.scheduler_keys import (
    CLIPPING_KEYS,
    GRID_KEYS,
    NETWORK_KEYS,
    SOLVER_KEYS,
    SUPPORTED,
    load_scheduler,
)
from models.sampler import DDIM
from models.time_input import NoiseLevel
from tests.deploy.test_pretrained import small_unet
from tests.helpers.refusals import assert_refused, refused
from trainer.jobs.options import SamplingOptions
from trainer.jobs.sampling_model import SamplingModel

SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
CPU = torch.device("cpu")


def save_pipeline(path: Path, scheduler: Any) -> Path:
    """Write a pipeline of pixels of 1 x 16 x 16 with a scheduler, and return its folder."""
    DDPMPipeline(small_unet(), scheduler).save_pretrained(path)
    return path


def edit_config(folder: Path, **changes: Any) -> None:
    """Change the config of a folder's scheduler."""
    file = folder / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("name", SUPPORTED)
def test_every_class_is_read_with_its_defaults(tmp_path, name):
    getattr(diffusers, name)().save_pretrained(tmp_path)
    loaded = load_scheduler(tmp_path)
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    assert loaded.config.keys() == parameters.keys() - {"self"}
    assert read_scheduler(tmp_path).interpolant


@pytest.mark.parametrize("name", SUPPORTED)
def test_a_key_is_in_a_group_or_its_other_values_are_refused(tmp_path, name):
    """Whatever a class reads and we do not apply is refused by name."""
    cls = getattr(diffusers, name)
    applied = (*NETWORK_KEYS, *CLIPPING_KEYS, *GRID_KEYS, *SOLVER_KEYS)
    for key, parameter in inspect.signature(cls.__init__).parameters.items():
        if key in ("self", *applied):
            continue
        cls().save_pretrained(tmp_path)
        changed = not parameter.default if isinstance(parameter.default, bool) else 3.0
        edit_config(tmp_path, **{key: changed})
        with refused(tmp_path, key, changed):
            load_scheduler(tmp_path)


@pytest.mark.parametrize(
    ("scheduler", "changes"),
    [
        (DDIMScheduler(), {"thresholding": True}),
        (FlowMatchEulerDiscreteScheduler(), {"invert_sigmas": True}),
        (LCMScheduler(), {"timestep_scaling": 0.1}),
        (PNDMScheduler(), {"rescale_betas_zero_snr": True}),
        (DDIMScheduler(), {"timestep_type": "continuous"}),
        (DDIMScheduler(), {"snr_shift_scale": 3.0}),
        (DDPMScheduler(), {"predict_epsilon": False}),
        (DDPMScheduler(), {"num_train_timesteps": "1000"}),
        (DDIMScheduler(trained_betas=[0.1, 0.2, 0.3], num_train_timesteps=3), {"steps": 4}),
        (
            DDIMScheduler(trained_betas=[0.1, 0.2, 0.3], num_train_timesteps=3),
            {"num_train_timesteps": 1000},
        ),
        (DDIMScheduler(), {"trained_betas": [0.1, 0.2, 1.0], "num_train_timesteps": 3}),
        (DPMSolverMultistepScheduler(), {"prediction_type": "flow_prediction"}),
        (DPMSolverMultistepScheduler(), {"use_flow_sigmas": True}),
        (DDPMScheduler(), {"beta_schedule": "sigmoid"}),
        (DDIMScheduler(), {"_class_name": "CogVideoXDDIMScheduler"}),
        (EDMEulerScheduler(), {"prediction_type": "v_prediction"}),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_a_key_that_is_not_applied_is_refused_by_name(tmp_path, scheduler, changes):
    scheduler.save_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    key, value = next(iter(changes.items()))
    shown = value[-1] if isinstance(value, list) else value
    with refused(tmp_path, key.removeprefix("trained_"), shown):
        read_scheduler(tmp_path)


def test_keys_of_the_class_that_was_replaced_are_ignored_as_diffusers_does(tmp_path):
    """SDXL's config: Euler with what is left of PNDM and DDIM."""
    EulerDiscreteScheduler(**SCALED).save_pretrained(tmp_path)
    left = {"clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True}
    edit_config(tmp_path, **left, sample_max_value=1.0, trained_betas=None)
    assert "skip_prk_steps" not in load_scheduler(tmp_path).config


def test_a_continuous_time_is_the_networks(tmp_path):
    """EulerDiscrete passes log(sigma) / 4 instead of the index."""
    scheduler = EulerDiscreteScheduler(
        **SCALED, timestep_type="continuous", prediction_type="v_prediction"
    )
    scheduler.save_pretrained(tmp_path)
    chain, _, time_input = read_scheduler(tmp_path)
    assert isinstance(time_input, NoiseLevel)
    scheduler.set_timesteps(10)
    sigmas = scheduler.sigmas[:-1].double()
    t = chain.time_of_snr(torch.ones_like(sigmas), sigmas)
    found = time_input(t)
    torch.testing.assert_close(found, scheduler.timesteps.double(), rtol=1e-4, atol=1e-4)


CHAIN_SCHEDULERS = [
    DDIMScheduler(**SCALED, clip_sample=False),
    DDIMScheduler(**SCALED, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
    DDIMScheduler(clip_sample=False, timestep_spacing="trailing"),
    DDIMScheduler(
        clip_sample=False,
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        prediction_type="v_prediction",
    ),
    DDIMScheduler(clip_sample=False, beta_schedule="squaredcos_cap_v2", prediction_type="sample"),
    DDIMScheduler(trained_betas=[0.1, 0.2, 0.3, 0.4], num_train_timesteps=4, clip_sample=False),
    DDIMScheduler(clip_sample=True),
    DDIMScheduler(clip_sample=True, clip_sample_range=0.5),
    DDIMScheduler(clip_sample=True, set_alpha_to_one=False),
    DDIMScheduler(num_train_timesteps=10, steps_offset=2, clip_sample=False),
    EulerDiscreteScheduler(**SCALED),
    EulerDiscreteScheduler(**SCALED, timestep_spacing="leading", steps_offset=1),
    EulerDiscreteScheduler(**SCALED, timestep_spacing="trailing", use_karras_sigmas=True),
    EulerDiscreteScheduler(**SCALED, use_exponential_sigmas=True),
    EulerDiscreteScheduler(**SCALED, use_beta_sigmas=True),
    EulerDiscreteScheduler(**SCALED, final_sigmas_type="sigma_min"),
    EulerDiscreteScheduler(**SCALED, interpolation_type="log_linear"),
    EulerDiscreteScheduler(
        **SCALED,
        timestep_type="continuous",
        prediction_type="v_prediction",
        sigma_max=10.0,
        sigma_min=0.05,
        use_karras_sigmas=True,
    ),
    EulerDiscreteScheduler(**SCALED, rescale_betas_zero_snr=True, prediction_type="v_prediction"),
    DPMSolverMultistepScheduler(**SCALED, solver_order=1),
    DPMSolverMultistepScheduler(**SCALED, solver_order=1, use_karras_sigmas=True),
    DPMSolverMultistepScheduler(**SCALED, solver_order=1, use_lu_lambdas=True),
    DPMSolverMultistepScheduler(**SCALED, solver_order=1, final_sigmas_type="sigma_min"),
    DPMSolverMultistepScheduler(
        solver_order=1,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=3.0,
    ),
    FlowMatchEulerDiscreteScheduler(shift=3.0),
    FlowMatchEulerDiscreteScheduler(shift=3.0, shift_terminal=0.1),
    FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
    EDMEulerScheduler(sigma_data=0.7),
    EDMEulerScheduler(prediction_type="v_prediction", sigma_data=1.0, sigma_schedule="exponential"),
    EDMDPMSolverMultistepScheduler(solver_order=1, final_sigmas_type="sigma_min", rho=5.0),
]


def describe_config(scheduler: Any) -> str:
    """Return the class of a scheduler and its values that are not the default."""
    parameters = inspect.signature(type(scheduler).__init__).parameters
    changed = [type(scheduler).__name__.removesuffix("Scheduler")]
    for key, parameter in parameters.items():
        if key not in ("self", *SCALED) and scheduler.config[key] != parameter.default:
            changed.append(f"{key}={scheduler.config[key]}")
    return " ".join(changed)


@torch.no_grad()
def sample_with_diffusers(scheduler: Any, eps: torch.Tensor, steps: int) -> torch.Tensor:
    """Return what a scheduler samples with the small network."""
    net = small_unet()
    scheduler = type(scheduler).from_config(scheduler.config)
    return sample_by_class(scheduler, lambda x, timestep: net(x, timestep).sample, eps, steps)


def sample_by_class(
    scheduler: Any,
    net: Callable[[torch.Tensor, Any], torch.Tensor],
    eps: torch.Tensor,
    steps: int,
) -> torch.Tensor:
    """Return what a scheduler samples with a network."""
    scheduler.set_timesteps(steps)
    x = eps * scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else eps
    for timestep in scheduler.timesteps:
        scaled = x
        if hasattr(scheduler, "scale_model_input"):
            scaled = scheduler.scale_model_input(x, timestep)
        x = scheduler.step(net(scaled, timestep), timestep, x).prev_sample
    return x


@pytest.mark.parametrize("scheduler", CHAIN_SCHEDULERS, ids=describe_config)
def test_samples_on_the_schedulers_grid_are_those_of_the_scheduler(tmp_path, scheduler):
    folder = save_pipeline(tmp_path / "teacher", scheduler)
    eps = torch.randn(2, 1, 16, 16, generator=torch.manual_seed(3))
    model = SamplingModel(folder, SamplingOptions(grid="scheduler"), 1.0, CPU)
    with torch.no_grad():
        found = model.build_sampler("DDIM", 4)(model.guide(1.0), eps)
    expected = sample_with_diffusers(scheduler, eps, 4)
    assert (found - expected).norm() < 1e-4 * expected.norm()


# Values of keys from which configs are made.
VALUES: dict[str, list[Any]] = {
    "num_train_timesteps": [1000, 1000, 500, 50],
    "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2"],
    "beta_start": [0.0001, 0.00085],
    "beta_end": [0.02, 0.012],
    "clip_sample": [False, True],
    "final_sigmas_type": ["zero", "sigma_min"],
    "flow_shift": [1.0, 3.0],
    "interpolation_type": ["linear", "log_linear"],
    "prediction_type": ["epsilon", "v_prediction", "sample", "flow_prediction"],
    "rescale_betas_zero_snr": [False, True],
    "rho": [7.0, 5.0],
    "set_alpha_to_one": [True, False],
    "shift": [1.0, 3.0],
    "sigma_data": [0.5, 1.0],
    "sigma_max": [5.0],
    "sigma_min": [0.05],
    "sigma_schedule": ["karras", "exponential"],
    "solver_order": [1],
    "steps_offset": [0, 1, 2],
    "timestep_spacing": ["leading", "trailing", "linspace"],
    "timestep_type": ["discrete", "continuous"],
    "use_beta_sigmas": [False, False, True],
    "use_exponential_sigmas": [False, False, True],
    "use_flow_sigmas": [False, True],
    "use_karras_sigmas": [False, False, True],
    "use_lu_lambdas": [False, False, True],
}
# Classes whose steps are those of DDIM or Euler.
FIRST_ORDER = [
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
]


def make_config(name: str, rng: random.Random) -> dict[str, Any]:
    """Return a config of a class with random values of a random part of its keys."""
    config: dict[str, Any] = {"_class_name": name, "clip_sample": False, "solver_order": 1}
    keys = inspect.signature(getattr(diffusers, name).__init__).parameters
    for key, values in VALUES.items():
        if key in keys and rng.random() < 0.4:
            config[key] = rng.choice(values)
    if config.get("use_flow_sigmas"):
        config["prediction_type"] = "flow_prediction"
    return config


def simple_network(x: torch.Tensor, time: Any) -> torch.Tensor:
    """Return numbers that change much with the time, as a network does."""
    t = torch.as_tensor(time, dtype=torch.float64).reshape(-1, 1, 1, 1)
    y = 0.6 * x.double() * torch.cos(t / 150) + 0.2 * torch.sin(3 * x.double() + t / 37)
    return y.to(x.dtype)


@pytest.fixture(scope="module")
def changed_folder(tmp_path_factory):
    """Return the folder of a pipeline whose scheduler each test replaces."""
    return save_pipeline(tmp_path_factory.mktemp("random") / "teacher", DDPMScheduler())


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 25, 50, 1000])
@pytest.mark.parametrize("name", FIRST_ORDER)
def test_any_config_is_sampled_as_by_its_class_or_refused(changed_folder, monkeypatch, name, steps):
    def forward(net: Any, x: torch.Tensor, time: torch.Tensor, *_: Any) -> torch.Tensor:
        return simple_network(x, time)

    monkeypatch.setattr(Pretrained, "forward", forward)
    config = make_config(name, random.Random(f"{name} {steps}"))
    file = changed_folder / "scheduler/scheduler_config.json"
    file.write_text(json.dumps(config))
    index = json.loads((changed_folder / "model_index.json").read_text())
    index["scheduler"][1] = name
    (changed_folder / "model_index.json").write_text(json.dumps(index))
    try:
        model = SamplingModel(changed_folder, SamplingOptions(grid="scheduler"), 1.0, CPU)
        sampler = model.build_sampler("DDIM", steps)
    except ValueError as error:
        assert str(file.parent) in str(error)
        return
    eps = torch.randn(2, 1, 4, 4, generator=torch.manual_seed(3))
    found = sampler(model.guide(1.0), eps)
    scheduler = getattr(diffusers, name).from_config(config)
    expected = sample_by_class(scheduler, simple_network, eps, steps)
    assert (found - expected).norm() < 1e-4 * expected.norm(), config


@pytest.mark.parametrize(
    ("scheduler", "steps", "named"),
    [
        (DDIMScheduler(timestep_spacing="trailing"), 7, ("timestep_spacing", "trailing", 999, 857)),
        (DDIMScheduler(timestep_spacing="linspace"), 4, ("timestep_spacing", "linspace")),
        (DDIMScheduler(steps_offset=1), 1000, ("steps_offset", 1000)),
        (DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing"), 4, ("epsilon",)),
        (PNDMScheduler(trained_betas=[0.1] * 7, num_train_timesteps=7), 20, (7, 20)),
        (
            DPMSolverMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, use_karras_sigmas=True
            ),
            4,
            ("use_karras_sigmas", "use_flow_sigmas"),
        ),
        (
            EulerDiscreteScheduler(rescale_betas_zero_snr=True, beta_start=0.002, beta_end=0.03),
            96,
            ("levels rise", 96),
        ),
    ],
    ids=["trailing", "linspace", "offset", "no signal", "few timesteps", "flow", "rising"],
)
def test_steps_that_diffusers_makes_otherwise_are_refused(tmp_path, scheduler, steps, named):
    folder = save_pipeline(tmp_path / "teacher", scheduler)
    model = SamplingModel(folder, SamplingOptions(grid="scheduler"), 1.0, CPU)
    with refused(folder / "scheduler", *named):
        model.build_sampler("DDIM", steps)


@pytest.mark.parametrize(
    "scheduler",
    [
        PNDMScheduler(skip_prk_steps=True, steps_offset=1, **SCALED),
        PNDMScheduler(skip_prk_steps=True, set_alpha_to_one=True, **SCALED),
        DDPMScheduler(),
        EulerAncestralDiscreteScheduler(**SCALED),
        LMSDiscreteScheduler(**SCALED, use_karras_sigmas=True),
        HeunDiscreteScheduler(**SCALED),
        UniPCMultistepScheduler(**SCALED),
        DEISMultistepScheduler(**SCALED),
        LCMScheduler(),
    ],
    ids=describe_config,
)
@pytest.mark.parametrize("steps", [3, 6, 20])
def test_a_grid_has_the_levels_and_timesteps_of_its_class(tmp_path, scheduler, steps):
    denoiser = load_checkpoint(save_pipeline(tmp_path / "teacher", scheduler)).denoiser
    grid = build_scheduler_grid(load_scheduler(tmp_path / "teacher/scheduler"), denoiser, steps)
    # the class's own, each once
    scheduler.set_timesteps(steps)
    timesteps = sorted(set(scheduler.timesteps.tolist()), reverse=True)
    if isinstance(scheduler, PNDMScheduler):
        timesteps = sorted(scheduler._timesteps.tolist(), reverse=True)
    assert grid.timesteps == timesteps[: len(grid.timesteps)]
    assert len(timesteps) - len(grid.timesteps) in (0, 1)  # a step that goes nowhere is none
    alpha, sigma = denoiser.interpolant(torch.tensor(grid.times[:-1], dtype=torch.float64))
    if hasattr(scheduler, "sigmas"):
        levels = scheduler.sigmas.double().unique().flip(0)[: len(grid.times) - 1]
        torch.testing.assert_close(sigma / alpha, levels, rtol=1e-4, atol=1e-6)
    else:
        indices = [int(timestep) for timestep in grid.timesteps]
        bars = scheduler.alphas_cumprod.double()[indices]
        torch.testing.assert_close(alpha.square(), bars, rtol=1e-4, atol=1e-6)


def test_a_clipping_scheduler_limits_data_on_every_grid(tmp_path):
    folder = save_pipeline(tmp_path / "teacher", DDPMScheduler(clip_sample_range=0.7))
    model = SamplingModel(folder, SamplingOptions(), 1.0, CPU)
    eps = torch.randn(2, 1, 16, 16)
    found = model.build_sampler("DDIM", 3)(model.guide(1.0), eps)
    unlimited = DDIM(3)(model.denoiser, eps)
    assert unlimited.abs().max() > 1
    assert found.abs().max() == pytest.approx(0.7)
    assert model.record_options()["clip_sample"] == 0.7


def test_levels_above_the_networks_are_refused(tmp_path):
    scheduler = EulerDiscreteScheduler(**SCALED, use_karras_sigmas=True, sigma_max=700.0)
    folder = save_pipeline(tmp_path / "teacher", scheduler)
    model = SamplingModel(folder, SamplingOptions(grid="scheduler"), 1.0, CPU)
    with refused(folder / "scheduler", "sigma_max", 700):
        model.build_sampler("DDIM", 4)


def test_a_dynamic_shift_needs_a_pipeline_that_applies_it(tmp_path):
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    folder = save_pipeline(tmp_path / "teacher", scheduler)
    model = SamplingModel(folder, SamplingOptions(grid="scheduler"), 1.0, CPU)
    with refused(folder / "scheduler", "use_dynamic_shifting"):
        model.build_sampler("DDIM", 4)


def test_only_a_pipeline_has_a_schedulers_grid(workspace, tmp_path, capfd):
    run = workspace.path / "runs/demo/teacher"
    words = ("sample", "--run", run, "--steps", "2", "--count", "10", "--out", tmp_path / "x.png")
    assert_refused(capfd, (*words, "--grid", "scheduler"), "grid", "scheduler", run)


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_the_schedulers_grid_is_inverted_with_its_scales(tmp_path, final):
    spacing = {"timestep_spacing": "leading", "steps_offset": 1, "final_sigmas_type": final}
    folder = save_pipeline(tmp_path / "teacher", EulerDiscreteScheduler(**SCALED, **spacing))
    model = SamplingModel(folder, SamplingOptions(grid="scheduler"), 1.0, CPU)
    for value in model.denoiser.net.model.conv_out.parameters():
        value.zero_()  # no noise anywhere: states are only scaled
    sampler = model.build_sampler("DDIM", 4)
    x = torch.randn(2, 1, 16, 16)
    again = sampler(model.guide(1.0), sampler.invert(model.guide(1.0), x))
    torch.testing.assert_close(again, x, rtol=1e-4, atol=1e-4)
    assert sampler.nfe(model.guide(1.0)) == 4
