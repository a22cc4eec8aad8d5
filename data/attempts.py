"""Attempts: records of the commands that work in a folder.

    FOLDER/attempts/0001.json    one command: where it ran, when it began, how it ended
    FOLDER/attempts/rank01-0001.json   how another rank failed, if it failed by itself
    FOLDER/heartbeat.json        how far the work is, written every 15 s: the sign of life
    FOLDER/intent.json           whether the work is wanted (data/intent.py)
    FOLDER/logs/0001-rank00.txt  what each rank printed

Rank 0 writes the first two. A command that is refused leaves nothing: its attempt begins after its
options are checked.
"""

import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from math import isfinite
from pathlib import Path
from typing import NamedTuple

from data import progress, run_output, signals
from data.files import (
    errors_named,
    files_by_step,
    process_space,
    process_start,
    read_json,
    write_json,
)
from data.intent import Want, read_intent, want_run
from data.schema import COUNT, check_schema

PROCESS_BEGIN = time.time()
BEAT_SECONDS = 15.0
FIRST_BEAT_SECONDS = 1.0
REFUSED_EXIT_CODE = 2
CAUSES = (2, 3, 1)  # exit codes of a rank that failed by itself, the likeliest cause first
CONSEQUENCES = (4, signals.STOPPED_EXIT_CODE)  # exit codes that another rank's failure may cause
ENDING_SECONDS = 5.0  # that the record of an end may take
LATE_SECONDS = 3.0  # that rank 0 may begin after another one's end
JOINING_SECONDS = 120.0  # between the starts of ranks, at most
RESULTS = "RECTIFY_RESULTS"  # folder in which every rank leaves its exit code and line
SECRET = r"[\w.-]*(?:api[_-]?key|token(?!iz)|secret|password)[\w.-]*"  # name of an option or key
SECRET_OPTION = re.compile(f"--{SECRET}", re.IGNORECASE)
SECRET_VALUE = re.compile(rf"({SECRET}[\"']?\s*[=:]\s*)(\"[^\"]*\"|'[^']*'|[^,}}]+)", re.IGNORECASE)
SECRET_ARGUMENT = re.compile(rf"(key='{SECRET}', val=)'[^']*'", re.IGNORECASE)
USER_OF_URL = re.compile(r"://[^/@\s]+@")
SCHEMA = {
    "hosts": [str],
    "engine": str,
    "job": str,
    "world": COUNT,
    "argv": [str],
    "begin": float,
    "committed": COUNT,
    "space": str,
    "process": COUNT,
    "started": str,
    "end": (None, {"code": int, "line": str, "at": float, "committed": COUNT}),
}


class End(NamedTuple):
    """How an attempt ended."""

    code: int  # exit code
    line: str  # the error that it printed
    at: float  # seconds since 1970
    committed: int


class Attempt(NamedTuple):
    """One command that worked in a folder."""

    number: int
    hosts: list[str]
    engine: str  # what gave it processes: local, torchrun, slurm
    job: str  # of Slurm: ID or ID_TASK, and ".N" after the Nth requeue
    world: int  # processes
    revision: str
    argv: list[str]
    begin: float  # seconds since 1970
    committed: int  # steps or shards in the folder when it began
    launch: str  # the same for all ranks
    space: str  # where the process's id is valid
    process: int
    started: str  # when the process began, in ticks of its machine
    end: End | None


class Heartbeat(NamedTuple):
    """How far the work in a folder is."""

    attempt: int
    time: float  # seconds since 1970
    quiet: float  # seconds since the last progress
    done: int
    total: int
    unit: str  # steps, pairs, ...
    rate: float  # units per second
    seconds_left: float | None
    committed: int  # steps or shards that are safe in the folder
    loss: float | None
    memory: int  # bytes at most so far, of the device if it is a GPU
    data_wait: float | None  # part of the time that training waited for data


def revision() -> str:
    """Return the git commit, with "-dirty" if files were changed, or the package's version."""
    from importlib.metadata import version  # slow to import

    root = Path(__file__).parents[1]
    if not (root / ".git").exists():  # installed from a wheel, perhaps inside another repository
        return version("rectify")
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # git is not installed, or fails
        return version("rectify")


def count_committed(folder: Path) -> int:
    """Return the newest step of a run, or the number of finished shards of a set.

    Of an evaluation under way it is the number of chunks of samples.
    """
    steps = [*files_by_step(folder / "checkpoints", ".ckpt")]
    if steps:
        return int(re.sub(r"\D", "", steps[-1].name))
    shards = sum(1 for _ in folder.glob("[0-9]*.json"))
    return shards or sum(1 for _ in folder.glob(".chunks-*.tmp/[0-9]*.safetensors"))


def describe_job() -> str:
    """Return the Slurm job of this process, "" without one."""
    variables = os.environ
    if "SLURM_ARRAY_JOB_ID" in variables:
        job = f"{variables['SLURM_ARRAY_JOB_ID']}_{variables.get('SLURM_ARRAY_TASK_ID', '')}"
    else:
        job = variables.get("SLURM_JOB_ID", "")
    restarts = variables.get("SLURM_RESTART_COUNT", "0")
    return f"{job}.{restarts}" if job and restarts != "0" else job


def describe_engine() -> str:
    """Return what gave this process its processes."""
    if "SLURM_JOB_ID" in os.environ:
        return "slurm"
    return "torchrun" if "TORCHELASTIC_RUN_ID" in os.environ else "local"


def describe_launch() -> str:
    """Return what the ranks of one launch have in common; other launches may have it, too."""
    return f"{os.environ.get('TORCHELASTIC_RUN_ID', '')} {describe_job()}".strip()


def read_attempts(folder: Path) -> list[Attempt]:
    """Return the attempts in a folder, in the order of their numbers.

    Raises:
        ValueError: a record is damaged; the message names it.
    """
    attempts = map(read_attempt, list_records(folder))
    return [attempt for attempt in attempts if attempt]


def list_records(folder: Path) -> list[Path]:
    """Return the files of the attempts in a folder, in the order of their numbers."""
    found = [path for path in (folder / "attempts").glob("*.json") if path.stem.isdecimal()]
    return sorted(found, key=lambda path: int(path.stem))


def read_attempt(path: Path) -> Attempt | None:
    """Return the attempt that a file records; None if its number was just taken.

    Raises:
        ValueError: the file is damaged; the message names it.
    """
    if path.stat().st_size == 0:
        return None
    content = read_json(path)
    check_schema(content, SCHEMA, str(path))
    end = content.pop("end")
    with errors_named(path):
        return Attempt(**content, end=End(**end) if end else None)


def read_heartbeat(folder: Path) -> Heartbeat | None:
    """Return the last heartbeat in a folder; None if there is none.

    Raises:
        ValueError: it is damaged; the message names the file.
    """
    path = folder / "heartbeat.json"
    try:
        content = read_json(path)
    except FileNotFoundError:
        return None
    check_schema(content, {"attempt": COUNT, "time": float, "quiet": float}, str(path))
    with errors_named(path):
        return Heartbeat(**content)


def hide_secrets(words: list[str]) -> list[str]:
    """Return a command's words without the values of options and keys named like secrets."""
    shown = []
    for before, word in zip(["", *words], words):
        if SECRET_OPTION.fullmatch(before) and not word.startswith("--"):
            word = "..."
        word = SECRET_VALUE.sub(r"\1...", word)
        shown.append(USER_OF_URL.sub("://...@", word))
    return shown


class Recorder:
    """Records one attempt, and writes heartbeats until it ends.

    Args:
        folder: where the records are.
        world: number of processes.
        work: folder whose steps or shards are counted, if it is another one.
        stop: what is done when the work is no longer wanted; by default this process gets SIGTERM.
        keep_refused: keep the record of a first attempt that was refused.
    """

    def __init__(
        self,
        folder: Path,
        world: int,
        work: Path | None = None,
        stop: Callable[[], None] | None = None,
        keep_refused: bool = False,
    ):
        self.folder = folder
        self.keep_refused = keep_refused
        self.work = work or folder
        self.stop = stop or stop_process
        self.is_new = not folder.exists()
        self.attempt = Attempt(
            number=self._take_number(),
            hosts=_hosts or [os.uname().nodename],
            engine=describe_engine(),
            job=describe_job(),
            world=world,
            revision=revision(),
            argv=hide_secrets(sys.argv[1:]),
            begin=round(time.time(), 3),
            committed=count_committed(self.work),
            launch=describe_launch(),
            space=process_space(),
            process=os.getpid(),
            started=process_start(os.getpid()),
            end=None,
        )
        self._write()
        self.earlier_meter = progress.current()  # of another command in this process
        self.ended = threading.Event()
        self.lock = threading.Lock()
        self.done = -1
        self.moved = time.monotonic()
        self.beat()
        threading.Thread(target=self._beat_until_end, daemon=True).start()

    def set_hosts(self, hosts: list[str]) -> None:
        """Record the hosts of all ranks."""
        self.attempt = self.attempt._replace(hosts=hosts)
        self._write()

    def end(self, code: int, line: str) -> None:
        """Record how the attempt ends; leave nothing of a first one that was refused."""
        with self.lock:
            self.ended.set()
        committed = count_committed(self.work)
        meter = progress.current()
        has_worked = committed > 0
        if meter and meter is not self.earlier_meter and meter.done > meter.first:
            has_worked = True
        is_refused = code == REFUSED_EXIT_CODE and self.attempt.number == 1 and not has_worked
        if is_refused and not self.keep_refused:
            self._remove()
            return
        with suppress(OSError):  # a full disk
            self.beat()
        if code in CONSEQUENCES or (code and not line):
            code, line = self._find_cause(code, line)
        end = End(code, line, round(time.time(), 3), committed)
        self.attempt = self.attempt._replace(end=end)
        self._write()

    def _find_cause(self, code: int, line: str) -> tuple[int, str]:
        """Return the exit code and the line of the rank whose failure ended this one, if any did.

        Args:
            code: of this rank.
            line: of this rank.
        """
        failures = []
        for path in self._rank_results():
            result = read_json(path)
            check_schema(result, {"code": COUNT, "line": str}, str(path))
            failures.append((CAUSES.index(result["code"]), result["code"], result["line"]))
        return min(failures)[1:] if failures else (code, line)

    def _rank_results(self) -> list[Path]:
        """Return the files in which other ranks left how they failed."""
        return sorted((self.folder / "attempts").glob(f"rank*-{self.attempt.number:04d}.json"))

    def beat(self) -> None:
        """Write a heartbeat."""
        meter = progress.current()
        if meter and meter.done != self.done:
            self.done = meter.done
            self.moved = time.monotonic()
        values = meter.values if meter else {}
        loss = values.get("loss")
        beat = Heartbeat(
            attempt=self.attempt.number,
            time=round(time.time(), 3),
            quiet=round(time.monotonic() - self.moved, 1),
            done=meter.done if meter else 0,
            total=meter.total if meter else 0,
            unit=meter.unit if meter else "",
            rate=round(meter.rate(), 3) if meter else 0.0,
            seconds_left=meter.seconds_left() if meter else None,
            committed=count_committed(self.work),
            loss=loss if loss is not None and isfinite(loss) else None,
            memory=peak_memory(),
            data_wait=values.get("data_wait"),
        )
        write_json(self.folder / "heartbeat.json", beat._asdict())

    def _beat_until_end(self) -> None:
        """Write heartbeats; stop the work when it is no longer wanted."""
        signalled = False
        pause = FIRST_BEAT_SECONDS
        while not self.ended.wait(min(pause, BEAT_SECONDS)):
            pause *= 2  # a user who looks right after the start finds out soon
            # The file server may be away for a moment, or the intent is just being written.
            with suppress(OSError), self.lock:
                if not self.ended.is_set():
                    self.beat()
            with suppress(OSError, ValueError):
                if not signalled and read_intent(self.folder).want != Want.RUN:
                    signalled = True
                    self.stop()

    def _remove(self) -> None:
        (self.folder / "heartbeat.json").unlink(missing_ok=True)
        for path in self._rank_results():
            path.unlink()
        for name in ("attempts", "logs"):
            for path in (self.folder / name).glob("0001*"):
                path.unlink()
            with suppress(OSError):  # there is none, or it holds files
                (self.folder / name).rmdir()
        if self.is_new:
            with suppress(OSError):  # it holds files
                self.folder.rmdir()

    def _take_number(self) -> int:
        """Take the next free number; no other command gets it."""
        attempts = self.folder / "attempts"
        attempts.mkdir(parents=True, exist_ok=True)
        number = 1 + max((int(path.stem) for path in list_records(self.folder)), default=0)
        while True:
            try:
                (attempts / f"{number:04d}.json").touch(exist_ok=False)
                return number
            except FileExistsError:
                number += 1

    def _write(self) -> None:
        end = self.attempt.end
        content = {**self.attempt._asdict(), "end": end._asdict() if end else None}
        write_json(self.folder / "attempts" / f"{self.attempt.number:04d}.json", content)


def stop_process() -> None:
    """Ask this process to stop, as the signal of a user would."""
    os.kill(os.getpid(), signal.SIGTERM)


def peak_memory() -> int:
    """Return the most bytes that this process has used, of the GPU if it uses one."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        devices = range(torch.cuda.device_count())  # a thread does not know which one is used
        return int(max(torch.cuda.max_memory_allocated(device) for device in devices))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


_recorders: list[Recorder] = []
_hosts: list[str] = []  # of all ranks; empty if they are not known
_last_line = ""
_rank_ends: list[Callable[[int], None]] = []  # what a rank other than 0 does at its end


def begin_attempt(folder: Path, world: int, rank: int) -> None:
    """Record that this command works in a folder, until `end_attempts`.

    Args:
        folder: the folder; it is made if there is none.
        world: number of processes.
        rank: of this process; rank 0 records, the others only keep their lines.
    """
    if rank:
        follow_attempt(folder, rank)
        return
    if any(recorder.folder == folder for recorder in _recorders):
        return
    if RESULTS not in os.environ:  # else the pipeline that started this command did it
        want_run(folder)
    recorder = Recorder(folder, world)
    _recorders.append(recorder)
    open_log(folder, rank, lambda: recorder.attempt.number)


def follow_attempt(folder: Path, rank: int) -> None:
    """Keep the lines of a rank other than 0, and how it failed; stop it when it is not wanted."""
    earliest = time.time() - JOINING_SECONDS
    find = partial(find_number, folder, describe_launch(), earliest)

    def leave_result(code: int) -> None:
        number = find()
        late = time.monotonic() + LATE_SECONDS
        while not number and code != REFUSED_EXIT_CODE and time.monotonic() < late:
            time.sleep(0.1)  # this rank had so little to do that rank 0 has just begun
            number = find()
        if number and code in CAUSES:
            path = folder / "attempts" / f"rank{rank:02d}-{number:04d}.json"
            write_json(path, {"code": code, "line": _last_line})

    _rank_ends.append(leave_result)
    open_log(folder, rank, find)
    threading.Thread(target=stop_unwanted, args=(folder,), daemon=True).start()


def open_log(folder: Path, rank: int, find: Callable[[], int]) -> None:
    """Keep what this rank prints in its file, as soon as the attempt is found.

    Args:
        folder: where the command works.
        rank: of this process.
        find: returns the number of the attempt, 0 if there is none yet.
    """

    def find_path() -> Path | None:
        number = find()
        return folder / "logs" / f"{number:04d}-rank{rank:02d}.txt" if number else None

    log = run_output.log
    if log.is_copied and not log.is_open:
        log.find_path = find_path
        log.search(now=True)


def find_number(folder: Path, launch: str, earliest: float) -> int:
    """Return the attempt that rank 0 of this launch has begun; 0 if it has not yet.

    Args:
        folder: where the command works.
        launch: of this process (`describe_launch`).
        earliest: when it may have begun.
    """
    for path in reversed(list_records(folder)):
        with suppress(ValueError, OSError):  # a damaged or vanished record is another command's
            attempt = read_attempt(path)
            if attempt and attempt.begin < earliest:
                break
            is_over = attempt and attempt.end and attempt.end.at < PROCESS_BEGIN
            if attempt and attempt.launch == launch and not is_over:
                return attempt.number
    return 0


def stop_unwanted(folder: Path) -> None:
    """Stop this rank when its work is no longer wanted; rank 0 has its recorder for that.

    Rank 0 overrides what was wanted before the command, so only a change counts.
    """
    before = read_intent(folder)
    while True:
        time.sleep(BEAT_SECONDS)
        with suppress(OSError, ValueError):  # the file server may be away for a moment
            intent = read_intent(folder)
            if intent.want != Want.RUN and intent != before:
                stop_process()
                return
            before = intent


def recorded_number(folder: Path) -> int:
    """Return the number of this command's attempt in a folder; 0 if it records none."""
    for recorder in _recorders:
        if recorder.folder.resolve() == folder.resolve():
            return recorder.attempt.number
    return 0


def set_hosts(hosts: list[str]) -> None:
    """Record the hosts of all ranks in the attempts of this command, now and later."""
    _hosts[:] = sorted(set(hosts))
    for recorder in _recorders:
        recorder.set_hosts(_hosts)
    with suppress(OSError):
        run_output.log.search(now=True)  # all ranks are here: the first has begun its attempt


def note_line(line: str) -> None:
    """Keep the line that a command ends with, for its record."""
    global _last_line
    _last_line = SECRET_ARGUMENT.sub(r"\1...", line)


def end_attempts(code: int) -> None:
    """Record the end of all attempts of this command, and leave the result for its launcher.

    Args:
        code: exit code.
    """
    while _recorders:
        with suppress(OSError, ValueError):  # a full disk: the exit code still tells
            _recorders.pop().end(code, _last_line)
    while _rank_ends:
        with suppress(OSError):
            _rank_ends.pop()(code)
    run_output.log.search(now=True)
    run_output.log.file.flush()
    results = os.environ.get(RESULTS)
    if results and sys.argv[1:2] != ["spread"]:  # its ranks leave theirs
        with suppress(OSError):
            rank = int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK", "0"))
            write_json(Path(results) / f"{rank:05d}.json", {"code": code, "line": _last_line})
    note_line("")


def exit_now(code: int, line: str) -> None:
    """End the process at once, from any thread, with the line of an error.

    Args:
        code: exit code.
        line: the error; "" if it is printed already.
    """
    if line:
        print(f"rectify: error: {line}", file=sys.stderr, flush=True)
    end_in_time(code, line)
    os._exit(code)


def end_in_time(code: int, line: str) -> None:
    """Record the end of all attempts, unless that takes too long: the file server may be away."""
    if line:
        note_line(line)
    record = threading.Thread(target=end_attempts, args=(code,), daemon=True)
    record.start()
    record.join(ENDING_SECONDS)


signals.before_exit.append(end_in_time)
