"""Options of `collect`, `invert`, `sample` and `evaluate`, on exact denoisers of Gaussians.

A run's network returns the exact velocity: of one Gaussian for each class, and without a class of
their mixture. So each option is compared with a sampler that is called with what it means.
"""

from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from data.files import read_json
from data.latents import latent_sample
from data.noise import guidance_scales, noises
from data.pairs import PairSet
from data.shards import ShardWriter
from models import exact
from models import sampler as samplers
from models.checkpoint import fingerprint
from models.codec import KL
from models.condition import ClassLabel
from models.denoiser import Denoiser
from models.exact import Mixture
from models.guidance import Guided
from models.interpolant import Discrete, EDMPath, Interpolant, Linear, Trigonometric
from models.prediction import Velocity
from models.retimed import Retimed
from models.sampler import (
    DDIM,
    Heun,
    Sampler,
    karras,
    shifted,
    trailing,
    uniform,
    uniform_lambda,
    window_grid,
)
from models.windows import Piecewise
from tests.examples import default_instances, public_samplers
from tests.helpers.commands import run_command, succeed
from tests.helpers.refusals import assert_refused
from tests.helpers.teachers import save_teacher, small_denoiser
from tests.oracle import single
from trainer.jobs.options import (
    AnySampler,
    DeterministicSampler,
    InterpolantName,
    SamplingOptions,
)
from trainer.jobs.run_sampler import tile_images
from trainer.jobs.sampling_model import build_grid

CLASSES = 2
COUNT = 12
STEPS = 6
SHAPE = (1, 4, 4)
MEANS = [-1.0, 1.5]
STDS = [0.4, 0.6]
CHAIN = [0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]


class ExactNet(nn.Module):
    """A network without weights: the exact velocity of Gaussians, or of their mixture.

    Args:
        interpolant: of the states.
        means: mean of each class.
        stds: standard deviation of each class.
    """

    channels, size, _ = SHAPE

    def __init__(self, interpolant: Interpolant, means: list[float], stds: list[float]):
        super().__init__()
        self.interpolant = interpolant
        self.means = means
        self.stds = stds

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        if cond is None:
            weights = [1 / len(self.means)] * len(self.means)
            estimates = Mixture(self.interpolant, self.means, self.stds, weights)(x_t, t)
            return Velocity().target(self.interpolant, *estimates, t)
        y = torch.zeros_like(x_t)
        for label, (mean, std) in enumerate(zip(self.means, self.stds)):
            estimates = single(self.interpolant, mean, std)(x_t, t)
            mask = (cond == label).view(-1, 1, 1, 1)
            y = y.where(~mask, Velocity().target(self.interpolant, *estimates, t))
        return y


@pytest.fixture(scope="module", autouse=True)
def exact_net_in_models():
    """Make ExactNet a class of `models`, so that a checkpoint may name it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ExactNet, "__module__", "models.exact")
        patch.setattr(exact, "ExactNet", ExactNet, raising=False)
        yield


def exact_denoiser(interpolant: Interpolant | None = None, widen: float = 1.0) -> Denoiser:
    """Return the exact denoiser of the classes, or of classes that are wider."""
    interpolant = interpolant or Linear()
    stds = [widen * std for std in STDS]
    return Denoiser(ExactNet(interpolant, MEANS, stds), interpolant, Velocity()).eval()


@pytest.fixture(scope="module")
def runs(tmp_path_factory, exact_net_in_models):
    """Return a folder with the runs of teachers and of weaker teachers."""
    folder = tmp_path_factory.mktemp("runs")
    condition = ClassLabel(CLASSES)
    save_teacher(folder / "teacher", exact_denoiser(), condition)
    save_teacher(folder / "weaker", exact_denoiser(widen=1.5), condition)
    save_teacher(folder / "weaker-chain", exact_denoiser(Discrete(CHAIN), 1.5), condition)
    save_teacher(folder / "chain", exact_denoiser(Discrete(CHAIN)), condition)
    save_teacher(folder / "short", exact_denoiser(EDMPath(1e-4, 2.0)), condition)
    save_teacher(folder / "conditioned", small_denoiser(guidance_embedded=True))
    return folder


class Collected(NamedTuple):
    """A collected pair set."""

    samples: Tensor
    noises: Tensor
    classes: Tensor
    manifest: dict

    @property
    def inputs(self) -> tuple[Tensor, Tensor]:
        """Noises and classes."""
        return self.noises, self.classes


def read_pairs(folder: Path) -> Collected:
    pairs = PairSet(folder)
    samples = torch.stack([pairs[i]["sample"] for i in range(len(pairs))])
    classes = torch.tensor([pairs[i]["condition"] for i in range(len(pairs))])
    return Collected(samples, pairs.noise(np.arange(len(pairs))), classes, pairs.manifest)


@pytest.fixture
def make_pairs(runs, tmp_path):
    """Return a function that collects pairs by the command, with more options."""

    def run(*words: object, teacher: str = "teacher", steps: int = STEPS) -> Collected:
        fixed = ("--pairs", COUNT, "--steps", steps, "--shard", COUNT)
        succeed("collect", "--teacher", runs / teacher, "--out", tmp_path / "pairs", *fixed, *words)
        return read_pairs(tmp_path / "pairs")

    return run


def assert_sampled_by(found: Collected, sampler: Sampler, denoiser) -> None:
    """Assert that pairs are those of a sampler, to the last bit of float16."""
    expected = sampler(denoiser, *found.inputs)
    assert torch.equal(found.samples, expected.half().float())
    assert found.manifest["evaluations"] == COUNT * sampler.nfe(denoiser)


# Times


@pytest.mark.parametrize(
    ("words", "times", "recorded"),
    [
        ("--grid karras", karras(STEPS, Linear()), {"grid": "karras"}),
        ("--grid lambda", uniform_lambda(STEPS, Linear()), {"grid": "lambda"}),
        ("--grid trailing", trailing(STEPS, 1000), {"grid": "trailing"}),
        (
            "--grid shifted --grid_shift 3",
            shifted(uniform(STEPS), 3.0),
            {"grid": "shifted", "grid_shift": 3.0},
        ),
        ("--edges [1,0.3,0]", window_grid(STEPS, [1, 0.3, 0]), {"edges": [1.0, 0.3, 0.0]}),
    ],
    ids=["karras", "lambda", "trailing", "shifted", "edges"],
)
def test_a_grid_is_the_samplers_times(make_pairs, words, times, recorded):
    found = make_pairs(*words.split())
    assert_sampled_by(found, DDIM(STEPS, times), exact_denoiser())
    assert recorded.items() <= found.manifest.items()
    uniform_samples = DDIM(STEPS)(exact_denoiser(), *found.inputs)
    assert not torch.equal(found.samples, uniform_samples.half().float())


def test_the_trailing_grid_in_windows_has_the_levels_of_their_chain():
    options = SamplingOptions(grid="trailing")
    windows = Piecewise(Discrete.linear(100), 4)
    assert build_grid(3, options, windows) == trailing(3, 100)


def test_the_trailing_grid_has_the_levels_of_a_discrete_chain(make_pairs):
    found = make_pairs("--grid", "trailing", teacher="chain", steps=3)
    times = [1.0, 0.7, 0.3, 0.0]
    assert_sampled_by(found, DDIM(3, times), exact_denoiser(Discrete(CHAIN)))


def test_the_grid_is_of_the_interpolant_that_one_samples_on(make_pairs):
    found = make_pairs("--grid", "karras", "--interpolant", "Trigonometric")
    times = karras(STEPS, Trigonometric())
    assert_sampled_by(found, DDIM(STEPS, times), Retimed(exact_denoiser(), Trigonometric()))


# Guidance


def test_a_scale_is_guidance_past_the_mixture(make_pairs):
    found = make_pairs("--guidance", 2)
    assert_sampled_by(found, DDIM(STEPS), Guided(exact_denoiser(), 2.0))
    assert found.manifest["evaluations"] == COUNT * 2 * STEPS


def test_an_interval_limits_guidance_and_its_cost(make_pairs):
    found = make_pairs("--guidance", 2, "--guidance_interval", "[0.3,0.7]")
    assert_sampled_by(found, DDIM(STEPS), Guided(exact_denoiser(), 2.0, 0.3, 0.7))
    inside = 3  # t = 4/6, 3/6, 2/6
    assert found.manifest["evaluations"] == COUNT * (STEPS + inside)
    assert found.manifest["guidance_interval"] == [0.3, 0.7]


def test_an_interval_limits_a_scale_of_each_pair(make_pairs):
    words = ("--guidance_max", 4, "--guidance_interval", "[0.3,0.7]")
    found = make_pairs(*words, "--seed", 5)
    scales = guidance_scales(5, range(COUNT), 1.0, 4.0)
    expected = DDIM(STEPS)(Guided(exact_denoiser(), scales, 0.3, 0.7), *found.inputs)
    assert torch.equal(found.samples, expected.half().float())
    assert found.manifest["evaluations"] == COUNT * (STEPS + 3)


def test_rescaled_guidance_has_the_deviation_of_none(make_pairs, runs, tmp_path):
    """One step: the samples are the estimates of the data, but for the noise at t = 0."""
    found = make_pairs("--guidance", 3, "--guidance_rescale", 1, teacher="short", steps=1)
    denoiser = exact_denoiser(EDMPath(1e-4, 2.0))
    assert_sampled_by(found, DDIM(1), Guided(denoiser, 3.0, rescale=1.0))
    assert found.manifest["guidance_rescale"] == 1.0

    def deviations(samples: Tensor) -> Tensor:
        return samples.flatten(1).std(1)

    plain = deviations(DDIM(1)(denoiser, *found.inputs))
    guided = deviations(DDIM(1)(Guided(denoiser, 3.0), *found.inputs))
    assert (guided / plain - 1).abs().mean() > 0.3
    torch.testing.assert_close(deviations(found.samples), plain, rtol=0, atol=2e-3)  # float16


def test_autoguidance_is_guidance_past_the_weaker_run(make_pairs, runs):
    found = make_pairs("--guidance", 2, "--autoguidance", runs / "weaker")
    weaker = exact_denoiser(widen=1.5)
    assert_sampled_by(found, DDIM(STEPS), Guided(exact_denoiser(), 2.0, negative=weaker))
    assert found.manifest["autoguidance"] == fingerprint(weaker)
    assert found.manifest["evaluations"] == COUNT * 2 * STEPS


def test_a_weaker_run_on_another_interpolant_is_retimed(make_pairs, runs):
    words = ("--guidance", 2, "--autoguidance", runs / "weaker-chain")
    found = make_pairs(*words, "--grid", "shifted", "--grid_shift", "0.9")
    negative = Retimed(exact_denoiser(Discrete(CHAIN), 1.5), Linear())
    guided = Guided(exact_denoiser(), 2.0, negative=negative)
    assert_sampled_by(found, DDIM(STEPS, shifted(uniform(STEPS), 0.9)), guided)


# Interpolant


def test_another_interpolant_is_sampled_on_by_retiming(make_pairs):
    found = make_pairs("--interpolant", "Trigonometric", "--sampler", "Heun")
    assert_sampled_by(found, Heun(STEPS), Retimed(exact_denoiser(), Trigonometric()))
    assert found.manifest["sampling_interpolant"]["class_path"].endswith(".Trigonometric")
    assert found.manifest["interpolant"]["class_path"].endswith(".Linear")


def test_in_small_steps_another_interpolant_gives_the_samples_of_the_exact_flow(make_pairs):
    found = make_pairs("--interpolant", "Trigonometric", "--sampler", "RungeKutta4", steps=200)
    mean, std = (torch.tensor(values)[found.classes] for values in (MEANS, STDS))
    expected = mean.view(-1, 1, 1, 1) + std.view(-1, 1, 1, 1) * found.noises  # the exact flow
    torch.testing.assert_close(found.samples, expected, rtol=0, atol=5e-3)


def test_an_interval_is_in_times_of_the_network_on_any_interpolant(make_pairs):
    words = ("--guidance", 2, "--guidance_interval", "[0.3,0.7]")
    found = make_pairs(*words, "--interpolant", "Trigonometric")
    guided = Guided(exact_denoiser(), 2.0, 0.3, 0.7)
    assert_sampled_by(found, DDIM(STEPS), Retimed(guided, Trigonometric()))


def test_the_networks_interpolant_changes_nothing(make_pairs):
    found = make_pairs("--interpolant", "Linear")
    assert_sampled_by(found, DDIM(STEPS), exact_denoiser())
    assert "sampling_interpolant" not in found.manifest


# Records


def test_defaults_are_not_recorded(make_pairs):
    manifest = make_pairs("--grid", "uniform", "--guidance_interval", "[0,1]").manifest
    options = {"guidance_interval", "guidance_rescale", "autoguidance", "grid", "grid_shift"}
    assert not (options | {"edges", "sampling_interpolant"}) & manifest.keys()


def test_a_set_is_not_resumed_with_another_grid(make_pairs, runs, tmp_path, capfd):
    make_pairs()
    fixed = ("--pairs", COUNT, "--steps", STEPS, "--shard", COUNT, "--out", tmp_path / "pairs")
    words = ("collect", "--teacher", runs / "teacher", *fixed, "--grid", "karras")
    assert_refused(capfd, words, tmp_path / "pairs", "grid", "karras")


# The other verbs


@pytest.fixture
def latents(tmp_path):
    """Return a set of latents of both classes."""
    classes = {"classes": ["a", "b"]}
    writer = ShardWriter(tmp_path / "latents", "latents", classes, COUNT, COUNT)
    values = noises(9, range(COUNT), SHAPE)
    writer.write(0, [latent_sample(f"{i:09d}", x, i % 2) for i, x in enumerate(values)])
    assert writer.finish(shape=list(SHAPE))
    return tmp_path / "latents"


def test_inversion_takes_the_same_steps_backwards(runs, latents, tmp_path):
    words = ("--grid", "karras", "--guidance", 2, "--guidance_interval", "[0.3,0.7]")
    inputs = ("--teacher", runs / "teacher", "--latents", latents, "--out", tmp_path / "inverted")
    succeed("invert", *inputs, "--steps", STEPS, *words)
    found = read_pairs(tmp_path / "inverted")
    sampler = DDIM(STEPS, karras(STEPS, Linear()))
    guided = Guided(exact_denoiser(), 2.0, 0.3, 0.7)
    expected = sampler.invert(guided, found.samples, found.classes)
    assert torch.equal(found.noises, expected)
    assert found.manifest["evaluations"] == COUNT * sampler.nfe(guided)
    assert found.manifest["grid"] == "karras"


def test_images_are_sampled_with_the_same_options(runs, tmp_path):
    words = ("--grid", "karras", "--guidance", 2, "--autoguidance", runs / "weaker")
    out = tmp_path / "x.png"
    inputs = ("--run", runs / "teacher", "--out", out, "--count", COUNT, "--columns", 4)
    succeed("sample", *inputs, "--steps", STEPS, *words)
    guided = Guided(exact_denoiser(), 2.0, negative=exact_denoiser(widen=1.5))
    eps = noises(3, range(COUNT), SHAPE)
    x = DDIM(STEPS, karras(STEPS, Linear()))(guided, eps, torch.arange(COUNT) % CLASSES)
    expected = tile_images(x.clamp(-1, 1), 4)
    assert Image.open(out).tobytes() == expected.tobytes()


@pytest.fixture
def measured(workspace, monkeypatch, tmp_path):
    """Return the evaluation of the demo's student and teacher, with options."""
    monkeypatch.chdir(workspace.path)
    inputs = ("--run", "runs/demo/student", "--images", "runs/demo/images", "--out", tmp_path)
    teacher = ("--teacher", "runs/demo/teacher", "--teacher_guidance", 2)
    options = ("--guidance_interval", "[0,0.5]", "--grid", "shifted", "--grid_shift", 1)
    succeed("evaluate", *inputs, *teacher, *options, "--steps", "[1,4]", "--samples", 100)
    return read_json(tmp_path / "evaluation.json")


def test_an_evaluation_applies_the_options_to_run_and_teacher(measured):
    """Guidance acts on the teacher alone, so its interval does, too."""
    assert measured["steps"]["4"]["nfe"] == 4
    assert measured["teacher"]["nfe"] == 4 + 2  # t = 1/2, 1/4
    settings = measured["settings"]
    assert settings["guidance_interval"] == [0.0, 0.5]
    assert settings["grid"] == "shifted"
    assert settings["grid_shift"] == 1.0
    assert "guidance_rescale" not in settings


# Names of classes


def test_every_sampler_has_a_name():
    names = {cls.__name__ for cls in public_samplers()}
    assert set(get_args(AnySampler)) == names - {"DormandPrince"}  # whose steps are adaptive
    for name in get_args(DeterministicSampler):
        assert not getattr(samplers, name).is_stochastic


def test_every_interpolant_without_arguments_has_a_name():
    found = {type(instance).__name__ for instance in default_instances(Interpolant)}
    assert set(get_args(InterpolantName)) == found


# Refusals


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--edges [1,0.5,0] --grid karras", ("edges", "[1.0, 0.5, 0.0]", "grid", "karras")),
        (
            "--edges [1,0.5,0] --interpolant VariancePreserving",
            ("edges", "[1.0, 0.5, 0.0]", "interpolant", "VariancePreserving"),
        ),
        ("--grid_shift 3", ("grid_shift", "3.0", "uniform", "shifted")),
        ("--grid shifted", ("shifted", "grid_shift")),
        ("--grid shifted --grid_shift 0", ("shift", "0.0")),
        ("--grid trailing --steps 1001", ("trailing", "1001", "1000")),
        ("--grid karas", ("grid", "karas", "karras")),
        ("--guidance_interval [0.2,0.7]", ("guidance_interval", "[0.2, 0.7]", "guidance is 1")),
        ("--guidance_rescale 0.5", ("guidance_rescale", "0.5", "guidance is 1")),
        ("--autoguidance {runs}/weaker", ("autoguidance", "{runs}/weaker", "guidance is 1")),
        ("--guidance 2 --guidance_interval [0.7,0.2]", ("guidance_interval", "[0.7, 0.2]")),
        ("--guidance 2 --guidance_interval [0.7]", ("guidance_interval", "[0.7]")),
        ("--guidance 2 --guidance_rescale 2", ("guidance_rescale", "2", "[0, 1]")),
        ("--guidance 2 --autoguidance {runs}/nowhere", ("{runs}/nowhere",)),
        (
            "--guidance 2 --autoguidance {runs}/conditioned",
            ("autoguidance", "{runs}/conditioned", "(2, 4, 4)", "{runs}/teacher", "(1, 4, 4)"),
        ),
        ("--interpolant Linaer", ("interpolant", "Linaer", "Linear")),
        (
            "--interpolant EDMPath --teacher {runs}/short",
            ("interpolant", "{runs}/short", "EDMPath", "80.0"),
        ),
        (
            "--guidance 2 --guidance_interval [0,0.5] --teacher {runs}/conditioned",
            ("guidance_interval", "[0.0, 0.5]", "{runs}/conditioned", "guidance scale"),
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(runs, tmp_path, capfd, words, named):
    command = ["collect", "--teacher", runs / "teacher", "--out", tmp_path / "pairs"]
    command += words.format(runs=runs).split()
    assert_refused(capfd, tuple(command), *(name.format(runs=runs) for name in named))
    assert not (tmp_path / "pairs").exists()


def test_a_weaker_run_with_other_classes_is_refused(runs, tmp_path, capfd):
    save_teacher(tmp_path / "three", exact_denoiser(), ClassLabel(3))
    words = ("--guidance", 2, "--autoguidance", tmp_path / "three", "--out", tmp_path / "x.png")
    command = ("sample", "--run", runs / "teacher", *words)
    assert_refused(capfd, command, "autoguidance", tmp_path / "three", "3 classes", "2 classes")


def test_a_weaker_run_in_other_latents_is_refused(runs, tmp_path, capfd):
    AutoencoderKL(in_channels=1, out_channels=1, latent_channels=1).save_pretrained(tmp_path)
    run = save_teacher(tmp_path / "run", exact_denoiser(), ClassLabel(2), KL(str(tmp_path)))
    words = ("--guidance", 2, "--autoguidance", run, "--out", tmp_path / "x.png")
    assert_refused(
        capfd, ("sample", "--run", runs / "teacher", *words), "autoguidance", run, "codec"
    )
    words = ("--images", tmp_path, "--teacher", run, "--out", tmp_path / "evaluation")
    assert_refused(capfd, ("evaluate", "--run", runs / "teacher", *words), "teacher", run, "codec")


def test_the_options_have_the_same_names_in_every_verb(capsys):
    for verb in ("collect", "invert", "sample", "evaluate"):
        assert run_command(verb, "--help") == 0
        text = capsys.readouterr().out
        for name in ("guidance_interval", "grid_shift", "autoguidance", "interpolant", "edges"):
            assert f"--{name} " in text
