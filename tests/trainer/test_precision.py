"""Precisions of 16 bits: weights are updated, and averaged, in float32."""

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image

from data.pack import pack
from models.checkpoint import newest_checkpoint, read_checkpoint
from tests.helpers.refusals import assert_refused
from tests.helpers.training import fit_words, losses, small_config, spec, train

STEPS = 12
HALF = ("--trainer.precision", "bf16-true")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The configuration of a small run, with steps too small for bfloat16."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(16):
        Image.new("L", (8, 8), 14 * i).save(folder / f"{i:02d}.png")
    pack(folder / "set", folder, size=8, grey=True, holdout=0)
    config = small_config(spec("Images", path=str(folder / "set/train")), lr=1e-6)
    config["trainer"]["callbacks"] = [spec("EMA", decay=0.5)]
    config["trainer"]["gradient_clip_val"] = 1.0
    config["checkpoints"] = {"every": 4, "keep": 9}
    return config


@pytest.fixture(scope="module")
def half(config, tmp_path_factory):
    """The checkpoint of a run in bfloat16."""
    run = train(config, tmp_path_factory.mktemp("half") / "run", *HALF, steps=STEPS)
    return read_checkpoint(newest_checkpoint(run), resume=True)


def test_weights_averages_and_moments_are_float32(half):
    values = [*half["state_dict"].values(), *half["ema"].values()]
    for state in half["optimizer_states"][0]["state"].values():
        values += [state["exp_avg"], state["exp_avg_sq"]]
    assert {value.dtype for value in values} == {torch.float32}


def test_small_steps_are_not_lost(config, half, tmp_path):
    """Each is about 1e-6, which bfloat16 rounds away from weights above 5e-4."""
    full = read_checkpoint(newest_checkpoint(train(config, tmp_path / "run", steps=STEPS)))
    start = read_checkpoint(tmp_path / "run/checkpoints/step=000000004.ckpt")
    for part, name in (("state_dict", "denoiser.net.embed.weight"), ("ema", "net.embed.weight")):
        torch.testing.assert_close(half[part][name], full[part][name], rtol=0, atol=3e-5)
        expected = (full[part][name] - start[part][name]).abs().mean()
        assert expected > 1e-6
        assert (half[part][name] - start[part][name]).abs().mean() > expected / 2


def test_a_resumed_run_equals_an_uninterrupted_one(config, half, tmp_path):
    train(config, tmp_path / "run", *HALF, steps=5)
    run = train(config, tmp_path / "run", *HALF, steps=STEPS)
    resumed = read_checkpoint(newest_checkpoint(run))
    for part in ("state_dict", "ema"):
        for name, value in half[part].items():
            assert torch.equal(value, resumed[part][name]), name


class SpoiledStep(Callback):
    """Makes the gradients of one step not finite."""

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 2:
            for parameter in pl_module.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(torch.nan)


def test_a_step_that_is_not_finite_is_skipped(config, tmp_path):
    callbacks = [*config["trainer"]["callbacks"], spec(f"{__name__}.SpoiledStep")]
    spoiled = {**config, "trainer": {**config["trainer"], "callbacks": callbacks}}
    run = train(spoiled, tmp_path / "run", *HALF, "--loss_guard.skip", "1", steps=4)
    saved = read_checkpoint(newest_checkpoint(run), resume=True)
    moments = saved["optimizer_states"][0]["state"].values()
    assert all(moment["step"] == 3 for moment in moments)
    assert all(value.isfinite().all() for value in saved["state_dict"].values())


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_a_network_for_points_computes_with_16_bits(tmp_path, precision):
    """Its features of the time are float32, and its weights are not."""
    source = spec("Plane", distribution="two_moons")
    points = small_config(source, net=spec("models.nets.mlp.MLP", width=16, depth=1))
    found = []
    for name in (precision, "32-true"):
        words = ("--trainer.precision", name, "--metrics.every", "1")
        found.append(losses(train(points, tmp_path / name, *words, steps=2)))
    assert found[0] == pytest.approx(found[1], rel=1e-2)


@pytest.mark.parametrize(("first", "then"), [("bf16-true", "32-true"), ("32-true", "bf16-true")])
def test_the_precision_may_change_on_resume(config, tmp_path, first, then):
    train(config, tmp_path / "run", "--trainer.precision", first, steps=2)
    before = read_checkpoint(newest_checkpoint(tmp_path / "run"))
    train(config, tmp_path / "run", "--trainer.precision", then, steps=3)
    after = read_checkpoint(newest_checkpoint(tmp_path / "run"))
    for name, value in before["state_dict"].items():
        assert (after["state_dict"][name] - value).abs().max() < 1e-5, name


def test_sharded_weights_of_16_bits_are_refused(config, tmp_path, capfd):
    words = fit_words(config, tmp_path / "run", *HALF, "--trainer.strategy", "fsdp2", steps=1)
    assert_refused(capfd, words, "trainer.precision", "bf16-true", "fsdp2", "bf16-mixed")
