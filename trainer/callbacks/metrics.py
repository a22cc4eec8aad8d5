"""What a run tells: metrics.jsonl, always, and a progress line with rate and time left."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from data.files import atomic, naming
from data.form import COUNT, conform
from data.progress import Meter
from models.denoiser import Denoiser


class Metrics(Callback):
    """Appends {"step", "seconds", "loss", ...}, all that a training step returns, to RUN/metrics.jsonl, and tells the logger.

    A resumed run cuts the file back to where it goes on. Lightning's own `log` would cost half a millisecond in every step.

    Beside the mean loss stand `loss_t0`, `loss_t1`, ...: those of the samples whose t fell into each of equal parts of [0, 1]; a
    part in which none fell is left out. `evaluations` counts what training has cost so far: forward passes of denoisers, one
    sample each, on all ranks and across restarts, of the student, its teachers and whatever else an objective asks; not those of
    validation.

    Args:
        every: optimizer steps between lines.
        bins: parts of [0, 1] in which the loss is told apart; 0 for none.
    """

    def __init__(self, every: int = 20, bins: int = 4):
        if every < 1:
            raise ValueError(f"Metrics: every is {every}, it must be at least 1")
        if bins < 0:
            raise ValueError(f"Metrics: bins is {bins}, it must be at least 1, or 0 for none")
        self.every, self.bins, self.step = every, bins, -1
        self.parts: list[dict[str, Tensor]] = []  # what the micro-batches of this step returned
        self.seen: list[tuple[Tensor, Tensor]] = []  # times and errors of their samples, where the objective keeps them
        self.earlier: int | None = 0  # evaluations up to the checkpoint; None where an older version did not count them
        self.mark = 0  # `Denoiser.spent` when last looked at
        self.pending = self.spent = 0  # evaluations of this rank since it began: of the step at hand, of whole steps

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop lines of steps that will be made again, and start the progress meter."""
        self.step, self.began = trainer.global_step, time.monotonic()
        self.mark, self.pending, self.spent = Denoiser.spent, 0, 0
        self.path = Path(trainer.default_root_dir) / "metrics.jsonl"
        name = self.path.parent.name
        self.meter = Meter(f"fit {name}", trainer.max_steps, "steps", self.step, trainer.is_global_zero).__enter__()
        if trainer.is_global_zero and self.path.exists():
            with atomic(self.path) as file:
                file.writelines(line + b"\n" for line, values in read_log(self.path) if values["step"] <= self.step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        """Count the step, and write a line when one is due: means over the global batch, of all ranks and parts."""
        self.parts.append(outputs)
        self._look()
        if seen := getattr(getattr(pl_module, "objective", None), "seen", None):
            self.seen.append(seen)
        if (step := trainer.global_step) == self.step:
            return  # gradients are still accumulating
        self.meter.add(step - self.step)
        self.step, parts, self.parts = step, self.parts, []
        seen, self.seen = self.seen, []
        self.spent, self.pending = self.spent + self.pending, 0  # whole steps only: a part of one would be made again
        if self.step % self.every and self.step != trainer.max_steps:
            return
        means = {name: torch.stack([part[name].detach() for part in parts]).mean() for name in parts[0]}
        means["loss"] *= len(parts)  # which Lightning has divided by their number
        values = {name: trainer.strategy.reduce(value, reduce_op="mean").item() for name, value in means.items()}
        if seen and self.bins:
            values |= by_time(seen, self.bins, lambda sums: trainer.strategy.reduce(sums, reduce_op="sum"))
        if evaluations := self._total(trainer):
            values["evaluations"] = evaluations
        self._write(trainer, values)
        self.meter.add(0, f"loss {values['loss']:.4f}")

    def _look(self) -> None:
        """Count what was evaluated since the last look."""
        self.pending, self.mark = self.pending + Denoiser.spent - self.mark, Denoiser.spent

    def _total(self, trainer: Trainer) -> int | None:
        """Return the evaluations of all ranks up to this step; None where they were not counted from the start."""
        mine = torch.tensor(self.spent, device=trainer.strategy.root_device)
        total = int(trainer.strategy.reduce(mine, reduce_op="sum"))
        return None if self.earlier is None else self.earlier + total

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the count."""
        checkpoint["evaluations"] = self._total(trainer)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go on counting."""
        self.earlier = checkpoint.get("evaluations")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What is evaluated from here on is not training."""
        self._look()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write a line of its own: all that was logged."""
        self.mark = Denoiser.spent
        if trainer.sanity_checking:
            return
        self._write(trainer, {name: value.item() for name, value in trainer.callback_metrics.items()})

    def _write(self, trainer: Trainer, values: dict[str, float]) -> None:
        if trainer.logger:
            trainer.logger.log_metrics(values, trainer.global_step)
        if trainer.is_global_zero:
            seconds = round(time.monotonic() - self.began, 3)
            with self.path.open("a") as file:
                file.write(json.dumps({"step": trainer.global_step, "seconds": seconds, **values}) + "\n")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the meter, also after an error."""
        if meter := self.__dict__.pop("meter", None):
            meter.__exit__()


def by_time(seen: list[tuple[Tensor, Tensor]], bins: int, total: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """Return the mean error of each bin of [0, 1] that is not empty, named loss_t0 and so on.

    Args:
        seen: times and errors of samples, (B,) each.
        bins: equal parts of [0, 1].
        total: sums a tensor over the ranks; samples are counted, so that a rank without any in a bin does no harm.
    """
    times, errors = (torch.cat(parts) for parts in zip(*seen))
    place = (times * bins).long().clamp(0, bins - 1)
    ours = torch.stack([errors.float(), torch.ones_like(errors, dtype=torch.float32)])
    sums, counts = total(torch.zeros_like(ours[:, :1]).repeat(1, bins).index_add(1, place, ours)).tolist()
    return {f"loss_t{i}": sums[i] / counts[i] for i in range(bins) if counts[i]}


def read_log(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Return the lines of a log, and what they say; the last one may be torn by a kill, and is then left out."""
    lines = path.read_bytes().split(b"\n")[:-1]
    with naming(path):
        log = [(line, json.loads(line)) for line in lines]
    for number, (_, values) in enumerate(log, 1):
        conform(values, {"step": COUNT, "heldout_loss" if "heldout_loss" in values else "loss": float}, f"{path}: line {number}")
    return log
