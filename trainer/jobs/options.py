"""Options that several verbs share. It imports no torch, so that `--help` is quick."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

# Classes of models.sampler: those that draw no noise after the first, and all of them.
DeterministicSampler = Literal[
    "DDIM", "DPMSolver2M", "EDMHeun", "Euler", "Heun", "Midpoint", "RungeKutta4"
]
AnySampler = Literal[DeterministicSampler, "Ancestral", "EulerMaruyama", "Renoising"]

# Functions of models.sampler.grids, and the grid of a pipeline's scheduler.
Grid = Literal["uniform", "karras", "lambda", "trailing", "shifted", "scheduler"]

# Classes of models.interpolant that need no arguments.
InterpolantName = Literal[
    "Linear",
    "Trigonometric",
    "VariancePreserving",
    "SubVariancePreserving",
    "VarianceExploding",
    "ImprovedCosine",
    "EDMPath",
]


@dataclass(frozen=True)
class SamplingOptions:
    """Guidance, times of the steps, interpolant, prompts, precision.

    Args:
        guidance: guidance scale w of u + w (c - u), where c is the network's output and u its
            output without the condition; 1 is no guidance. A guidance-conditioned student takes w
            as an input.
        guidance_interval: [low, high]: guidance acts only at times t in this interval; 0 is data,
            1 is noise, by the network's interpolant (Kynkaanniemi et al. 2024, arXiv 2404.07724).
        guidance_rescale: how far a guided estimate of the data is rescaled to the standard
            deviation that it has without guidance, from 0 (not at all) to 1 (Lin et al. 2023,
            arXiv 2305.08891).
        autoguidance: run folder or checkpoint of a weaker version of the network, smaller or
            trained for fewer steps; its output is u (Karras et al. 2024, arXiv 2406.02507).
        grid: times of the steps. uniform: equal steps of t. karras: equal steps of
            (sigma / alpha)^(1/7), from at most 80 to .002 (EDM). lambda: equal steps of
            log(alpha / sigma) (DPM-Solver). trailing: levels of a discrete chain, beginning with
            the noisiest (Lin et al. 2023). shifted: uniform times, moved by `grid_shift`.
            scheduler: those of the scheduler in a pipeline's folder.
        grid_shift: shift of the shifted grid, logit t' = logit t + log shift; above 1 there are
            more steps at high noise (Stable Diffusion 3 has 3).
        edges: window edges of a phased student, falling from 1 to 0, if its windows are not equal.
            The times include all of them, with equal steps between.
        interpolant: sample on another interpolant than the network's. States of equal
            signal-to-noise ratio are the same up to scale, so that only the error of the sampler
            changes.
        prompts: for a text-to-image network: a text file with one prompt on each line, used in
            turn (`invert` needs one for each class); by default the prompts that the network was
            trained on.
        negative_prompt: for a text-to-image network: the text of u, which guidance leads away from;
            by default none, as the network was trained.
        dtype: of the weights and the arithmetic of network and text encoders; bfloat16 halves their
            memory. States and the codec are float32.
    """

    guidance: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_rescale: float = 0.0
    autoguidance: Path | None = None
    grid: Grid = "uniform"
    grid_shift: float | None = None
    edges: list[float] | None = None
    interpolant: InterpolantName | None = None
    prompts: Path | None = None
    negative_prompt: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if self.edges and self.grid != "uniform":
            raise ValueError(
                f"edges is {self.edges} and grid is {self.grid}; both set the times: omit one"
            )
        if self.edges and self.interpolant:
            raise ValueError(
                f"edges is {self.edges} and interpolant is {self.interpolant}; edges are times of "
                "the network's own interpolant: omit one"
            )
        if self.interpolant and self.grid == "scheduler":
            raise ValueError(
                f"interpolant is {self.interpolant} and grid is scheduler, whose levels are those "
                "of the network's interpolant; omit one"
            )
        if self.negative_prompt is not None and self.autoguidance:
            raise ValueError(
                f"negative_prompt is {self.negative_prompt!r} and autoguidance is "
                f"{self.autoguidance}; both set u: omit one"
            )
        low, high = self.guidance_interval
        if not 0 <= low <= high <= 1:
            raise ValueError(
                f"guidance_interval is [{low:g}, {high:g}]; it must rise within [0, 1]"
            )
        if not 0 <= self.guidance_rescale <= 1:
            raise ValueError(
                f"guidance_rescale is {self.guidance_rescale:g}; it must lie in [0, 1]"
            )
        if self.grid_shift is not None and self.grid != "shifted":
            raise ValueError(
                f"grid_shift is {self.grid_shift} and grid is {self.grid}; "
                "omit grid_shift, or set grid to shifted"
            )
        if self.grid_shift is None and self.grid == "shifted":
            raise ValueError(
                "grid is shifted, but grid_shift is not given; set it, for example to 3"
            )

    def find_guidance_changes(self) -> dict[str, Any]:
        """Return the options, by name, that change how guidance acts, if they are given."""
        changes: dict[str, Any] = {}
        if tuple(self.guidance_interval) != (0.0, 1.0):
            changes["guidance_interval"] = list(self.guidance_interval)
        if self.guidance_rescale:
            changes["guidance_rescale"] = self.guidance_rescale
        if self.autoguidance:
            changes["autoguidance"] = str(self.autoguidance)
        if self.negative_prompt is not None:
            changes["negative_prompt"] = self.negative_prompt
        return changes


DEFAULT_SAMPLING = SamplingOptions()
