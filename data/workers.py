"""Worker processes: the tasks of one command, shared by several processes of this host.

The processes are forked, so that they start at once and share what the command has read.
"""

import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Any, NamedTuple, Protocol

from data.progress import Meter
from data.signals import STOP_SIGNALS, end_with_parent, raise_if_stopped

INTERVAL = 0.2  # seconds between reports of a worker's progress
IGNORED = (*STOP_SIGNALS, signal.SIGINT)  # by workers: the command handles them


class Progress(Protocol):
    """Counts finished work."""

    def add(self, count: int) -> None:
        """Count more finished work."""


class Report(NamedTuple):
    """What a worker sends."""

    finished: int  # work, since the last report
    result: Any = None
    error: Exception | None = None
    ended: bool = False  # whether the task has ended


class Worker(NamedTuple):
    """A worker process, and the connection to it."""

    process: ForkProcess
    connection: Connection


class ReportedProgress:
    """Progress of a worker, reported from time to time."""

    def __init__(self, connection: Connection):
        self.connection = connection
        self.count = 0  # that is not reported yet
        self.reported = time.monotonic()

    def add(self, count: int) -> None:
        """Count more finished work."""
        self.count += count
        now = time.monotonic()
        if now - self.reported >= INTERVAL:
            self.connection.send(Report(self.take()))
            self.reported = now

    def take(self) -> int:
        """Return the work that is not reported yet, and count from 0."""
        count = self.count
        self.count = 0
        return count


@contextmanager
def start_workers(work: Callable[[Any, Progress], Any], count: int) -> Iterator[list[Worker]]:
    """Start worker processes; they are killed at the end of the block.

    Args:
        work: makes the result of a task; what it has to count it adds to the progress.
        count: number of processes.
    """
    workers: list[Worker] = []
    try:
        for _ in range(count):
            workers.append(start_worker(work))
        yield workers
    finally:
        for worker in workers:
            worker.process.kill()
        for worker in workers:
            worker.process.join()
            worker.connection.close()


def start_worker(work: Callable[[Any, Progress], Any]) -> Worker:
    """Start one worker process."""
    context = get_context("fork")
    connection, other_end = context.Pipe()
    process = context.Process(target=serve, args=(other_end, work, os.getpid()), daemon=True)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    other_end.close()  # so that the connection ends when the worker does
    return Worker(process, connection)


def serve(connection: Connection, work: Callable[[Any, Progress], Any], parent: int) -> None:
    """Do the tasks that are received. This is the main function of a worker process."""
    # Leave signals to the command, which kills its workers, even if it is killed itself.
    end_with_parent(parent)
    signal.set_wakeup_fd(-1)  # the command's
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)

    # Do the tasks.
    progress = ReportedProgress(connection)
    while True:
        task = connection.recv()
        try:
            report = Report(0, result=work(task, progress), ended=True)
        except Exception as error:  # raised again by the command
            error.add_note(traceback.format_exc())
            report = Report(0, error=make_picklable(error), ended=True)
        connection.send(report._replace(finished=progress.take()))


def make_picklable(error: Exception) -> Exception:
    """Return an error, or its text if it cannot be sent to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever the classes of libraries raise in their reductions
        return RuntimeError("".join(traceback.format_exception(error)))
    return error


def run_tasks(workers: Sequence[Worker], tasks: Sequence[Any], meter: Meter) -> Iterator[Any]:
    """Yield the results of tasks in the order in which they are finished.

    Args:
        workers: at most as many as there are tasks.
        tasks: one is sent to a worker whenever it has finished the last one.
        meter: receives the progress of all workers.

    Raises:
        ChildProcessError: a worker has ended, as one that the system kills if memory is short.
        Exception: an error of a task.
    """
    waiting = list(reversed(tasks))
    busy: dict[Connection, Worker] = {}
    for worker in workers:
        worker.connection.send(waiting.pop())
        busy[worker.connection] = worker
    while busy:
        raise_if_stopped()
        for connection in wait(list(busy), timeout=INTERVAL):
            assert isinstance(connection, Connection)
            report = receive(busy[connection])
            meter.add(report.finished)
            if report.error:
                raise report.error
            if not report.ended:
                continue
            if waiting:
                connection.send(waiting.pop())
            else:
                busy.pop(connection)
            yield report.result


def receive(worker: Worker) -> Report:
    """Return the next report of a worker.

    Raises:
        ChildProcessError: it has ended.
    """
    try:
        return worker.connection.recv()
    except (EOFError, ConnectionError):
        worker.process.join()
        raise_if_stopped()
        raise ChildProcessError(
            f"worker process {worker.process.pid} {describe_end(worker.process.exitcode)}; run the "
            "same command again, with fewer --workers if memory was short"
        ) from None


def describe_end(code: int | None) -> str:
    """Return how a process has ended, by its exit code."""
    if code is not None and code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"has ended with exit code {code}"
