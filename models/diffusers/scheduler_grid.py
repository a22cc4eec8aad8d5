"""The noise levels at which a scheduler of diffusers would step, as a grid of our samplers."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.denoiser import Denoiser, DenoiserLike
from models.diffusers.networks import Pretrained
from models.diffusers.scheduler_keys import (
    CHAINS,
    CONFIG,
    EDM,
    FLOWS,
    LoadedScheduler,
    read_clipping,
)
from models.interpolant import Interpolant, expand
from models.sampler import NoiseSource, Sampler, Trajectory
from models.time_input import InterpolatedTime

# Their states are x + sigma eps, those of the other chains alpha x + sigma eps.
EXPLODING = (
    *EDM,
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
)
# They list levels between their steps too.
INTERLEAVED = (
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
)
# Their steps go over T // N timesteps each, whatever their timesteps are.
FIXED_JUMPS = (
    "DDIMParallelScheduler",
    "DDIMScheduler",
)
# Keys that replace `use_flow_sigmas` in the levels, though not in the network's meaning.
CHAIN_SPACINGS = (
    "use_beta_sigmas",
    "use_exponential_sigmas",
    "use_karras_sigmas",
    "use_lu_lambdas",
)
ROUNDING = 1e-6  # of times of levels from float32 tables
RANGE = 1.001  # how far a level may lie above the interpolant's last: tables are rounded


class SchedulerGrid(NamedTuple):
    """A grid of times with all that a scheduler adds to it."""

    times: list[float]  # falling
    timesteps: list[float]  # the network's inputs at the times; the last has none
    start: float  # factor of the noise in the first state
    end: float  # factor of the last state in the result


def build_scheduler_grid(loaded: LoadedScheduler, denoiser: Denoiser, steps: int) -> SchedulerGrid:
    """Return the grid of a scheduler with a number of steps.

    Args:
        loaded: the scheduler.
        denoiser: of its pipeline.
        steps: number of steps. Some schedulers make one less of them.

    Raises:
        ValueError: the scheduler has no grid of this kind.
    """
    path = loaded.folder / CONFIG
    if loaded.name in INTERLEAVED:
        raise ValueError(
            f"{path}: grid is scheduler, but a {loaded.name} has levels between its steps; choose "
            "another grid, or another class of scheduler"
        )
    limit = loaded.config["num_train_timesteps"]
    if loaded.name in CHAINS and steps > limit:  # diffusers mistakes steps of one timestep
        raise ValueError(
            f"{path}: num_train_timesteps is {limit}: a {loaded.name} cannot make {steps} steps; "
            "lower --steps"
        )
    _set_timesteps(loaded, denoiser, steps)
    alphas, sigmas, timesteps = _levels(loaded, steps)
    # the times of these noise levels
    _check_levels(path, denoiser.interpolant, alphas[0], sigmas[0])
    exact = denoiser.interpolant.time_of_snr(alphas, sigmas)
    found = exact.where(sigmas > 0, 0.0).tolist()
    times = [found[0]]
    kept = [timesteps[0]]
    for time, timestep in zip(found[1:], [*timesteps[1:], math.nan], strict=True):
        if time > times[-1] + ROUNDING:
            raise ValueError(
                f"{path}: in {steps} steps its noise levels rise towards timestep {timestep:g}; "
                "change --steps, or choose another grid"
            )
        if time >= times[-1]:
            # a step that goes nowhere is none
            if loaded.name not in FIXED_JUMPS or read_clipping(loaded) is None:
                continue
            time = times[-1] * (1 - ROUNDING)  # it clips the data once more
        times.append(time)
        kept.append(timestep)
    if len(times) == 1:
        raise ValueError(
            f"{path}: grid is scheduler, but the {steps} steps of a {loaded.name} go nowhere from "
            f"timestep {timesteps[0]:g}; change --steps, or choose another grid"
        )
    # the scale of the first and the last state
    start = 1.0
    end = 1.0
    if loaded.name in EXPLODING:
        start = float(loaded.scheduler.init_noise_sigma * alphas[0])
        end = float(1 / alphas[-1])
    return SchedulerGrid(times, kept[: len(times) - 1], start, end)


def _set_timesteps(loaded: LoadedScheduler, denoiser: Denoiser, steps: int) -> None:
    """Set a scheduler's levels as its pipeline does."""
    config = loaded.config
    arguments: dict[str, Any] = {}
    net = denoiser.net
    assert isinstance(net, Pretrained)
    patch = net.architecture.patch
    if config.get("use_dynamic_shifting"):
        if not patch:
            raise ValueError(
                f"{loaded.folder / CONFIG}: use_dynamic_shifting is true, which only Stable "
                "Diffusion 3 and Flux apply"
            )
        # Esser et al. 2024 (arXiv 2403.03206): the shift is linear in the number of tokens.
        tokens = (net.size // patch) ** 2
        base = config.get("base_image_seq_len", 256)
        slope = (config.get("max_shift", 1.15) - config.get("base_shift", 0.5)) / (
            config.get("max_image_seq_len", 4096) - base
        )
        arguments["mu"] = config.get("base_shift", 0.5) + slope * (tokens - base)
    if net.kind == "FluxTransformer2DModel" and not config.get("use_flow_sigmas"):
        arguments["sigmas"] = [1 - i * (1 - 1 / steps) / max(steps - 1, 1) for i in range(steps)]
    else:
        arguments["num_inference_steps"] = steps
    try:
        loaded.scheduler.set_timesteps(**arguments)
    except Exception as error:  # each scheduler raises its own kind
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{loaded.folder}: grid is scheduler, and a {loaded.name} cannot make {steps} steps "
            f"({reason}); change --steps, or choose another grid"
        ) from None


class Levels(NamedTuple):
    """Noise levels of a scheduler, in float64, and its timesteps."""

    alphas: Tensor  # (n + 1,)
    sigmas: Tensor  # (n + 1,)
    timesteps: list[float]  # n of them


def _levels(loaded: LoadedScheduler, steps: int) -> Levels:
    """Return the levels that a scheduler has set."""
    scheduler = loaded.scheduler
    timesteps = scheduler.timesteps.tolist()
    count = len(timesteps) + 1  # Euler's log_linear lists one more, which it does not reach
    if loaded.name in FLOWS or loaded.config.get("use_flow_sigmas"):
        sigmas = scheduler.sigmas[:count].double()
        is_flow = loaded.name in (*FLOWS, "UniPCMultistepScheduler") and sigmas[0] <= 1
        for key in CHAIN_SPACINGS:
            if loaded.config.get(key) and not is_flow:
                raise ValueError(
                    f"{loaded.folder / CONFIG}: {key} is true, with which a {loaded.name} does not "
                    "apply use_flow_sigmas; set it to false, or choose another grid"
                )
        return Levels(1 - sigmas, sigmas, timesteps)
    if hasattr(scheduler, "sigmas"):  # sigma / alpha
        ratios = scheduler.sigmas[:count].double()
        alphas = torch.rsqrt(1 + ratios.square())
        return Levels(alphas, ratios * alphas, timesteps)
    if loaded.name == "PNDMScheduler":  # it repeats some timesteps, and adds others
        timesteps = sorted(scheduler._timesteps.tolist(), reverse=True)
    bars = scheduler.alphas_cumprod.double()
    if timesteps[0] >= len(bars):
        raise ValueError(
            f"{loaded.folder / CONFIG}: steps_offset is {loaded.config.get('steps_offset')}: "
            f"{steps} steps begin at timestep {timesteps[0]} of {len(bars)}; lower --steps"
        )
    last = _find_last_level(loaded, timesteps, steps)
    levels = torch.cat([bars[timesteps], torch.as_tensor([last], dtype=torch.float64)])
    return Levels(levels.sqrt(), (1 - levels).sqrt(), timesteps)


def _find_last_level(loaded: LoadedScheduler, timesteps: list[int], steps: int) -> float:
    """Return alpha^2 after the last step of a scheduler that lists no sigmas.

    Raises:
        ValueError: its steps do not end where the next begin.
    """
    scheduler = loaded.scheduler
    last = 1.0
    if hasattr(scheduler, "final_alpha_cumprod"):
        last = float(scheduler.final_alpha_cumprod)
    if loaded.name not in FIXED_JUMPS:
        return last
    jump = len(scheduler.alphas_cumprod) // steps
    for now, following in pairwise(timesteps):
        if now - jump != following:
            spacing = loaded.config["timestep_spacing"]
            raise ValueError(
                f"{loaded.folder / CONFIG}: timestep_spacing is {spacing}: in {steps} steps a "
                f"{loaded.name} goes from timestep {now} to {now - jump}, and on from {following}; "
                "change --steps, or choose another grid (trailing has such timesteps)"
            )
    end = timesteps[-1] - jump
    return float(scheduler.alphas_cumprod[end]) if end >= 0 else last


def _check_levels(path: Any, interpolant: Interpolant, alpha: Tensor, sigma: Tensor) -> None:
    """Check that the network's interpolant reaches a scheduler's first noise level."""
    largest_alpha, largest_sigma = interpolant(torch.ones((), dtype=torch.float64))
    if sigma * largest_alpha > RANGE * alpha * largest_sigma:
        raise ValueError(
            f"{path}: its first sigma / alpha is {float(sigma / alpha):.6g}, more than that of its "
            f"betas, {float(largest_sigma / largest_alpha):.6g}; lower sigma_max, or choose "
            "another grid"
        )


class OnScheduler(Sampler):
    """A sampler on a scheduler's grid, with the scheduler's timesteps and scales.

    Args:
        sampler: on the grid's times.
        grid: the grid.
        denoisers: those whose networks receive the scheduler's timesteps.
    """

    def __init__(self, sampler: Sampler, grid: SchedulerGrid, denoisers: list[Denoiser]):
        super().__init__(sampler.steps, sampler.times)
        self.sampler = sampler
        self.scheduler_grid = grid
        self.denoisers = denoisers
        self.is_stochastic = sampler.is_stochastic

    def step(self, trajectory: Trajectory, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return self.sampler.step(trajectory, x_t, t, s)

    @contextmanager
    def _timesteps(self) -> Iterator[None]:
        """Let the networks receive the scheduler's timesteps inside the block."""
        grid = self.scheduler_grid
        inputs = [denoiser.time_input for denoiser in self.denoisers]
        for denoiser, before in zip(self.denoisers, inputs):
            times = grid.times[:-1]
            values = grid.timesteps
            if grid.times[-1] > 0:
                times = grid.times
                values = [*values, float(before(torch.tensor(times[-1])))]
            denoiser.time_input = InterpolatedTime(times, values)
        try:
            yield
        finally:
            for denoiser, before in zip(self.denoisers, inputs):
                denoiser.time_input = before

    def integrate(
        self,
        denoiser: DenoiserLike,
        x_t: Tensor,
        cond: Tensor | None = None,
        noise: NoiseSource | None = None,
    ) -> list[Tensor]:
        """Return the states at every time of the grid."""
        with self._timesteps():
            return self.sampler.integrate(denoiser, x_t, cond, noise)

    @torch.no_grad()
    def __call__(
        self,
        denoiser: DenoiserLike,
        eps: Tensor,
        cond: Tensor | None = None,
        noise: NoiseSource | None = None,
    ) -> Tensor:
        """Return samples x, shape (B, C, H, W), from standard normal noise eps."""
        grid = self.scheduler_grid
        return self.integrate(denoiser, grid.start * eps, cond, noise)[-1] * grid.end

    @torch.no_grad()
    def invert(self, denoiser: DenoiserLike, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Return the noise eps, shape (B, C, H, W), from which this sampler makes x."""
        grid = self.scheduler_grid
        with self._timesteps():
            eps = self.sampler.invert(denoiser, x / grid.end, cond)
        _, sigma = denoiser.interpolant(eps.new_tensor(self.times[0]))
        return eps * expand(sigma, eps) / grid.start

    def nfe(self, denoiser: DenoiserLike | None = None, inverse: bool = False) -> int:
        """Return the network evaluations per sample; guidance doubles them where it acts."""
        return self.sampler.nfe(denoiser, inverse)
