"""What encode, collect and evaluate share: an accelerate process, and its share of the work."""

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


def share(state: PartialState, numbers: list[int]) -> list[int]:
    """Return this rank's share of the numbered units of work, strided by rank."""
    return numbers[state.process_index :: state.num_processes]
