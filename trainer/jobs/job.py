"""Joining the processes that torchrun started, and dividing the work among them."""

from collections.abc import Collection, Iterator
from typing import TypeVar

import torch
from accelerate import PartialState

from data.progress import Meter
from data.shards import ShardWriter
from data.shards.claims import claim_shards
from trainer.jobs.device import limit_cpu_threads


def start() -> PartialState:
    """Join the processes that torchrun started, if any, and make results independent of the CPU.

    `torchrun --nproc-per-node N -m deploy collect ...` runs a job on N processes.
    """
    state = PartialState(cpu=not torch.cuda.is_available())
    if state.device.type == "cpu":
        limit_cpu_threads()
    return state


Unit = TypeVar("Unit")


def share(state: PartialState, units: list[Unit]) -> list[Unit]:
    """Return the units of work of this process: every n-th one, for n processes."""
    return units[state.process_index :: state.num_processes]


def iterate_shards(
    shards: ShardWriter, state: PartialState, lease: float, name: str, unit: str
) -> Iterator[int]:
    """Yield the number of each shard that this process must write, and show the progress.

    Args:
        shards: the set.
        state: this process.
        lease: 0 divides the shards among the processes by rank. Otherwise processes claim shards,
            and a claim expires if it is not renewed within this many seconds.
        name: name of the work, for the progress line.
        unit: what a sample of the set is called, for the progress line.
    """
    # Assign shards, by claims or by rank.
    numbers = list(shards.numbers())
    finished: set[int] = set()
    turns: Iterator[tuple[int, bool]]
    if lease:
        assigned = numbers
        first = state.process_index * len(numbers) // state.num_processes
        turns = claim_shards(shards, first, lease)
    else:
        assigned = share(state, numbers)
        finished = {number for number in assigned if shards.finished(number)}
        turns = ((number, True) for number in assigned if number not in finished)

    # Hand them out, one at a time. Shards that other processes finish count as progress.
    total = _count_samples(shards, assigned)
    done = _count_samples(shards, finished)
    with Meter(name, total, unit, done, state.is_main_process) as meter:
        for number, assigned_to_this_process in turns:
            if assigned_to_this_process:
                yield number
            meter.add(len(shards.indices(number)))


def _count_samples(shards: ShardWriter, numbers: Collection[int]) -> int:
    return sum(len(shards.indices(number)) for number in numbers)
