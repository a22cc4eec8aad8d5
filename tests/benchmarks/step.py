"""A training step under Lightning with our callbacks, against a bare loop with the same network, data and draws.

    python -m tests.benchmarks.step

Single steps take turns within one run: Trainer, bare, bare again (the control, which must read 1.00). Prints the median of
bare / Trainer with its 95 % interval (bootstrap over steps), and what the EMA of three profiles costs. Not a CI check.
"""

import copy
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from data.batch import Steps
from data.images import Images, pack
from deploy.fit import fit
from trainer.callbacks.ema import EMA
from trainer.draws import Draws
from trainer.module import coupled

WARM = 20  # steps that are not counted
FOUND: dict[str, list[float]] = {}


class Bare:
    """A loop that only reads, draws and steps, on a copy of the network."""

    def __init__(self, module: LightningModule, path: str, batch: int):
        self.denoiser, self.objective = copy.deepcopy(module.denoiser), module.objective
        self.optimizer = torch.optim.AdamW(self.denoiser.parameters(), lr=1e-4)
        self.batches = iter(Steps(Images(path), batch, 0))

    def step(self) -> None:
        """Make one step."""
        batch = next(self.batches)
        draws = Draws(batch)
        self.optimizer.zero_grad()
        self.objective(self.denoiser, batch.x, coupled(batch, draws, batch.x), None, draws).backward()
        torch.nn.utils.clip_grad_norm_(self.denoiser.parameters(), 1.0)
        self.optimizer.step()


class Turns(Callback):
    """Makes a step of two bare loops after each step of the Trainer, and times all three; and the EMA, apart."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy the network."""
        stream = trainer.datamodule
        self.bare, self.control = (Bare(pl_module, stream.source.path, stream.batch) for _ in range(2))
        FOUND.update({name: [] for name in ("trainer", "bare", "control", "ema")})
        self.since = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """The Trainer's step ends here; it comes last of all callbacks, but for saving."""
        FOUND["trainer"].append(time.perf_counter() - self.since)
        sides = {"bare": self.bare.step, "control": self.control.step}
        for name in sorted(sides, reverse=trainer.global_step % 2 == 0):
            self._time(name, sides[name])
        self.since = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Time the averages apart: they would leave a colder cache to whatever comes next. Bare steps between them."""
        ema = EMA(0.999, [0.05, 0.1])
        ema.on_train_start(trainer, pl_module)
        for _ in FOUND["bare"]:
            ema.step = trainer.global_step - 1  # as if a step had been made
            self._time("ema", lambda: ema.on_train_batch_end(trainer, pl_module))

    def _time(self, name: str, work) -> None:
        began = time.perf_counter()
        work()
        FOUND[name].append(time.perf_counter() - began)


def config(folder: Path, width: int, depth: int, batch: int, steps: int) -> dict:
    """Return a run on the digits' pixels."""
    net = {"class_path": "DiT", "init_args": {"size": 32, "channels": 1, "patch": 4, "width": width, "depth": depth}}
    denoiser = {"net": net, "interpolant": "Linear", "prediction": "Velocity"}
    return {
        "out": str(folder / f"run-{batch}"),
        "model": {"class_path": "Generator", "init_args": {"denoiser": {"class_path": "Denoiser", "init_args": denoiser}}},
        "data": {"source": {"class_path": "Images", "init_args": {"path": str(folder / "digits/train")}}, "batch": batch},
        "optimizer": {"class_path": "AdamW", "init_args": {"lr": 1e-4}},
        "trainer": {
            "max_steps": steps,
            "accelerator": "cpu",
            "gradient_clip_val": 1.0,
            "callbacks": [{"class_path": "tests.benchmarks.step.Turns"}],
        },
        "checkpoints": {"every": 10**9},
    }


def ratio(over: list[float], under: list[float]) -> str:
    """Return the median of paired ratios and its bootstrapped interval."""
    ratios = np.array(over[WARM:]) / np.array(under[WARM:])
    draws = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return f"{np.median(ratios):.3f} [{low:.3f}, {high:.3f}]"


def main() -> None:
    """Print the table for steps of about 10 and 80 ms."""
    from tests.benchmarks import step  # as the configuration names it: not `__main__`

    torch.set_num_threads(1)  # one core for the step leaves the other to the machine
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pack(folder / "digits")
        for width, depth, batch, steps in ((64, 1, 10, 1000), (64, 4, 42, 400)):
            path = folder / "run.yaml"
            path.write_text(yaml.safe_dump(config(folder, width, depth, batch, steps)))
            fit(["--config", str(path)])
            bare, control, ema = (step.FOUND[name] for name in ("bare", "control", "ema"))
            lines = {"bare / Trainer": step.FOUND["trainer"], "bare / bare": control}
            text = [f"{label} {ratio(bare, under)}" for label, under in lines.items()]
            print(f"{1000 * np.median(bare[WARM:]):.1f} ms a step: {', '.join(text)}, EMA / bare {ratio(ema, bare)}")


if __name__ == "__main__":
    main()
