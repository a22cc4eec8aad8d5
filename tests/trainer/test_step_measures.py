"""What a line of metrics.jsonl says beside the loss: gradients, rates, memory, the device's use."""

import time
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

from data import progress
from data.attempts import read_attempts, read_heartbeat
from data.pack import pack
from models.checkpoint import read_checkpoint
from tests.helpers.training import log_lines, small_config, spec, train
from trainer.callbacks import metrics_log
from trainer.engine import step_timer
from trainer.engine.step_timer import StepTimer
from trainer.utilization import FlopCount, find_peak

BATCH = 8
RATE = 0.5  # of SGD


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The configuration of plain gradient descent on 16 tiny images."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(18):
        Image.new("L", (8, 8), 14 * i).save(folder / f"{i:02d}.png")
    pack(folder / "set", folder, size=8, grey=True)
    config = small_config(spec("Images", path=str(folder / "set/train")), batch=BATCH)
    return {
        **config,
        "optimizer": spec("SGD", lr=RATE),
        "metrics": {"every": 1},
        "checkpoints": {"every": 1, "keep": 9},
    }


def weights(run, step):
    """Return all weights after a step, in one tensor."""
    state = read_checkpoint(run / f"checkpoints/step={step:09d}.ckpt")["state_dict"]
    return torch.cat([value.double().flatten() for value in state.values()])


OPTIONS = {
    "plain": (),
    "accumulated": ("--trainer.accumulate_grad_batches", 2),
    "fast": ("--fast_loop", "true"),
    "fast-accumulated": ("--fast_loop", "true", "--trainer.accumulate_grad_batches", 4),
    "skip": ("--loss_guard.skip", 1),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_gradient_norm_is_how_far_gradient_descent_moves(config, tmp_path, options):
    run = train(config, tmp_path / "run", *options, steps=3)
    for line in log_lines(run)[1:]:
        moved = weights(run, line["step"]) - weights(run, line["step"] - 1)
        assert line["gradient_norm"] == pytest.approx(float(moved.norm()) / RATE, rel=1e-4)
        assert line["learning_rate"] == RATE


def test_the_norm_is_that_before_clipping_also_of_weights_of_16_bits(config, tmp_path):
    norms = []
    for name, options in (
        ("plain", ()),
        ("clipped", ("--trainer.gradient_clip_val", 1e-3)),
        ("half", ("--trainer.precision", "bf16-true")),
    ):
        (line,) = log_lines(train(config, tmp_path / name, *options, steps=1))
        norms.append(line["gradient_norm"])
    assert norms[1] == norms[0]
    assert norms[2] == pytest.approx(norms[0], rel=0.02)


def test_the_learning_rate_is_the_one_that_the_step_used(config, tmp_path):
    """Step n of a warm-up has n parts of it; only logged steps are measured."""
    warm_up = spec("WarmUp", warmup=8, decay="constant")
    config = {**config, "lr_scheduler": warm_up, "metrics": {"every": 3}}
    for loop in ("false", "true"):
        run = train(config, tmp_path / loop, "--fast_loop", loop, steps=10)
        lines = log_lines(run)
        assert [line["step"] for line in lines] == [3, 6, 9, 10]
        rates = [line["learning_rate"] / RATE for line in lines]
        assert rates == pytest.approx([3 / 8, 6 / 8, 1, 1])
        assert all(line["gradient_norm"] > 0 for line in lines)


def test_every_line_has_its_time_and_attempt(config, tmp_path, monkeypatch):
    """Also those of validations. The heartbeat has the last values."""
    monkeypatch.setattr(progress, "_latest", None)  # of an earlier test
    began = time.time()
    heldout = spec("Images", path=config["data"]["source"]["init_args"]["path"])
    config = {**config, "data": {**config["data"], "heldout": heldout}}
    validating = ("--trainer.val_check_interval", 2, "--trainer.limit_val_batches", 1)
    run = train(config, tmp_path / "run", *validating, steps=2)
    train(config, tmp_path / "run", *validating, steps=4)
    lines = log_lines(run)
    assert [line["attempt"] for line in lines] == [1, 1, 1, 2, 2, 2]
    assert sum("heldout_loss" in line for line in lines) == 2
    times = [line["time"] for line in lines]
    assert began - 1 < times[0] <= times[-1] < time.time() + 1
    assert times == sorted(times)
    assert {line["world"] for line in lines} == {1}

    training = [line for line in lines if "loss" in line]
    for line in training:
        assert line["samples_per_second"] == line["samples_per_second_per_device"] > 0
        assert 0 <= line["data_wait"] <= 1
        assert line["peak_memory"] > 1e7
        assert "mfu" not in line, "the CPU's peak is not known"
    beat = read_heartbeat(run)
    assert (beat.loss, beat.data_wait) == (training[-1]["loss"], training[-1]["data_wait"])
    assert (beat.attempt, beat.done, beat.total, beat.committed) == (2, 4, 4, 4)
    assert [attempt.committed for attempt in read_attempts(run)] == [0, 2]


class Clock:
    """Stands in for the module `time`."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


def test_a_validation_is_neither_training_nor_waiting(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(step_timer, "time", clock)
    loop = SimpleNamespace(_on_before_fetch=lambda: None, _on_after_fetch=lambda: None)
    timer = StepTimer(loop)

    def make_step(wait, train):
        loop._on_before_fetch()
        clock.now += wait
        loop._on_after_fetch()
        clock.now += train

    make_step(1, 3)
    timer.pause()
    clock.now += 50
    make_step(2, 4)
    assert (timer.seconds(), timer.waited) == (10, 3)
    timer.restart()
    make_step(5, 5)
    assert (timer.seconds(), timer.waited) == (10, 5)


# FLOPs


def test_the_flops_of_a_step_of_a_perceptron_are_its_products():
    """2 per weight and sample forward, 4 backward, but 2 in the first layer: data need none."""
    widths = (3, 16, 32, 5)
    layers = []
    for before, after in zip(widths, widths[1:]):
        layers += [nn.Linear(before, after), nn.SiLU()]
    network = nn.Sequential(*layers)
    with FlopCount() as count:
        network(torch.randn(BATCH, widths[0])).square().mean().backward()
    sizes = [before * after for before, after in zip(widths, widths[1:])]
    assert count.total == BATCH * (6 * sum(sizes) - 2 * sizes[0])


def test_a_compiled_function_stays_compiled_after_a_count():
    calls = []

    def backend(graph, _):
        return lambda *args: calls.append(1) or graph(*args)

    compiled = torch.compile(lambda x: (x @ x).relu(), backend=backend)
    compiled(torch.randn(4, 4))
    with FlopCount() as count:
        compiled(torch.randn(4, 4))
    compiled(torch.randn(4, 4))
    assert (len(calls), count.total) == (3, 2 * 4**3)


def test_mfu_counts_all_micro_batches_and_changes_no_weight(config, tmp_path, monkeypatch):
    plain = train(config, tmp_path / "plain", steps=4)
    flops = []
    for options in ((), ("--trainer.accumulate_grad_batches", 2, "--fast_loop", "true")):
        monkeypatch.setattr(metrics_log, "peak_of", lambda *_: 1e9)
        run = train(config, tmp_path / f"run{len(flops)}", *options, steps=4)
        lines = log_lines(run)
        assert "mfu" not in lines[0], "the second step is counted"
        for line in lines[1:]:
            flops.append(line["mfu"] * 1e9 / line["samples_per_second"])
    assert flops == pytest.approx(flops[:1] * len(flops))
    assert torch.equal(weights(tmp_path / "run0", 4), weights(plain, 4))


@pytest.mark.parametrize(
    ("device", "precision", "matmul", "peak"),
    [
        ("NVIDIA H200", "bf16-mixed", "highest", 989.5e12),
        ("NVIDIA H100 80GB HBM3", "32-true", "high", 494.5e12),
        ("NVIDIA H100 PCIe", "32-true", "highest", 51e12),
        ("NVIDIA A100-SXM4-80GB", "bf16-true", "highest", 312e12),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16-true", "highest", None),
        ("NVIDIA L40", "bf16-true", "highest", None),
        ("NVIDIA GH200 480GB", "bf16-true", "highest", None),
        ("NVIDIA H200", "64-true", "highest", None),
    ],
)
def test_the_peak_is_known_for_devices_of_the_table(device, precision, matmul, peak):
    assert find_peak(device, precision, matmul) == peak
