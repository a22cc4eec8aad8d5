"""What a process knows of its launcher: torchrun, `rectify spread`, Slurm's srun, or Lightning.

Every launcher is translated into torch's variables (RANK, WORLD_SIZE, ...), which all verbs follow.
Variables that are left over from another process are removed: nothing waits for ranks that nobody
started.
"""

import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from data.attempts import CAUSES, CONSEQUENCES, exit_now
from data.files import digest
from data.signals import end_with_parent, stop_requested

LAUNCHER = "RECTIFY_LAUNCHER"  # the process of ours that started the ranks; they end with it
CHOSEN_PORT = "RECTIFY_MASTER_PORT"  # the port, if it was chosen here
FIRST_PORT = 15000
PORTS = 15000  # up to those that Linux gives to clients
COMPLETE = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
RANK_VARIABLES = (*COMPLETE, "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK")
OTHER_RANKS = ("SLURM_PROCID", "JSM_NAMESPACE_RANK")  # where Lightning looks for RANK, too
# Of mpirun, which is no launcher here; accelerate would follow them.
MPI_VARIABLES = (
    *("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    *("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK"),
    *("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID"),
)
SHARED_VERBS = ("fit", "encode", "collect", "invert", "evaluate")
LEASED_VERBS = ("encode", "collect", "invert", "evaluate")  # that independent workers can share
WAITING_SECONDS = 30  # for other ranks, before a line says so
CONNECTING_SECONDS = 600  # for other ranks, before the process ends
LOST_RANK_EXIT_CODE = 4
KILLED_EXIT_CODE = 137  # 128 + SIGKILL, which is what a lack of memory looks like

# Messages of torch: of another rank that has ended, of a port in use, of a dead reading process.
LOST_RANK = r"(?i)closed by peer|reset by peer|connection refused|broken pipe|NCCL|timed out"
PORT_IN_USE = r"(?i)EADDRINUSE|address already in use"
LOST_READER = r"DataLoader worker \(pid\D*([\d, ]+)\) (?:is killed|exited)"


class Launch(NamedTuple):
    """The processes that a launcher started, of which this is one."""

    rank: int
    world: int  # processes on all nodes
    devices: int  # processes on this node
    nodes: int


def end_with_launcher() -> None:
    """If a process of ours started this rank, end when that process is killed: no orphan."""
    if _is_started_by_us():
        end_with_parent()
    launcher = os.environ.get(LAUNCHER)
    if launcher and not os.path.exists(f"/proc/{launcher}"):  # it has been killed meanwhile
        text = f"process {launcher}, which {LAUNCHER} names as this one's launcher, has ended"
        exit_now(KILLED_EXIT_CODE, f"{text}; start it again")


def _is_started_by_us() -> bool:
    return os.environ.get(LAUNCHER) == str(os.getppid())


def adopt_launcher(verb: str) -> None:
    """Translate the launcher's variables into torch's; remove those that are left over.

    Args:
        verb: what this process is to do.

    Raises:
        ValueError: the variables contradict each other, or the verb is not one for several
            processes; the message names them.
    """
    environment = os.environ
    if is_started_by_lightning():
        return  # its variables differ from torch's
    if verb == "spread":  # it is a launcher itself, one on each node
        for name in RANK_VARIABLES:
            environment.pop(name, None)
        return
    if "TORCHELASTIC_RUN_ID" not in environment and _is_task_of_slurm():
        _translate_slurm()

    # Variables of which some are missing were left in the shell.
    given = [name for name in (*RANK_VARIABLES, *MPI_VARIABLES) if name in environment]
    if not set(COMPLETE) <= set(given):
        for name in (*given, *OTHER_RANKS):
            environment.pop(name, None)
        if set(given) - {"MASTER_ADDR", "MASTER_PORT"}:
            text = f"ignoring {', '.join(given)}, since not all of {', '.join(COMPLETE)} are set"
            print(f"rectify: {text}: no launcher started this process", file=sys.stderr)
        return

    # What is missing follows from the others.
    rank = read_number("RANK", 0)
    world = read_number("WORLD_SIZE", 1)
    if rank >= world:
        raise ValueError(f"RANK is {rank}, and WORLD_SIZE is {world}; RANK must be less")
    devices = read_number("LOCAL_WORLD_SIZE", 1)
    environment.setdefault("LOCAL_WORLD_SIZE", str(devices))
    environment.setdefault("LOCAL_RANK", str(rank % devices))
    environment.setdefault("GROUP_RANK", str(rank // devices))
    if read_number("LOCAL_RANK", 0) >= devices:
        raise ValueError(
            f"LOCAL_RANK is {environment['LOCAL_RANK']}, and LOCAL_WORLD_SIZE is {devices}; "
            "LOCAL_RANK must be less"
        )
    if world % devices:
        raise ValueError(
            f"WORLD_SIZE is {world}, and LOCAL_WORLD_SIZE is {devices}; "
            "start the same number of processes on every node"
        )
    if world > 1:
        if verb not in SHARED_VERBS:
            raise ValueError(
                f"{verb} runs in one process, and WORLD_SIZE is {world}; "
                "start it without a launcher, or unset WORLD_SIZE "
                f"(for several processes: {', '.join(SHARED_VERBS)})"
            )
        threading.Thread(target=limit_waiting, daemon=True).start()


def read_number(name: str, least: int) -> int:
    """Return the value of a variable, `least` if it is not set.

    Raises:
        ValueError: it is no number from `least` on.
    """
    text = os.environ.get(name, str(least))
    if not text.isdecimal() or int(text) < least:
        raise ValueError(f"{name} is {text!r}; it must be a number, at least {least}")
    return int(text)


def find_launch() -> Launch | None:
    """Return the processes that a launcher started; None if this process is on its own."""
    if not set(COMPLETE) <= os.environ.keys():
        return None
    world = read_number("WORLD_SIZE", 1)
    devices = read_number("LOCAL_WORLD_SIZE", 1)
    return Launch(read_number("RANK", 0), world, devices, world // devices)


def is_started_by_lightning() -> bool:
    """Whether a `rectify fit` of one process started this one as another rank."""
    is_other_rank = os.environ.get("LOCAL_RANK", "0") != "0"
    return is_other_rank and _is_started_by_us() and "TORCHELASTIC_RUN_ID" not in os.environ


def is_first_rank() -> bool:
    """Whether this process is rank 0, or on its own."""
    launch = find_launch()
    return not is_started_by_lightning() and (launch is None or launch.rank == 0)


@contextmanager
def owning_ranks() -> Iterator[None]:
    """Inside the block, ranks that this process starts end with it."""
    before = os.environ.get(LAUNCHER)
    os.environ[LAUNCHER] = str(os.getpid())
    try:
        yield
    finally:
        os.environ.pop(LAUNCHER)
        if before is not None:
            os.environ[LAUNCHER] = before


def _is_task_of_slurm() -> bool:
    """Whether srun started this process, or one that it descends from, with others.

    A shell that was opened in an earlier step keeps the step's variables, but is no task of it.
    """
    if read_number("SLURM_STEP_NUM_TASKS", 1) == 1 or "SLURM_PROCID" not in os.environ:
        return False
    task = read_number("SLURM_TASK_PID", 1)
    process = os.getpid()
    while process not in (0, task):
        with open(f"/proc/{process}/stat") as file:
            process = int(file.read().rpartition(")")[2].split()[1])  # its parent
    return process == task


def _translate_slurm() -> None:
    """Set torch's variables from those of a Slurm step; MASTER_* that are given stay."""
    environment = os.environ
    node = read_number("SLURM_NODEID", 0)
    tasks: list[str] = []
    counts = environment["SLURM_STEP_TASKS_PER_NODE"]  # e.g. 2(x3),1
    for number, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts):
        tasks += [number] * int(times or 1)
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = environment["SLURM_STEP_NUM_TASKS"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    environment["LOCAL_WORLD_SIZE"] = tasks[node]
    environment["GROUP_RANK"] = str(node)

    # The first node of the step; a port that all of its tasks know.
    nodes = environment.get("SLURM_STEP_NODELIST", socket.gethostname())
    first = re.sub(r"\[(\d+)[^]]*\]", r"\1", nodes).partition(",")[0]
    environment.setdefault("MASTER_ADDR", first)
    if "MASTER_PORT" not in environment:
        # another one after a requeue: it may be in use
        names = ("CLUSTER_NAME", "JOB_ID", "STEP_ID", "RESTART_COUNT")
        step = " ".join(environment.get(f"SLURM_{name}", "") for name in names)
        port = FIRST_PORT + int(digest(step.encode())[:8], 16) % PORTS
        environment["MASTER_PORT"] = environment[CHOSEN_PORT] = str(port)


def limit_waiting() -> None:
    """Print which ranks this one waits for; end the process if they do not come."""
    rank, world, address, port = (os.environ[name] for name in COMPLETE)
    where = f"MASTER_ADDR {address}, MASTER_PORT {port}"
    text = f"rank {rank} waits for the other ranks (WORLD_SIZE is {world}) at {where}"
    connecting = 0
    while not _is_connected():
        time.sleep(1)
        connecting = connecting + 1 if _is_connecting() else 0
        if connecting == WAITING_SECONDS:
            print(f"rectify: {text}", file=sys.stderr, flush=True)
        if connecting == CONNECTING_SECONDS:
            advice = "start them all again, or unset RANK and WORLD_SIZE to run one process"
            # the main thread does not return from connecting
            exit_now(LOST_RANK_EXIT_CODE, f"{text} no longer; {advice}")


def _is_connected() -> bool:
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not hasattr(distributed, "is_initialized"):
        return False  # the main thread imports it
    return bool(distributed.is_initialized())


def _is_connecting() -> bool:
    """Whether the main thread is in torch's code that connects ranks."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame:
        if frame.f_code.co_filename.endswith("torch/distributed/rendezvous.py"):
            return True
        frame = frame.f_back
    return False


def is_spread() -> bool:
    """Whether `rectify spread` started this process, which prints the line of the rank at fault."""
    return _is_started_by_us() and "TORCHELASTIC_RUN_ID" in os.environ


def ends_with_others() -> bool:
    """Whether `rectify spread` ends this rank because another one of its node has failed."""
    for _ in range(20):
        if stop_requested():
            return True
        time.sleep(0.1)
    return False


def order_of_causes(code: int) -> int:
    """Return the key by which the exit code of a cause sorts before those of its consequences."""
    if code in CAUSES:
        return CAUSES.index(code)
    if code in CONSEQUENCES:
        return len(CAUSES) + 1 + CONSEQUENCES.index(code)
    return len(CAUSES)  # ended by a signal


class LostProcess(NamedTuple):
    """Why a process cannot go on without another one that has ended."""

    message: str
    code: int  # exit code


def explain_lost_process(error: BaseException, world: int) -> LostProcess | None:
    """Return what to do if an error says that another process has ended, else None.

    Args:
        error: raised by torch, or by the connection to a reading process.
        world: number of ranks.
    """
    text = " ".join(str(_find_lost_reader(error)).split())
    reader = re.search(LOST_READER, text)
    if reader:
        message = f"a reading process (pid {reader[1].strip()}) was killed, perhaps for memory"
        advice = "run the same command again, with fewer data.workers if it happens again"
        return LostProcess(f"{message}; {advice}", KILLED_EXIT_CODE)
    if world == 1 or not isinstance(error, RuntimeError):
        return None
    if re.search(PORT_IN_USE, text):
        port = os.environ.get("MASTER_PORT", "of rank 0")
        if os.environ.get(CHOSEN_PORT) == port:
            text = f"port {port} of rank 0 is in use; run the same command again"
            return LostProcess(text, LOST_RANK_EXIT_CODE)
        advice = "choose another, or end the process that uses it"
        return LostProcess(f"MASTER_PORT {port} is in use; {advice}", 2)
    if re.search(LOST_RANK, text):
        message = f"another rank ended ({text[:200]}); run the same command again"
        return LostProcess(message, LOST_RANK_EXIT_CODE)
    return None


def _find_lost_reader(error: BaseException) -> BaseException:
    """Return torch's error if a reading process was killed, else the given error.

    One that is killed while it hands a batch over is an error of its connection.
    """
    if isinstance(error, OSError | EOFError) and "torch" in sys.modules:
        try:
            sys.modules["torch"]._C._error_if_any_worker_fails()
        except RuntimeError as lost:
            return lost
    return error


def kill_children() -> None:
    """Kill this process's reading processes: they ignore the signals that end it."""
    if "multiprocessing" in sys.modules:
        for child in sys.modules["multiprocessing"].active_children():
            child.kill()
