"""A model as it is sampled: guided, on an interpolant, with a sampler on a grid of times."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models import interpolant as interpolants
from models import sampler as samplers
from models.checkpoint import LoadedModel, fingerprint, load_checkpoint
from models.codec import KL, Codec
from models.condition import ClassLabel, Condition
from models.denoiser import Denoiser
from models.description import describe, identity
from models.diffusers.text import with_prompts
from models.guidance import GuidanceConditioned, Guided, with_guidance
from models.interpolant import Discrete, Interpolant
from models.retimed import Retimed
from models.windows import Piecewise
from trainer.jobs.options import AnySampler, SamplingOptions

CHAIN_LEVELS = 1000  # of the trailing grid, where the interpolant is no discrete chain


class SamplingModel:
    """A run's model with the options that it is sampled with.

    Guidance is applied to the network on its interpolant, and the result is retimed. So the
    guidance interval is one of noise levels, whatever the interpolant on which one samples.

    Args:
        path: run folder, checkpoint, or the folder of a diffusers pipeline.
        options: guidance, times and interpolant.
        guidance: guidance scale of this model. Where the scales of samples differ, one of them
            that is not 1.
        device: where the model runs.

    Raises:
        ValueError: the weaker network cannot guide this one.
    """

    def __init__(self, path: Path, options: SamplingOptions, guidance: float, device: torch.device):
        self.path = path
        self.options = options
        self.guidance = guidance
        self.denoiser, self.codec, condition = load_checkpoint(path)
        self.denoiser.to(device)
        self.condition = with_prompts(condition, options.prompts, path)

        # The weaker network, on the network's interpolant
        self.weaker: Denoiser | None = None
        self.negative: Denoiser | Retimed | None = None
        if options.autoguidance and self.is_guided:
            loaded = load_checkpoint(options.autoguidance)
            check_weaker(options.autoguidance, loaded, self)
            self.weaker = loaded.denoiser.to(device)
            self.negative = self.weaker
            if identity(self.weaker.interpolant) != identity(self.denoiser.interpolant):
                self.negative = Retimed(self.weaker, self.denoiser.interpolant)

        # The interpolant of the states
        self.interpolant: Interpolant = self.denoiser.interpolant
        if options.interpolant:
            interpolant = getattr(interpolants, options.interpolant)()
            if identity(interpolant) != identity(self.interpolant):
                self.interpolant = interpolant

    @property
    def is_guided(self) -> bool:
        """Whether guidance acts by a second evaluation, neither by an input nor not at all."""
        return self.guidance != 1 and not self.denoiser.reads_guidance

    def guide(self, scale: float | Tensor) -> Guided | GuidanceConditioned | Retimed:
        """Return the denoiser at a guidance scale, on the interpolant of the states.

        Args:
            scale: a number, or one for each sample, (B,).
        """
        if self.is_guided:
            interval = self.options.guidance_interval
            rescale = self.options.guidance_rescale
            guided = with_guidance(self.denoiser, scale, interval, rescale, self.negative)
        else:
            guided = with_guidance(self.denoiser, scale)
        if self.interpolant is self.denoiser.interpolant:
            return guided
        try:
            return Retimed(guided, self.interpolant)
        except ValueError as error:
            name = self.options.interpolant
            raise ValueError(f"interpolant {name} for {self.path}: {error}") from None

    def build_sampler(self, name: AnySampler, steps: int) -> samplers.Sampler:
        """Return a sampler with a number of steps, on the grid of times.

        Raises:
            ValueError: the steps do not fit the grid.
        """
        return getattr(samplers, name)(steps, build_grid(steps, self.options, self.interpolant))

    def record_options(self) -> dict[str, Any]:
        """Return the options of sampling that are not the default, as files record them.

        Guidance scale and prompts are recorded by all files, so they are not among them.
        """
        options = self.options
        record: dict[str, Any] = {}
        if self.is_guided:
            record = options.find_guidance_changes()
        if self.weaker:
            record["autoguidance"] = fingerprint(self.weaker)
        if options.grid != "uniform":
            record["grid"] = options.grid
        if options.grid_shift is not None:
            record["grid_shift"] = options.grid_shift
        if options.edges:
            record["edges"] = options.edges
        if self.interpolant is not self.denoiser.interpolant:
            record["sampling_interpolant"] = describe(self.interpolant)
        return record


def build_grid(
    steps: int, options: SamplingOptions, interpolant: Interpolant
) -> list[float] | None:
    """Return the times of a sampler's steps, or None for its default, equal steps.

    Args:
        steps: number of steps.
        options: grid, grid_shift and edges.
        interpolant: of the states.

    Raises:
        ValueError: the steps do not fit the grid.
    """
    if options.edges:
        return samplers.window_grid(steps, options.edges)
    if options.grid == "karras":
        return samplers.karras(steps, interpolant)
    if options.grid == "lambda":
        return samplers.uniform_lambda(steps, interpolant)
    if options.grid == "trailing":
        levels = CHAIN_LEVELS
        if isinstance(interpolant, Piecewise):
            interpolant = interpolant.interpolant
        if isinstance(interpolant, Discrete):
            levels = len(interpolant.betas)
        return samplers.trailing(steps, levels)
    if options.grid_shift is not None:
        return samplers.shifted(samplers.uniform(steps), options.grid_shift)
    return None


def check_weaker(path: Path, loaded: LoadedModel, model: SamplingModel) -> None:
    """Check that a weaker network can guide a model.

    Args:
        path: of the weaker network.
        loaded: what was loaded from it.
        model: the model.

    Raises:
        ValueError: they differ in shape, codec, condition or inputs.
    """
    weaker, codec, condition = loaded
    where = f"autoguidance: {path}"
    way_out = "give a smaller network or an earlier checkpoint of the same model"
    if weaker.shape != model.denoiser.shape:
        raise ValueError(
            f"{where} was built for {weaker.shape}, {model.path} for {model.denoiser.shape}; "
            f"{way_out}"
        )
    if codec_weights(codec) != codec_weights(model.codec):
        raise ValueError(f"{where} has another codec than {model.path}; {way_out}")
    found = describe_condition(condition)
    expected = describe_condition(model.condition)
    if found != expected:
        raise ValueError(f"{where} has {found}, {model.path} has {expected}; {way_out}")
    if model.denoiser.two_time and not weaker.two_time:
        raise ValueError(f"{where} takes no second time, which {model.path} takes; {way_out}")


def codec_weights(codec: Codec) -> str | None:
    """Return the checksum of a codec's weights, or None for pixels."""
    return codec.weights() if isinstance(codec, KL) else None


def describe_condition(condition: Condition) -> str:
    """Return the kind of a condition, for messages and comparisons."""
    if isinstance(condition, ClassLabel):
        return f"{condition.classes} classes"
    return f"the condition {type(condition).__name__}"


def check_guidance_options(options: SamplingOptions, models: Iterable[SamplingModel]) -> None:
    """Check that options which change guidance act on at least one of the models.

    Raises:
        ValueError: they act on none, so that the user would believe in an effect.
    """
    models = list(models)
    changes = options.find_guidance_changes()
    if not changes or any(model.is_guided for model in models):
        return
    name, value = next(iter(changes.items()))
    for model in models:
        if model.denoiser.reads_guidance:
            raise ValueError(
                f"{name} is {value}, but {model.path} takes the guidance scale as an input, which "
                f"{name} cannot change; omit it"
            )
    raise ValueError(
        f"{name} is {value}, but guidance is 1, which is none; set another guidance, or omit {name}"
    )
