"""Joining the processes that torchrun started, and dividing the work among them."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from data.attempts import begin_attempt, set_hosts
from data.progress import Meter
from data.shards import ShardWriter
from data.shards.claims import claim_units
from trainer.jobs.device import limit_cpu_threads


def start() -> PartialState:
    """Join the processes that torchrun started, if any, and make results independent of the CPU.

    `torchrun --nproc-per-node N -m deploy collect ...` runs a job on N processes.
    """
    state = PartialState(cpu=not torch.cuda.is_available())
    if state.num_processes > 1:
        set_hosts(gather_object([os.uname().nodename]))
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
        lease: see `iterate_units`.
        name: name of the work, for the progress line.
        unit: what a sample of the set is called, for the progress line.
    """
    begin_attempt(shards.folder, state.num_processes, state.process_index)
    sizes = [len(shards.indices(number)) for number in shards.numbers()]
    yield from iterate_units(shards.folder, sizes, shards.finished, state, lease, name, unit)


def iterate_units(
    folder: Path,
    sizes: Sequence[int],
    is_finished: Callable[[int], object],
    state: PartialState,
    lease: float,
    name: str,
    measure: str,
) -> Iterator[int]:
    """Yield the number of each unit of work that this process must do, and show the progress.

    Args:
        folder: where the work is.
        sizes: how much work each unit is.
        is_finished: whether the unit of a number is finished.
        state: this process.
        lease: 0 divides the units among the processes by rank. Otherwise processes claim units,
            and a claim expires if it is not renewed within this many seconds.
        name: name of the work, for the progress line.
        measure: what the sizes count, for the progress line.
    """
    # Assign units, by claims or by rank.
    assigned = list(range(len(sizes)))
    finished: set[int] = set()
    turns: Iterator[tuple[int, bool]]
    if lease:
        first = state.process_index * len(sizes) // state.num_processes
        turns = claim_units(folder, assigned[first:] + assigned[:first], is_finished, lease)
    else:
        assigned = share(state, assigned)
        finished = {number for number in assigned if is_finished(number)}
        turns = ((number, True) for number in assigned if number not in finished)

    # Hand them out, one at a time. Units that other processes finish count as progress.
    total = sum(sizes[number] for number in assigned)
    done = sum(sizes[number] for number in finished)
    with Meter(name, total, measure, done, state.is_main_process) as meter:
        for number, assigned_to_this_process in turns:
            if assigned_to_this_process:
                yield number
            meter.add(sizes[number])
