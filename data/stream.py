"""The endless shuffled stream as Lightning wants it."""

import signal
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from data.batch import Batch, Feed, Set, Source, Steps
from data.files import canonical, digest
from data.lanes import Lanes
from data.mixed import Mixed
from data.streamed import Row, Streamed


def ignore_signals(_: int) -> None:
    """In a reading process: SIGTERM and SIGUSR1 are the training process's business."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


class Taken:
    """How far training has come in each lane: what is read ahead does not count, nor a step that is not finished.

    Args:
        rows: of this rank's lanes at the start, by lane.
    """

    def __init__(self, rows: dict[int, Row]):
        self._rows, self._step, self._going = rows, -1, dict[int, Row]()

    def note(self, batch: Batch) -> None:
        """Note a batch that is trained on now."""
        assert batch.place is not None
        if batch.step != self._step:
            self._rows, self._step, self._going = self._rows | self._going, batch.step, {}
        self._going[batch.place[0]] = batch.place[1:]

    def rows(self, steps: int) -> list[Row]:
        """Return the rows, in the order of lanes, after a number of finished steps."""
        rows = self._rows | self._going if self._step < steps else self._rows
        return [rows[lane] for lane in sorted(rows)]


def identity(source: Feed) -> str:
    """Return a checksum of the samples of a source, or "" for one that keeps its own count (Streamed)."""
    if isinstance(source, Mixed):
        return digest(canonical([[identity(part) for part in source.sources], source.shares]))
    return digest(canonical([shard["sha256"] for shard in source.manifest["shards"]])) if isinstance(source, Set) else ""


class Stream(LightningDataModule):
    """An endless shuffled stream over one source, resumed on any number of processes from the step (and Streamed's own count).

    Args:
        source: the samples (Images, Latents, Pairs, Mixed or Streamed).
        batch: samples in one step over all processes and accumulated batches.
        seed: of the order and of every random draw in training.
        workers: reading processes per rank; 0 reads in the training process.
        heldout: samples that are not trained on, for `heldout_loss` every `trainer.val_check_interval` batches.
        heldout_batches: global batches of them, always the same ones, with the same draws.
    """

    def __init__(
        self,
        source: Feed,
        batch: int = 256,
        seed: int = 0,
        workers: int = 0,
        heldout: Source | None = None,
        heldout_batches: int = 4,
    ):
        super().__init__()
        if heldout_batches < 1:
            raise ValueError(f"data.heldout_batches: {heldout_batches}, it must be at least 1")
        self.heldout, self.heldout_batches = heldout, heldout_batches
        self.source, self.batch, self.seed, self.workers = source, batch, seed, workers
        self.taken = Taken({})

    def state_dict(self) -> dict[str, Any]:
        """Return what the sequence of samples and draws depends on, beside the step."""
        state: dict[str, Any] = {"seed": self.seed, "batch": self.batch, "samples": identity(self.source)}
        if isinstance(self.source, Streamed):
            state["streamed"] = self.source.state(self._lanes())
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse to resume with another sequence."""
        for key, here in {"seed": self.seed, "batch": self.batch}.items():
            if state_dict[key] != here:
                raise ValueError(f"data.{key}: the run was begun with {state_dict[key]}, the configuration says {here}")
        if state_dict["samples"] != identity(self.source):
            raise ValueError("data.source: the run was begun on other samples; give the same, or begin another run from it")
        if isinstance(self.source, Streamed):
            if "streamed" not in state_dict:
                raise ValueError("data.source: the run was begun with a source that is not Streamed; give the same")
            self.source.resume(state_dict["streamed"])

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Note what is trained on: a batch goes to the device when its turn comes, not when it is read ahead."""
        if batch.place is not None:
            self.taken.note(batch)
        return batch

    def _lanes(self) -> Lanes:
        """Return where the lanes of all ranks stand."""
        run = self.trainer
        assert run is not None and isinstance(self.source, Streamed)
        mine = torch.tensor(self.taken.rows(run.global_step), device=run.strategy.root_device)
        rows = run.strategy.all_gather(mine).reshape(run.world_size, *mine.shape)  # lane = worker x world + rank
        rows = rows.transpose(0, 1).reshape(-1, mine.shape[1])
        return replace(self.source.lanes(len(rows)), rows=tuple(map(tuple, rows.tolist())))

    def train_dataloader(self) -> DataLoader | Steps:
        """Return the stream from the trainer's global step on."""
        run = self.trainer
        assert run is not None
        if isinstance(self.source, Streamed):
            rows = self.source.lanes(run.world_size * max(1, self.workers)).rows
            self.taken = Taken(dict(list(enumerate(rows))[run.global_rank :: run.world_size]))
        steps = Steps(
            self.source, self.batch, self.seed, run.global_step, run.global_rank, run.world_size, run.accumulate_grad_batches
        )
        if not self.workers:
            return steps
        return DataLoader(
            steps, batch_size=None, num_workers=self.workers, persistent_workers=True, worker_init_fn=ignore_signals
        )

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Return the held-out batches, as many on every rank, or none."""
        run = self.trainer
        assert run is not None
        if self.heldout is None:
            return []
        steps = Steps(self.heldout, self.batch, self.seed, 0, run.global_rank, run.world_size, steps=self.heldout_batches)
        return DataLoader(steps, batch_size=None)
