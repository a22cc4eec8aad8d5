"""The log of a run: metrics.jsonl, and progress with rate and time left."""

import json
import math
import os
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from data.attempts import peak_memory, recorded_number, set_hosts
from data.batch import Batch
from data.files import atomic_file, set_aside
from data.progress import Meter, print_message
from trainer.callbacks.checkpoint import Checkpoints, find_run_id
from trainer.callbacks.keep_config import KeepConfig
from trainer.engine.fsdp import to_local
from trainer.engine.step_timer import StepTimer
from trainer.engine.trainer_parts import find_callback
from trainer.run_log import read_log
from trainer.step_outputs import PerSample, StepOutputs
from trainer.utilization import FlopCount, peak_of


class MetricsLog(Callback):
    """Appends lines of {"step", "seconds", "loss", ...} to RUN/metrics.jsonl and to the loggers.

    A line has the loss and its parts by name, averaged over the global batch; a part that a step
    does not have is left out. A resumed run first removes the lines after the step that it resumes
    from. Lightning's `log` is not used: it takes half a millisecond in every step.

    `loss_t0`, `loss_t1`, ... are the mean losses of the samples whose t lies in each of equal parts
    of [0, 1]; a part without samples is left out.

    `evaluations` is what training has cost so far: forward passes of denoisers, one per sample, on
    all ranks and across restarts. It includes the passes of the student, its teachers and anything
    else that an objective evaluates, but not those of validations.

    `samples_per_second`, `data_wait` (the part of the time that training waited for batches) and
    `mfu` are those since the last line, without validations. `learning_rate` is the first parameter
    group's in this step, `gradient_norm` that of all gradients before they are clipped.

    Args:
        every: optimizer steps between lines.
        bins: parts of [0, 1] with a loss each; 0 for none.
    """

    def __init__(self, every: int = 20, bins: int = 4):
        if every < 1:
            raise ValueError(f"MetricsLog: every is {every}; it must be at least 1")
        if bins < 0:
            raise ValueError(f"MetricsLog: bins is {bins}; it must be at least 1, or 0 for none")
        self.every = every
        self.bins = bins
        self.step = -1

        # What the training step returned for the micro-batches of this step.
        self.outputs: list[StepOutputs] = []

        # Evaluations up to the checkpoint that was loaded; None if it has no count.
        self.loaded_evaluations: int | None = 0
        # Evaluations of this rank since then, in finished steps.
        self.evaluations = 0

        # Of the step that is logged next.
        self.learning_rate = 0.0
        self.squared_norm: Tensor | None = None  # of this rank's gradients

        # FLOPs of this rank in a step: while they are counted, and then.
        self.flop_count: FlopCount | None = None
        self.flops = 0

        self.open_meter = ExitStack()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove lines of steps that will be repeated, and start the progress meter."""
        # Record the hosts of all ranks.
        if dist.is_initialized():
            hosts = [""] * trainer.world_size
            dist.all_gather_object(hosts, os.uname().nodename)
            set_hosts(hosts)

        # Start counting.
        self.step = trainer.global_step
        self.began = time.monotonic()
        self.evaluations = 0
        self.logged_step = self.step
        self.timer = StepTimer(trainer.fit_loop.epoch_loop)
        self.peak = peak_of(trainer.strategy.root_device, trainer.precision)
        self.counted_step = self.step + 1  # the first one compiles

        # Start the meter.
        self.path = Path(trainer.default_root_dir) / "metrics.jsonl"
        self.attempt = recorded_number(self.path.parent)
        name = f"fit {self.path.parent.name}"
        meter = Meter(name, trainer.max_steps, "steps", self.step, trainer.is_global_zero)
        self.meter = self.open_meter.enter_context(meter)

        # Give the loggers the configuration.
        kept = find_callback(trainer, KeepConfig)
        if kept and trainer.loggers:
            config = yaml.safe_load(kept.origin["config"])
            for logger in trainer.loggers:
                logger.log_hyperparams(config)

        # Remove the lines.
        self.run_id = find_run_id(trainer)
        if trainer.is_global_zero and self.path.exists():
            checkpoints = find_callback(trainer, Checkpoints)
            self._remove_later_lines(checkpoints.every if checkpoints else trainer.max_steps)

    def _remove_later_lines(self, every: int) -> None:
        """Remove the lines of steps that will be repeated; keep another run's log under a new name.

        Args:
            every: steps between checkpoints.
        """
        log = read_log(self.path)
        is_foreign = any(values.get("run", self.run_id) != self.run_id for _, values in log)
        # The run had checkpoints, which were deleted (the first may not have been complete).
        is_lost = self.step == 0 and any(values["step"] > 2 * every for _, values in log)
        if is_foreign or is_lost:
            moved = set_aside(self.path)
            print_message(f"fit: {self.path}: the log of another run, renamed to {moved.name}")
            return
        last = self.path.read_bytes().rpartition(b"\n")[2]
        if last and (not log or log[-1][0] != last):
            print_message(f"fit: {self.path}: its last line was not complete, and is left out")
        with atomic_file(self.path) as file:
            for line, values in log:
                if values["step"] <= self.step:
                    file.write(line + b"\n")

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Begin to count the FLOPs of a step, if that is of use."""
        if self.peak and self.step == self.counted_step and self.flop_count is None:
            self.flop_count = FlopCount()
            self.flop_count.__enter__()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Note the learning rate and the norm of the gradients, if this step is logged."""
        if not self._is_logged(trainer, self.step + 1):
            return
        self.learning_rate = float(optimizer.param_groups[0]["lr"])
        self.squared_norm = sum_squares(pl_module.parameters())

    def _stop_counting(self) -> None:
        """Keep the FLOPs that were counted."""
        assert self.flop_count is not None
        self.flop_count.__exit__(None, None, None)
        self.flops = self.flop_count.total
        self.flop_count = None

    def _is_logged(self, trainer: Trainer, step: int) -> bool:
        """Return whether a line is written after a number of steps."""
        return step % self.every == 0 or step == trainer.max_steps

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Record a micro-batch; after an optimizer step, write a line if one is due."""
        # Record the micro-batch.
        self.outputs.append(outputs)
        step = trainer.global_step
        if step == self.step:
            return  # gradients are still accumulating

        # Finish the step. Only finished steps count: an interrupted one is repeated.
        self.meter.add(step - self.step)
        self.step = step
        step_outputs = self.outputs
        self.outputs = []
        for micro_batch in step_outputs:
            self.evaluations += micro_batch.get("evaluations", 0)
        if self.flop_count:
            self._stop_counting()

        # Write a line.
        if self._is_logged(trainer, step):
            values = self._average(trainer, step_outputs)
            values |= self._measure(trainer, batch.size)
            self._write(trainer, values)
            self.meter.values = {"loss": values["loss"], "data_wait": values["data_wait"]}
            self.meter.add(0, f"loss {values['loss']:.4f}")

    def _average(self, trainer: Trainer, outputs: list[StepOutputs]) -> dict[str, float]:
        """Return the values of a line: means over the micro-batches of a step on all ranks."""
        strategy = trainer.strategy

        # Means over this rank's micro-batches. Lightning has divided each loss by their number.
        losses = [micro_batch["loss"] for micro_batch in outputs]
        means = {"loss": torch.stack(losses).mean() * len(outputs)}
        for name in outputs[0].get("parts", {}):
            parts = [micro_batch["parts"][name] for micro_batch in outputs]
            means[name] = torch.stack(parts).mean()

        # Means over ranks, all of which have the same parts.
        values = {}
        for name, value in means.items():
            values[name] = strategy.reduce(value, reduce_op="mean").item()

        # Losses by time.
        samples = []
        for micro_batch in outputs:
            per_sample = micro_batch.get("per_sample")
            if per_sample is not None:
                samples.append(per_sample)
        if samples and self.bins:
            values |= average_by_time(
                samples, self.bins, lambda sums: strategy.reduce(sums, reduce_op="sum")
            )

        # The cost so far.
        evaluations = self._total_evaluations(trainer)
        if evaluations:
            values["evaluations"] = evaluations
        return values

    def _measure(self, trainer: Trainer, batch: int) -> dict[str, float]:
        """Return the other values of a line: of this step, and of the time since the last line.

        Args:
            trainer: the trainer.
            batch: samples in a step, on all ranks.
        """
        # The step.
        values = {"learning_rate": self.learning_rate}
        if self.squared_norm is not None:
            squared = self.squared_norm
            if any(isinstance(value, DTensor) for value in trainer.lightning_module.parameters()):
                squared = trainer.strategy.reduce(squared, reduce_op="sum")
            values["gradient_norm"] = squared.sqrt().item()
            self.squared_norm = None

        # The time since the last line.
        seconds = self.timer.seconds()
        steps = self.step - self.logged_step
        rate = batch * steps / seconds
        values["samples_per_second"] = rate
        values["samples_per_second_per_device"] = rate / trainer.world_size
        values["data_wait"] = self.timer.waited / seconds
        if self.peak and self.flops:
            values["mfu"] = self.flops * steps / (seconds * self.peak)
        self.timer.restart()
        self.logged_step = self.step

        values["peak_memory"] = peak_memory()
        return values

    def _total_evaluations(self, trainer: Trainer) -> int | None:
        """Return the evaluations in all finished steps on all ranks; None if some have no count."""
        mine = torch.tensor(self.evaluations, device=trainer.strategy.root_device)
        total = int(trainer.strategy.reduce(mine, reduce_op="sum"))
        return None if self.loaded_evaluations is None else self.loaded_evaluations + total

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the number of evaluations to the checkpoint."""
        checkpoint["evaluations"] = self._total_evaluations(trainer)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Load the number of evaluations."""
        self.loaded_evaluations = checkpoint.get("evaluations")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the validation out of the time of training."""
        if not trainer.sanity_checking:
            self.timer.pause()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write all that the validation logged into a separate line."""
        if trainer.sanity_checking:
            return
        values = {}
        for name, value in trainer.callback_metrics.items():
            values[name] = value.item()
        self._write(trainer, values)

    def _write(self, trainer: Trainer, values: dict[str, float]) -> None:
        """Write a line, and give the values to all loggers, which write them at once."""
        for logger in trainer.loggers:
            logger.log_metrics(values, trainer.global_step)
            logger.save()
        if trainer.is_global_zero:
            seconds = round(time.monotonic() - self.began, 3)
            line: dict[str, Any] = {
                "step": trainer.global_step,
                "seconds": seconds,
                "time": round(time.time(), 3),
                "attempt": self.attempt,
                "world": trainer.world_size,
            }
            for name, value in values.items():
                line[name] = value if math.isfinite(value) else None  # JSON has no NaN
            line["run"] = self.run_id
            with self.path.open("a") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop the progress meter."""
        self._close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Stop the progress meter; Lightning does not call `teardown` then."""
        self._close()

    def _close(self) -> None:
        self.open_meter.close()
        if self.flop_count:
            self._stop_counting()


def sum_squares(weights: Iterable[Tensor]) -> Tensor:
    """Return the sum of the squares of this rank's gradients, in float32.

    Args:
        weights: those of a module.
    """
    gradients = [to_local(weight.grad) for weight in weights if weight.grad is not None]
    if not gradients:
        return torch.zeros(())
    norms = torch._foreach_norm(gradients, 2, torch.float32)
    return torch.stack(norms).square().sum()


def average_by_time(
    samples: list[PerSample], bins: int, total: Callable[[Tensor], Tensor]
) -> dict[str, float]:
    """Return the mean loss in each bin of [0, 1] that has samples: loss_t0, loss_t1, ...

    Args:
        samples: of the micro-batches.
        bins: number of equal parts of [0, 1].
        total: sums a tensor over the ranks. It receives sums and counts, so that a rank may have
            no samples in a bin.
    """
    # Each sample's bin.
    times = torch.cat([part.times for part in samples])
    distances = torch.cat([part.distances for part in samples])
    indices = (times * bins).long().clamp(0, bins - 1)

    # Sum and count in each bin, over all ranks.
    values = torch.stack([distances.float(), torch.ones_like(distances, dtype=torch.float32)])
    zeros = torch.zeros_like(values[:, :1]).repeat(1, bins)
    sums, counts = total(zeros.index_add(1, indices, values)).tolist()
    means = {}
    for i in range(bins):
        if counts[i]:
            means[f"loss_t{i}"] = sums[i] / counts[i]
    return means
