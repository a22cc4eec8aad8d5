"""Training on images of several sizes: networks, validation per bucket, times by resolution."""

import math

import pytest
import torch

from data.batch import RankBatches
from data.datamodule import BucketsInTurn
from data.images import Images
from models.checkpoint import load_checkpoint, read_checkpoint
from models.denoiser import Denoiser
from models.interpolant import Linear, VariancePreserving
from models.nets.dit import DiT, embed_positions
from models.nets.unit_variance import UnitVariance
from models.prediction import Velocity
from tests.distributed.runs import equal
from tests.helpers.bucketed import write_set
from tests.helpers.refusals import assert_refused, refused
from tests.helpers.training import SMALL_DIT, fit_words, log_lines, small_config, spec, train
from trainer.module import couple_noise
from trainer.objectives import Matching
from trainer.objectives.parts.time_distributions import (
    LogitNormal,
    LogNormalSigma,
    ShiftedByResolution,
    ShiftedTimes,
    TimeDistribution,
    Uniform,
)
from trainer.step_random import StepRandom

HELDOUT_SIZES = ((8, 8, 5), (12, 8, 3), (8, 12, 9))
NAMES = ("8x8", "12x8", "8x12")


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    write_set(folder / "train")
    write_set(folder / "heldout", sizes=HELDOUT_SIZES)
    return folder


def bucketed_config(sets, **arguments):
    """Return the configuration of a run of four steps that validates after two and four."""
    content = small_config(spec("Images", path=str(sets / "train")), batch=4, **arguments)
    content["data"]["heldout"] = spec("Images", path=str(sets / "heldout"))
    content["data"]["heldout_batches"] = 2
    content["trainer"] |= {"max_steps": 4, "val_check_interval": 2}
    content["checkpoints"] = {"every": 2, "keep": 9}
    content["metrics"] = {"every": 1}
    return content


def validation_lines(run):
    return [line for line in log_lines(run) if "heldout_loss" in line]


# Training and validation


@pytest.fixture(scope="module")
def whole(sets, tmp_path_factory):
    """A run that was not interrupted."""
    return train(bucketed_config(sets), tmp_path_factory.mktemp("whole") / "run")


def load_last(run):
    return load_checkpoint(run / "checkpoints/step=000000004.ckpt")[0]


def test_a_run_logs_the_loss_of_every_bucket(sets, whole):
    """`heldout_loss` is their mean over samples. All are those of the saved weights."""
    lines = validation_lines(whole)
    assert [line["step"] for line in lines] == [2, 4]
    losses = mean_losses(load_last(whole), sets)
    weights = {name: size[2] / 17 for name, size in zip(NAMES, HELDOUT_SIZES)}
    for name in NAMES:
        assert lines[1][f"heldout_loss/{name}"] == pytest.approx(losses[name], rel=1e-5)
    expected = sum(weights[name] * losses[name] for name in NAMES)
    assert lines[1]["heldout_loss"] == pytest.approx(expected, rel=1e-5)


def mean_losses(denoiser, sets):
    """Return the held-out loss of each bucket."""
    losses = {name: [] for name in NAMES}
    batches = RankBatches(BucketsInTurn(Images(str(sets / "heldout"))), 4, 0, steps=6)
    for batch in batches:
        random = StepRandom(batch)
        eps = couple_noise(batch, random, batch.x)
        with torch.no_grad():
            loss = Matching()(denoiser, batch.x, eps, None, random)
        losses[batch.bucket].append(loss.total.item())
    return {name: sum(values) / len(values) for name, values in losses.items()}


def test_a_resumed_run_has_the_weights_and_losses_of_one_that_was_not_interrupted(
    sets, whole, tmp_path
):
    run = tmp_path / "run"
    train(bucketed_config(sets), run, steps=2)
    train(bucketed_config(sets), run, steps=4)
    assert equal(load_last(run).state_dict(), load_last(whole).state_dict())
    for found, expected in zip(validation_lines(run), validation_lines(whole), strict=True):
        for name in ("heldout_loss", *(f"heldout_loss/{name}" for name in NAMES)):
            assert found[name] == expected[name]


def test_a_set_of_one_size_logs_no_bucket(sets, tmp_path):
    path = write_set(tmp_path / "set", sizes=[(8, 8, 12)], buckets=False)
    content = bucketed_config(sets)
    for name in ("source", "heldout"):
        content["data"][name] = spec("Images", path=path)
    (line, _) = validation_lines(train(content, tmp_path / "run"))
    assert not any(key.startswith("heldout_loss/") for key in line)


def test_a_set_of_one_shape_that_is_no_square_is_accepted(sets, tmp_path):
    path = write_set(tmp_path / "set", sizes=[(12, 8, 12)], buckets=False)
    content = bucketed_config(sets)
    content["data"]["source"] = spec("Images", path=path)
    assert len(validation_lines(train(content, tmp_path / "run"))) == 2


def test_text_features_are_configured_and_recorded(sets, tmp_path):
    text = spec("tests.helpers.bucketed.TextLengths", scale=2.0)
    content = bucketed_config(sets)
    content["data"]["source"]["init_args"]["text"] = text
    run = train(content, tmp_path / "run", steps=2)
    checkpoint = read_checkpoint(run / "checkpoints/step=000000002.ckpt", resume=True)
    assert checkpoint["DataModule"]["text"] == [{"scale": 2.0}]


def test_an_autoencoder_is_trained_on_buckets(sets, tmp_path):
    content = bucketed_config(sets)
    content["model"] = spec("Autoencoder", block_out_channels=[8, 8], norm_num_groups=4)
    (line, _) = validation_lines(train(content, tmp_path / "run"))
    assert line.keys() >= {f"heldout_loss/{name}" for name in NAMES}


# Refusals


def refuse_fit(capfd, content, tmp_path, *named):
    assert_refused(capfd, fit_words(content, tmp_path / "run"), *named)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_batch_larger_than_a_bucket_is_refused(capfd, sets, tmp_path):
    content = bucketed_config(sets)
    content["data"]["batch"] = 14
    refuse_fit(capfd, content, tmp_path, "data.batch", 14, "12x8", 13)


def test_a_network_of_one_size_is_refused(capfd, sets, tmp_path):
    net = spec("models.nets.mlp.MLP", channels=1, size=8)
    refuse_fit(capfd, bucketed_config(sets, net=net), tmp_path, "(1, 8, 12)", "(1, 8, 8)")


def test_a_patch_that_does_not_divide_a_bucket_is_refused(capfd, sets, tmp_path):
    net = spec("DiT", **(SMALL_DIT["init_args"] | {"patch": 8}))
    refuse_fit(capfd, bucketed_config(sets, net=net), tmp_path, "patch", "(1, 8, 12)", 8)


def test_a_square_of_another_size_is_refused(capfd, sets, tmp_path):
    path = write_set(tmp_path / "set", sizes=[(12, 12, 12)], buckets=False)
    content = bucketed_config(sets)
    content["data"]["source"] = spec("Images", path=path)
    refuse_fit(capfd, content, tmp_path, "(1, 12, 12)", "(1, 8, 8)")


def test_a_bucket_that_an_autoencoder_cannot_halve_is_refused(capfd, sets, tmp_path):
    content = bucketed_config(sets)
    content["model"] = spec("Autoencoder", block_out_channels=[8] * 4, norm_num_groups=4)
    refuse_fit(capfd, content, tmp_path, "block_out_channels", "12x8", 8)


def test_evaluation_of_buckets_is_refused(capfd, sets, whole, tmp_path):
    words = ("evaluate", "--run", whole, "--images", sets, "--out", tmp_path / "evaluation")
    assert_refused(capfd, words, sets / "train", *NAMES, "--buckets")
    assert not (sets / "classifier.safetensors").exists()


def test_inversion_of_buckets_is_refused(capfd, whole, tmp_path):
    path = write_set(tmp_path / "latents", "latents")
    words = ("invert", "--teacher", whole, "--latents", path, "--out", tmp_path / "pairs")
    assert_refused(capfd, words, path, *NAMES, "--buckets")
    assert not (tmp_path / "pairs").exists()


def test_likelihood_of_buckets_is_refused(capfd, whole, tmp_path):
    path = write_set(tmp_path / "latents", "latents")
    words = ("likelihood", "--run", whole, "--data", "Latents", "--data.path", path)
    assert_refused(capfd, (*words, "--out", tmp_path / "found.json"), path, *NAMES, "--buckets")


# Networks


def random_dit(**arguments):
    """Return a DiT with random weights: a new one returns zero."""
    torch.manual_seed(0)
    net = DiT(**{"size": 8, "channels": 2, "width": 16, "depth": 2, "heads": 2} | arguments)
    for value in net.parameters():
        torch.nn.init.normal_(value, std=0.2)
    return net


@pytest.mark.parametrize(("size", "patch", "width"), [(8, 2, 64), (32, 2, 384), (28, 4, 32)])
def test_positions_of_squares_are_those_of_diffusers(size, patch, width):
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    side = size // patch
    expected = get_2d_sincos_pos_embed(width, side, base_size=side, output_type="pt").float()
    assert torch.equal(DiT(size, patch=patch, width=width).position, expected)


def test_positions_of_a_larger_grid_contain_those_of_the_square_at_the_centre():
    grid = embed_positions(6, 8, 4, 32).unflatten(0, (6, 8))
    assert torch.equal(grid[1:5, 2:6].flatten(0, 1), embed_positions(4, 4, 4, 32))


@pytest.mark.parametrize("shape", [(8, 8), (6, 10), (10, 6), (12, 12), (2, 14)])
def test_the_output_has_the_shape_of_the_state(shape):
    x = torch.randn(3, 2, *shape)
    assert random_dit()(x, torch.rand(3)).shape == x.shape


def test_height_and_width_are_not_exchanged():
    """A transposed state with transposed positions and patches gives the transposed output."""
    net = random_dit(patch=1)
    x = torch.randn(1, 2, 4, 6)
    t = torch.rand(1)
    tall = net(x.transpose(2, 3), t)
    net._positions[4, 6] = net.positions(6, 4).unflatten(0, (6, 4)).transpose(0, 1).flatten(0, 1)
    torch.testing.assert_close(net(x, t).transpose(2, 3), tall)


def test_positions_follow_the_type_of_the_network():
    net = random_dit()
    net.positions(3, 5)
    net.to(torch.bfloat16)
    assert net.positions(3, 5).dtype == torch.bfloat16
    assert "position" not in net.state_dict()


def test_a_size_first_used_in_inference_can_be_trained_on():
    net = random_dit()
    x = torch.randn(1, 2, 4, 6)
    with torch.inference_mode():
        net(x, torch.rand(1))
    net(x, torch.rand(1)).square().mean().backward()
    assert net.embed.weight.grad.abs().sum() > 0


def test_unit_variance_takes_the_sizes_of_its_net():
    net = random_dit()
    assert UnitVariance(net, Linear(), Velocity()).size_multiple == net.patch


# Times by resolution

U = torch.linspace(0.001, 0.999, 101, dtype=torch.float64)


@pytest.mark.parametrize(("height", "width", "shift"), [(32, 32, 1), (64, 64, 2), (32, 128, 2)])
def test_times_are_shifted_by_the_root_of_the_number_of_latents(height, width, shift):
    """Equation of section 5.3.2 of Esser et al. 2024."""
    found = ShiftedByResolution(LogitNormal()).for_shape((7, 4, height, width)).quantile(U)
    t = LogitNormal().quantile(U)
    ratio = math.sqrt(height * width / 32**2)
    torch.testing.assert_close(found, ratio * t / (1 + (ratio - 1) * t))
    assert ratio == shift


def test_a_shift_of_a_logit_normal_moves_its_mean():
    found = ShiftedTimes(LogitNormal(0.3, 0.8), shift=3.0)
    expected = LogitNormal(0.3 + math.log(3.0), 0.8)
    torch.testing.assert_close(found.quantile(U), expected.quantile(U))
    torch.testing.assert_close(found.density(U), expected.density(U))


def test_the_shift_keeps_what_depends_on_the_interpolant():
    interpolant = VariancePreserving()
    times = ShiftedByResolution(LogNormalSigma(), base_size=4)
    both = times.for_interpolant(interpolant).for_shape((2, 1, 8, 8))
    inner = LogNormalSigma(interpolant=interpolant)
    torch.testing.assert_close(both.quantile(U), ShiftedTimes(inner, 2.0).quantile(U))


@pytest.mark.parametrize("cls", [Uniform, LogitNormal, LogNormalSigma])
def test_other_times_do_not_depend_on_the_shape(cls):
    times: TimeDistribution = cls()
    assert times.for_shape((2, 1, 8, 8)) is times


def test_the_times_of_a_batch_are_those_of_its_shape():
    denoiser = Denoiser(random_dit(), Linear(), Velocity())
    means = {}
    for height, width in ((8, 8), (32, 32)):
        torch.manual_seed(1)
        x = torch.randn(64, 2, height, width)
        loss = Matching(ShiftedByResolution(base_size=8))(denoiser, x, torch.randn_like(x))
        means[height] = loss.per_sample.times.mean().item()
    # Uniform times have the mean 0.5; shifted by 4, 4/3 - 4/9 log 4 = 0.717.
    assert means[8] == pytest.approx(0.5, abs=0.15)
    assert means[32] == pytest.approx(0.717, abs=0.1)


@pytest.mark.parametrize("shift", [0.0, -1.0, math.inf, math.nan])
def test_impossible_shifts_are_refused(shift):
    with refused("ShiftedTimes", "shift", shift):
        ShiftedTimes(shift=shift)


def test_an_impossible_base_size_is_refused():
    with refused("ShiftedByResolution", "base_size", 0):
        ShiftedByResolution(base_size=0)
