"""The endless shuffled stream as Lightning wants it."""

import signal

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from data.batch import Source, Steps


def ignore_signals(_: int) -> None:
    """In a reading process: SIGTERM and SIGUSR1 are the training process's business."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


class Stream(LightningDataModule):
    """An endless shuffled stream over one source; resuming needs only the step, on any number of processes.

    Args:
        source: the samples (Images, Latents or Pairs).
        batch: samples in one step over all processes and accumulated batches.
        seed: of the order and of every random draw in training.
        workers: reading processes per rank; 0 reads in the training process.
    """

    def __init__(self, source: Source, batch: int = 256, seed: int = 0, workers: int = 0):
        super().__init__()
        self.source, self.batch, self.seed, self.workers = source, batch, seed, workers

    def state_dict(self) -> dict[str, int]:
        """Return what the sequence of samples and draws depends on, beside the step."""
        return {"seed": self.seed, "batch": self.batch}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Refuse to resume with another sequence."""
        for key, here in self.state_dict().items():
            if state_dict[key] != here:
                raise ValueError(f"data.{key}: the run was begun with {state_dict[key]}, the configuration says {here}")

    def train_dataloader(self) -> DataLoader:
        """Return the stream from the trainer's global step on."""
        run = self.trainer
        assert run is not None
        steps = Steps(
            self.source, self.batch, self.seed, run.global_step, run.global_rank, run.world_size, run.accumulate_grad_batches
        )
        return DataLoader(
            steps, batch_size=None, num_workers=self.workers, persistent_workers=self.workers > 0, worker_init_fn=ignore_signals
        )
