"""What encode, collect and evaluate share: an accelerate process, and its share of the work."""

from collections.abc import Iterator
from typing import Literal, TypeVar

import torch
from accelerate import PartialState

from data.progress import Meter
from data.shards import ShardWriter
from data.shards.claims import claimed

Deterministic = Literal["DDIM", "DPMSolver2M", "EDMHeun", "Euler", "Heun", "Midpoint", "RungeKutta4"]  # of models.sampler
Sampling = Deterministic | Literal["Ancestral", "EulerMaruyama", "Renoising"]  # those too that draw noise on their way
THREADS = 2  # of one CPU rank, at most: sums over 3 threads differ from those over 1, 2 and 4 in their last bits


def start() -> PartialState:
    """Join the ranks that torchrun started (or none), and fix what the bits of a result may depend on.

    `torchrun --nproc-per-node N -m deploy collect ...` runs a job on N processes.
    """
    state = PartialState(cpu=not torch.cuda.is_available())
    if state.device.type == "cpu":
        torch.set_num_threads(min(THREADS, torch.get_num_threads()))
    return state


Unit = TypeVar("Unit")


def share(state: PartialState, units: list[Unit]) -> list[Unit]:
    """Return this rank's share of the units of work, strided by rank."""
    return units[state.process_index :: state.num_processes]


def work(shards: ShardWriter, state: PartialState, lease: float, name: str, unit: str) -> Iterator[int]:
    """Yield the numbers of the shards that this process is to make, and count what is written.

    Args:
        shards: the set.
        state: this process.
        lease: 0: shards are dealt out by rank; else they are claimed, and a claim not renewed for so many seconds is void.
        name: of the work, for the progress line.
        unit: what a set's samples are called.
    """
    numbers = list(shards.numbers())
    mine = numbers if lease else share(state, numbers)
    finished = set() if lease else {number for number in mine if shards.finished(number)}
    done, total = (sum(len(shards.indices(number)) for number in part) for part in (finished, mine))
    first = state.process_index * len(numbers) // state.num_processes
    with Meter(name, total, unit, done, state.is_main_process) as meter:
        turns = claimed(shards, first, lease) if lease else ((number, True) for number in mine if number not in finished)
        for number, own in turns:
            if own:
                yield number
            meter.add(len(shards.indices(number)))
