"""The Lightning data module: an endless shuffled sequence of batches that resumes exactly."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from data.batch import (
    Batch,
    BatchStream,
    IndexedDataset,
    RandomAccessSource,
    RankBatches,
    Request,
    check_buckets_hold,
)
from data.files import canonical, digest
from data.images import Images
from data.latents import Latents
from data.mixed import Mixed
from data.pairs import Pairs
from data.reader_assignment import Progress, ReaderAssignment
from data.sequential import SequentialTars
from data.shards import identify_shards
from data.signals import prepare_reader


class ReaderProgress:
    """Positions reached by finished steps, per reader; prefetched batches do not count.

    Args:
        progress: of each reader of this rank at the start, by its number.
    """

    def __init__(self, progress: dict[int, Progress]):
        self._before = progress  # before the step that is under way
        self._step = -1
        self._during = dict[int, Progress]()

    def record(self, batch: Batch) -> None:
        """Record a batch that training begins with now."""
        assert batch.reader is not None and batch.progress is not None
        if batch.step != self._step:
            self._before = self._before | self._during
            self._during = {}
            self._step = batch.step
        self._during[batch.reader] = batch.progress

    def after(self, steps: int) -> list[Progress]:
        """Return the progress, in the order of readers, after a number of finished steps."""
        progress = self._before
        if self._step < steps:  # the last recorded step is finished
            progress = self._before | self._during
        return [progress[reader] for reader in sorted(progress)]


def checksum_samples(source: BatchStream) -> str:
    """Return a checksum of the samples of a source.

    It is "" for SequentialTars, which identifies its shards in its state.
    """
    if isinstance(source, Mixed):
        checksums = [checksum_samples(part) for part in source.sources]
        return digest(canonical([checksums, source.shares]))
    if not isinstance(source, IndexedDataset):
        return ""
    shards = identify_shards(source.manifest)
    if source.buckets:
        buckets = [[bucket.name, bucket.start, bucket.total] for bucket in source.buckets]
        return digest(canonical([shards, buckets]))
    if source.kept is None:
        return digest(canonical(shards))
    kept = digest(source.kept.tobytes())
    return digest(canonical([shards, kept]))


def identify_text(source: BatchStream) -> list[dict[str, object]]:
    """Return what identifies the embeddings of captions that a source gives; [] for none."""
    if isinstance(source, Images | Latents) and source.captions.text:
        return [source.captions.text.identity()]
    return []


class BucketsInTurn(BatchStream):
    """The batches of all buckets of a set in turn: with K buckets, step s is one of bucket s mod K.

    A bucket with fewer samples than a batch repeats some of them.

    Args:
        source: a set with buckets.
    """

    def __init__(self, source: IndexedDataset):
        self.source = source

    def read_batches(
        self, seed: int, reader: int, readers: int, requests: Iterator[Request]
    ) -> Iterator[Batch]:
        for request in requests:
            number, bucket = divmod(request.step, len(self.source.buckets))
            position = number * request.size + request.start
            located = self.source.locate_in_bucket(seed, bucket, position, request.samples)
            yield self.source.read_located(seed, located)


def check_enough_samples(source: BatchStream, batch: float) -> None:
    """Check that a batch takes no more pairs than the set has, nor more samples than a bucket has.

    None may occur twice in a step.
    """
    if isinstance(source, IndexedDataset):
        check_buckets_hold(source, int(batch))
    if isinstance(source, Mixed):
        for part, share in zip(source.sources, source.shares):
            check_enough_samples(part, batch * share / sum(source.shares))
    elif isinstance(source, Pairs) and len(source) < batch:
        raise ValueError(
            f"data.source: {source.path} has {len(source)} pairs "
            f"(keep_fraction {source.keep_fraction:g} of {len(source.pairs)}), but a batch takes "
            f"{batch:g} of them; collect more pairs, raise keep_fraction, or lower data.batch"
        )


class DataModule(LightningDataModule):
    """An endless shuffled sequence of batches from one source.

    A run resumes on any number of processes from its step alone (SequentialTars: also from the
    progress of its readers).

    Args:
        source: the samples (Images, Latents, Pairs, Mixed or SequentialTars).
        batch: samples in one step, over all processes and accumulated batches.
        seed: of the order and of every random draw in training.
        workers: reading processes per rank; 0 reads in the training process.
        heldout: samples that are not trained on, for `heldout_loss` every
            `trainer.val_check_interval` batches. If they have several sizes, `heldout_loss` is the
            mean over all samples, each bucket's mean weighted by its number of samples, and
            `heldout_loss/WIDTHxHEIGHT` is that of a bucket.
        heldout_batches: number of their global batches, of each bucket if there are any; always the
            same ones, with the same draws.
    """

    def __init__(
        self,
        source: BatchStream,
        batch: int = 256,
        seed: int = 0,
        workers: int = 0,
        heldout: RandomAccessSource | None = None,
        heldout_batches: int = 4,
    ):
        super().__init__()
        if heldout_batches < 1:
            raise ValueError(f"data.heldout_batches is {heldout_batches}; it must be at least 1")
        check_enough_samples(source, batch)
        self.source = source
        self.batch = batch
        self.seed = seed
        self.workers = workers
        self.heldout = heldout
        self.heldout_batches = heldout_batches
        self.reader_progress = ReaderProgress({})

    def sources(self) -> list[BatchStream]:
        """Return the sources of all samples, trained on or held out; the parts of a mixture."""
        sources: list[BatchStream] = []
        for source in (self.source, self.heldout):
            if isinstance(source, Mixed):
                sources.extend(source.sources)
            elif source is not None:
                sources.append(source)
        return sources

    def state_dict(self) -> dict[str, Any]:
        """Return what the sequence of samples and draws depends on, beside the step."""
        state: dict[str, Any] = {
            "seed": self.seed,
            "batch": self.batch,
            "samples": checksum_samples(self.source),
        }
        text = identify_text(self.source)
        if text:
            state["text"] = text
        if isinstance(self.source, SequentialTars):
            state["readers"] = self.source.state(self._reader_assignment())
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that the run resumes with the same sequence, and continue it.

        Raises:
            ValueError: the sequence is another one.
        """
        for key, value in {"seed": self.seed, "batch": self.batch}.items():
            if state_dict[key] != value:
                raise ValueError(
                    f"data.{key} is {value}, but the run began with {state_dict[key]}; "
                    "give the same value, or begin another run from its checkpoint"
                )
        if state_dict["samples"] != checksum_samples(self.source):
            raise ValueError(
                "data.source: the run began with other samples; "
                "give the same source, or begin another run from its checkpoint"
            )
        if state_dict.get("text", []) != identify_text(self.source):
            raise ValueError(
                "data.source.text: the run began with other embeddings of captions; give the same "
                "`text`, or begin another run from its checkpoint"
            )
        if isinstance(self.source, SequentialTars):
            if "readers" not in state_dict:
                raise ValueError(
                    "data.source is SequentialTars, but the run began with another kind of source; "
                    "give the same source"
                )
            self.source.resume(state_dict["readers"])

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Record that training begins with a batch.

        A batch is moved to the device when its turn comes, not when it is prefetched.
        """
        if batch.progress is not None:
            self.reader_progress.record(batch)
        return batch

    def _reader_assignment(self) -> ReaderAssignment:
        """Return the assignment with the progress of the readers of all ranks."""
        trainer = self.trainer
        assert trainer is not None and isinstance(self.source, SequentialTars)
        local = torch.tensor(
            self.reader_progress.after(trainer.global_step), device=trainer.strategy.root_device
        )

        # Gather (rank, worker), and order by reader = worker x world size + rank.
        gathered = trainer.strategy.all_gather(local).reshape(trainer.world_size, *local.shape)
        by_reader = gathered.transpose(0, 1).reshape(-1, local.shape[1])
        progress = tuple(map(tuple, by_reader.tolist()))
        return replace(self.source.assign_readers(len(progress)), progress=progress)

    def train_dataloader(self) -> DataLoader | RankBatches:
        """Return the batches of this rank from the trainer's global step on."""
        trainer = self.trainer
        assert trainer is not None

        # Each rank records the progress of the readers of its workers.
        if isinstance(self.source, SequentialTars):
            readers = trainer.world_size * max(1, self.workers)
            progress = self.source.assign_readers(readers).progress
            local = list(enumerate(progress))[trainer.global_rank :: trainer.world_size]
            self.reader_progress = ReaderProgress(dict(local))

        batches = RankBatches(
            self.source,
            self.batch,
            self.seed,
            trainer.global_step,
            trainer.global_rank,
            trainer.world_size,
            trainer.accumulate_grad_batches,
        )
        if not self.workers:
            return batches
        return DataLoader(
            batches,
            batch_size=None,
            num_workers=self.workers,
            persistent_workers=True,
            worker_init_fn=prepare_reader,
        )

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Return the held-out batches of this rank (the same number on every rank), or none."""
        trainer = self.trainer
        assert trainer is not None
        if self.heldout is None:
            return []
        source: BatchStream = self.heldout
        steps = self.heldout_batches
        if isinstance(self.heldout, IndexedDataset) and self.heldout.buckets:
            source = BucketsInTurn(self.heldout)
            steps *= len(self.heldout.buckets)
        batches = RankBatches(
            source,
            self.batch,
            self.seed,
            0,
            trainer.global_rank,
            trainer.world_size,
            steps=steps,
        )
        return DataLoader(batches, batch_size=None)
