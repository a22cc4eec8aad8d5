"""A model as it is sampled: guided, on an interpolant, with a sampler on a grid of times."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models import interpolant as interpolants
from models import sampler as samplers
from models.checkpoint import LoadedModel, fingerprint, is_pipeline, load_checkpoint
from models.clipped import Clipped
from models.codec import Codec, describe_codec, find_codec_difference
from models.condition import ClassLabel, Condition
from models.denoiser import Denoiser
from models.description import describe, identity
from models.diffusers.networks import Pretrained
from models.diffusers.scheduler_keys import CONFIG, load_scheduler, read_clipping
from models.diffusers.text import (
    Prompts,
    find_text_difference,
    find_text_encoders,
    with_prompts,
)
from models.guidance import GuidanceConditioned, Guided, with_guidance
from models.interpolant import Discrete, Interpolant
from models.prediction import NoisePrediction
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
        self.fingerprint = fingerprint(self.denoiser)
        self.condition = with_prompts(condition, options.prompts, path)
        self._move(self.denoiser, device)
        if options.dtype != "float32" and isinstance(self.condition, Prompts):
            self.condition.encoder_dtype = getattr(torch, options.dtype)
        if options.negative_prompt is not None:
            self._set_negative(options.negative_prompt)
        # A pipeline's scheduler: its grid, and how it limits estimates of the data
        self.scheduler = None
        self.limit: float | None = None
        if is_pipeline(path):
            self.scheduler = load_scheduler(path / "scheduler", find_text_encoders(path).pipeline)
            self.limit = read_clipping(self.scheduler)
        elif options.grid == "scheduler":
            raise ValueError(
                f"grid is scheduler, but {path} is no pipeline's folder; choose another grid"
            )

        # The weaker network, on the network's interpolant
        self.weaker: Denoiser | None = None
        self.negative: Denoiser | Retimed | None = None
        if options.autoguidance and self.is_guided:
            loaded = load_checkpoint(options.autoguidance)
            check_weaker(options.autoguidance, loaded, self)
            self.weaker = loaded.denoiser
            self.weaker_fingerprint = fingerprint(self.weaker)
            self._move(self.weaker, device)
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

    def guide(self, scale: float | Tensor) -> Guided | GuidanceConditioned | Retimed | Clipped:
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
        result: Guided | GuidanceConditioned | Retimed | Clipped = guided
        if self.interpolant is not self.denoiser.interpolant:
            try:
                result = Retimed(guided, self.interpolant)
            except ValueError as error:
                name = self.options.interpolant
                raise ValueError(f"interpolant {name} for {self.path}: {error}") from None
        if self.limit:
            result = Clipped(result, self.limit)
        return result

    def _move(self, denoiser: Denoiser, device: torch.device) -> None:
        """Move a denoiser to a device, with its network in the precision of the options."""
        if self.options.dtype != "float32":
            denoiser.convert_network(getattr(torch, self.options.dtype))
        denoiser.to(device)

    def _set_negative(self, text: str) -> None:
        """Let the network read a text where it would read none.

        Raises:
            ValueError: it reads no texts.
        """
        net = self.denoiser.net
        if not isinstance(self.condition, Prompts) or not isinstance(net, Pretrained):
            raise ValueError(f"negative_prompt: {self.path} is not conditioned on texts; omit it")
        net.empty_text.copy_(self.condition.encode_negative(text))

    def build_sampler(self, name: AnySampler, steps: int) -> samplers.Sampler:
        """Return a sampler with a number of steps, on the grid of times.

        Raises:
            ValueError: the steps do not fit the grid.
        """
        make = getattr(samplers, name)
        if self.options.grid != "scheduler":
            sampler = make(steps, build_grid(steps, self.options, self.interpolant))
            self._check_first_time(sampler.times[0])
            return sampler
        # the scheduler's own times, timesteps and scales
        from models.diffusers.scheduler_grid import OnScheduler, build_scheduler_grid

        assert self.scheduler is not None
        grid = build_scheduler_grid(self.scheduler, self.denoiser, steps)
        self._check_first_time(grid.times[0])
        denoisers = [self.denoiser]
        if self.weaker and self.negative is self.weaker:
            denoisers.append(self.weaker)
        return OnScheduler(make(len(grid.times) - 1, grid.times), grid, denoisers)

    def _check_first_time(self, t: float) -> None:
        """Check that a pipeline's prediction gives the data at a sampler's first time."""
        if self.scheduler is None or self.interpolant is not self.denoiser.interpolant:
            return
        alpha, _ = self.interpolant(torch.tensor(t))
        if alpha == 0 and isinstance(self.denoiser.prediction, NoisePrediction):
            raise ValueError(
                f"{self.scheduler.folder / CONFIG}: prediction_type is epsilon and "
                "rescale_betas_zero_snr is true: the first state has no data to be found in it; "
                "choose a grid that begins later (`--grid scheduler` with timestep_spacing "
                "leading), or set rescale_betas_zero_snr to false"
            )

    def record_options(self) -> dict[str, Any]:
        """Return the options of sampling that are not the default, as files record them.

        Guidance scale and prompts are recorded by all files, so they are not among them.
        """
        options = self.options
        record: dict[str, Any] = {}
        if self.is_guided:
            record = options.find_guidance_changes()
        if self.weaker:
            record["autoguidance"] = self.weaker_fingerprint
        if options.dtype != "float32":
            record["network_dtype"] = options.dtype
        if options.grid != "uniform":
            record["grid"] = options.grid
        if options.grid_shift is not None:
            record["grid_shift"] = options.grid_shift
        if options.edges:
            record["edges"] = options.edges
        if self.limit:
            record["clip_sample"] = self.limit
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
    check_frozen_parts(where, codec, condition, model, way_out)
    found = describe_condition(condition)
    expected = describe_condition(model.condition)
    if found != expected:
        raise ValueError(f"{where} has {found}, {model.path} has {expected}; {way_out}")
    if model.denoiser.two_time and not weaker.two_time:
        raise ValueError(f"{where} takes no second time, which {model.path} takes; {way_out}")


def check_frozen_parts(
    where: str, codec: Codec, condition: Condition, model: SamplingModel, way_out: str
) -> None:
    """Check that another model has a model's codec, and its text encoders if both read texts.

    Args:
        where: option and path of the other model, for the message.
        codec: the other's.
        condition: the other's.
        model: the model.
        way_out: what to do otherwise, for the message.

    Raises:
        ValueError: they differ.
    """
    difference = find_codec_difference(describe_codec(model.codec), describe_codec(codec))
    if difference:
        raise ValueError(f"{where} has another codec than {model.path} ({difference}); {way_out}")
    part = find_text_difference(model.condition, condition)
    if part:
        raise ValueError(f"{where} has another {part} than {model.path}; {way_out}")


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
