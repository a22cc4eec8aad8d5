"""Time of a training step under Lightning with our callbacks, relative to a bare loop.

    python -m tests.benchmarks.step

The bare loop has the same network, data and random draws. Within one run, the Trainer, the bare
loop and a second bare loop (the control: its ratio must be 1.00) take turns step by step. Prints
the median of bare / Trainer with its 95 % interval (bootstrap over steps), and the time of an EMA
of three profiles: first of Lightning's own loop, then with `--fast_loop`. Not a CI check.
"""

import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from data.batch import RankBatches
from data.images import Images
from data.pack import pack
from deploy.fit import fit
from tests.helpers.training import spec
from trainer.callbacks.ema import EMA
from trainer.module import couple_noise
from trainer.step_random import StepRandom

WARM_UP = 20  # steps that are not counted
SECONDS: dict[str, list[float]] = {}  # of every step, by the name of what was timed
LOOPS = {"lightning": "false", "fast": "true"}  # name: --fast_loop
RUNS = (  # width, depth, batch, steps: about 10 and 80 ms a step
    (64, 1, 10, 1000),
    (64, 4, 42, 400),
)


class BareLoop:
    """A training loop that only reads, draws and updates, on a copy of the network."""

    def __init__(self, module: LightningModule, path: str, batch: int):
        self.denoiser = copy.deepcopy(module.denoiser)
        self.objective = module.objective
        self.optimizer = torch.optim.AdamW(self.denoiser.parameters(), lr=1e-4)
        self.batches = iter(RankBatches(Images(path), batch, 0))

    def step(self) -> None:
        """Make one step."""
        batch = next(self.batches)
        draws = StepRandom(batch)
        self.optimizer.zero_grad()
        noise = couple_noise(batch, draws, batch.x)
        self.objective(self.denoiser, batch.x, noise, None, draws).total.backward()
        torch.nn.utils.clip_grad_norm_(self.denoiser.parameters(), 1.0)
        self.optimizer.step()


class Turns(Callback):
    """Makes a step of two bare loops after each step of the Trainer, and times all three.

    The EMA is timed apart, at the end.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy the network."""
        data = trainer.datamodule
        self.bare = BareLoop(pl_module, data.source.path, data.batch)
        self.control = BareLoop(pl_module, data.source.path, data.batch)
        SECONDS.update({name: [] for name in ("trainer", "bare", "control", "ema")})
        self.since = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Time the Trainer's step. This callback ends it: only saving comes later."""
        SECONDS["trainer"].append(time.perf_counter() - self.since)
        loops = [("bare", self.bare), ("control", self.control)]
        if trainer.global_step % 2 == 0:
            loops.reverse()
        for name, loop in loops:
            append_seconds(name, loop.step)
        self.since = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Time the EMA apart: it would leave a colder cache to the step that follows it."""
        ema = EMA(0.999, [0.05, 0.1])
        ema.on_train_start(trainer, pl_module)
        for _ in SECONDS["bare"]:
            ema.step = trainer.global_step - 1  # as if a step had been made
            append_seconds("ema", lambda: ema.on_train_batch_end(trainer, pl_module))


def append_seconds(name: str, work: Callable[[], object]) -> None:
    """Time a function."""
    began = time.perf_counter()
    work()
    SECONDS[name].append(time.perf_counter() - began)


def make_config(folder: Path, width: int, depth: int, batch: int, steps: int) -> dict:
    """Return the configuration of a run on the digits' pixels."""
    net = spec("DiT", size=32, channels=1, patch=4, width=width, depth=depth)
    denoiser = spec("Denoiser", net=net, interpolant="Linear", prediction="Velocity")
    source = spec("Images", path=str(folder / "digits/train"))
    return {
        "model": spec("Generator", denoiser=denoiser),
        "data": {"source": source, "batch": batch},
        "optimizer": spec("AdamW", lr=1e-4),
        "trainer": {
            "max_steps": steps,
            "accelerator": "cpu",
            "gradient_clip_val": 1.0,
            "callbacks": [{"class_path": "tests.benchmarks.step.Turns"}],
        },
        "checkpoints": {"every": 10**9},
    }


def format_ratio(over: list[float], under: list[float]) -> str:
    """Return the median of paired ratios with its bootstrapped 95 % interval."""
    ratios = np.array(over[WARM_UP:]) / np.array(under[WARM_UP:])
    resampled = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.quantile(np.median(resampled, axis=1), [0.025, 0.975])
    return f"{np.median(ratios):.3f} [{low:.3f}, {high:.3f}]"


def main() -> None:
    """Train with both loops, and print a line for each run."""
    # The configuration imports this module by its name; run as `__main__`, it exists twice.
    from tests.benchmarks import step

    torch.set_num_threads(1)  # one core for the step leaves the other one to the machine
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pack(folder / "digits")
        for width, depth, batch, steps in RUNS:
            path = folder / "run.yaml"
            config = make_config(folder, width, depth, batch, steps)
            path.write_text(yaml.safe_dump(config))
            for loop, switch in LOOPS.items():
                out = folder / f"{loop}-{batch}"
                fit(["--config", str(path), "--out", str(out), "--fast_loop", switch])
                print_ratios(loop, step.SECONDS)


def print_ratios(loop: str, seconds: dict[str, list[float]]) -> None:
    """Print the ratios of a run with a loop."""
    bare = seconds["bare"]
    milliseconds = 1000 * np.median(bare[WARM_UP:])
    print(
        f"{loop} loop, {milliseconds:.1f} ms a step: "
        f"bare / Trainer {format_ratio(bare, seconds['trainer'])}, "
        f"bare / bare {format_ratio(bare, seconds['control'])}, "
        f"EMA / bare {format_ratio(seconds['ema'], bare)}"
    )


if __name__ == "__main__":
    main()
