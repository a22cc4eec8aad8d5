"""What encode, collect and evaluate share: an accelerate process, and its share of the work."""

from typing import TypeVar

import torch
from accelerate import PartialState

THREADS = 2  # of one CPU rank: fixed, because sums over another number of threads can differ in their last bits


def start() -> PartialState:
    """Join the ranks that torchrun started (or none), and fix what the bits of a result may depend on.

    `torchrun --nproc-per-node N -m deploy collect ...` runs a job on N processes.
    """
    state = PartialState(cpu=not torch.cuda.is_available())
    if state.device.type == "cpu":
        torch.set_num_threads(THREADS)
    return state


Unit = TypeVar("Unit")


def share(state: PartialState, units: list[Unit]) -> list[Unit]:
    """Return this rank's share of the units of work, strided by rank."""
    return units[state.process_index :: state.num_processes]
