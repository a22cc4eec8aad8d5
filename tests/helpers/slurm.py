"""A real Slurm on this host: munged, slurmctld and a slurmd for each node, as a test fixture.

Each daemon runs in namespaces of its own (processes, mounts, hostname). A node therefore looks like
a host: `hostname` prints its name, which resolves on every node. Killing the namespace's first
process kills the daemon and everything that it has started, so nothing outlives a test, even a
test that is killed.
"""

import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from subprocess import DEVNULL

import pytest

from data.signals import end_with_parent

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "unshare")
NAMESPACES = ("unshare", "--fork", "--kill-child", "--pid", "--mount-proc", "--uts")

CONFIGURATION = """\
ClusterName=test{port}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
JobRequeue=1
MinJobAge=3600
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobcomp.log
KillWait={kill_wait}
SlurmdTimeout={lost_after}
SlurmctldTimeout=5
InactiveLimit=0
MessageTimeout={answer_within}
TCPTimeout=2
SlurmdParameters=config_overrides
PlugStackConfig=/dev/null
{nodes}
PartitionName=main Nodes=ALL Default=YES State=UP MaxTime=INFINITE
"""


def require_slurm() -> None:
    """Skip the test where Slurm's programs are absent or the user is not root."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    absent = [program for program in PROGRAMS if shutil.which(program, path=path) is None]
    if absent:
        pytest.skip(f"needs {', '.join(absent)}: apt-get install slurm-wlm munge")
    if os.geteuid() != 0:
        pytest.skip("needs root: Slurm's daemons start jobs as their users")
    if subprocess.run([*NAMESPACES, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to make namespaces (CAP_SYS_ADMIN)")


class SlurmCluster:
    """A Slurm cluster in a temporary folder, with free ports.

    Several clusters may run side by side.

    Args:
        nodes: number of nodes; their names are n1, n2, ...
        cpus: CPUs of each node, also more than this host has.
        kill_wait: seconds between TERM and KILL when a job is cancelled.
        lost_after: seconds without an answer after which a node is lost.
        answer_within: seconds after which a command gives up on slurmctld.
    """

    def __init__(
        self,
        nodes: int = 2,
        cpus: int = 4,
        kill_wait: int = 5,
        lost_after: int = 10,
        answer_within: int = 5,
    ):
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self.daemons: dict[str, subprocess.Popen] = {}
        # the path of a socket is short; munged serves from folders that others may enter
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.folder.chmod(0o755)
        (self.folder / "state").mkdir()
        self._write_key()
        self._write_hosts()
        self.configuration = self.folder / "slurm.conf"
        port, *ports = free_ports(nodes + 1)
        lines = [
            f"NodeName={name} NodeAddr=127.0.0.1 Port={number} CPUs={cpus} RealMemory=4000"
            for name, number in zip(self.nodes, ports)
        ]
        self.configuration.write_text(
            CONFIGURATION.format(
                host=socket.gethostname(),
                port=port,
                folder=self.folder,
                kill_wait=kill_wait,
                lost_after=lost_after,
                answer_within=answer_within,
                nodes="\n".join(lines),
            )
        )

    @property
    def environment(self) -> dict[str, str]:
        """The environment in which Slurm's commands reach this cluster, and only this one."""
        kept = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("SLURM", "SBATCH", "SCANCEL", "SQUEUE", "SALLOC"))
        }
        return {**kept, "SLURM_CONF": str(self.configuration)}

    def __enter__(self) -> "SlurmCluster":
        with ExitStack() as stack:
            stack.callback(self.close)
            self._start_munge()
            self.start_controller()
            for name in self.nodes:
                self.start_node(name, wait=False)
            self.wait_until_idle()
            stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill the daemons and all that they have started, and delete the folder."""
        for name in list(self.daemons):
            self._kill(name)
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, *words: object, check: bool = True) -> str:
        """Run a command, such as `sbatch`, and return what it prints, stripped.

        Args:
            words: the command's words.
            check: raise where it fails.
        """
        result = subprocess.run(
            [str(word) for word in words],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        if check and result.returncode:
            raise AssertionError(f"{words}: exit {result.returncode}\n{result.stderr}")
        return result.stdout.strip()

    def show(self, job: object) -> dict[str, str]:
        """Return the fields that `scontrol show job` prints of a job."""
        words = self.run("scontrol", "show", "job", "-o", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, job: object, states: str | Iterable[str], timeout: float = 30) -> str:
        """Wait until a job, or every task of an array, is in one of the states; return its state.

        Args:
            job: the job's number.
            states: names such as `RUNNING` or `COMPLETED`.
            timeout: seconds.
        """
        wanted = {states} if isinstance(states, str) else set(states)
        words = ("squeue", "--states=all", "--array", "--noheader", f"--jobs={job}", "--format=%T")
        end = time.monotonic() + timeout
        while True:
            found = self.run(*words).split()
            if found and wanted.issuperset(found):
                return found[0]
            if time.monotonic() > end:
                raise AssertionError(f"job {job} is {found}, not {wanted}\n{self.logs()}")
            time.sleep(0.1)

    def start_now(self, job: object) -> None:
        """Start a requeued, pending job about a second from now instead of six.

        Never within the same second: the nodes refuse a job that is not younger than its requeue,
        and it fails.
        """
        self.run("scontrol", "update", f"jobid={job}", "StartTime=now+1")

    def wait_until_idle(self, names: Sequence[str] = ()) -> None:
        """Wait until these nodes, or all, take jobs and run none."""
        listed = ",".join(names or self.nodes)
        words = ("sinfo", "--noheader", "--Node", f"--nodes={listed}", "--format=%t")
        self._wait(lambda: set(self.run(*words, check=False).split()) == {"idle"}, listed)

    def logs(self, lines: int = 20) -> str:
        """Return the last lines of the daemons' logs."""
        return "\n".join(
            f"{path.name}:\n" + "\n".join(path.read_text().splitlines()[-lines:])
            for path in sorted(self.folder.glob("*.out"))
        )

    def start_controller(self) -> None:
        """Start slurmctld; return when it answers."""
        self._start("slurmctld", ["slurmctld", "-D"])
        self._wait(lambda: self.run("scontrol", "ping", check=False).endswith("is UP"), "slurmctld")

    def stop_controller(self) -> None:
        """Stop slurmctld, which saves its state: no command gets an answer; jobs run on."""
        self.run("scontrol", "shutdown", "slurmctld")
        self.daemons["slurmctld"].wait(10)
        self._kill("slurmctld")

    @contextmanager
    def paused_controller(self) -> Iterator[None]:
        """Let slurmctld hang in the block: it takes requests and answers them only afterwards."""
        (shell,) = find_children(self.daemons["slurmctld"].pid)
        (slurmctld,) = find_children(shell)
        os.kill(slurmctld, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(slurmctld, signal.SIGCONT)

    def start_node(self, name: str, wait: bool = True) -> None:
        """Start a node's slurmd.

        Args:
            name: the node's name.
            wait: return when the node takes jobs.
        """
        self._start(name, ["slurmd", "-D", "-N", name])
        if wait:
            self.wait_until_idle([name])

    def stop_node(self, name: str, declare: bool = True) -> None:
        """Lose a node: kill its slurmd and all its processes by SIGKILL.

        Args:
            name: the node's name.
            declare: tell slurmctld at once; else it notices after about `lost_after` seconds.
        """
        self._kill(name)
        if declare:
            self.run("scontrol", "update", f"nodename={name}", "state=down", "reason=lost")

    def _write_key(self) -> None:
        """Write the key by which the daemons trust each other."""
        folder = self.folder / "munge"
        folder.mkdir(0o755)
        key = folder / "key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        for path in (folder, key):
            shutil.chown(path, "munge")

    def _write_hosts(self) -> None:
        """Write the file by which every node resolves the names of the nodes."""
        names = ["localhost", socket.gethostname(), *self.nodes]
        (self.folder / "hosts").write_text("".join(f"127.0.0.1 {name}\n" for name in names))

    def _start_munge(self) -> None:
        """Start munged as its user; return when it answers."""
        folder = self.folder / "munge"
        options = [
            f"--{name}-file={folder / name}" if name != "socket" else f"--socket={folder / name}"
            for name in ("key", "socket", "pid", "log", "seed")
        ]
        user = ["setpriv", "--reuid=munge", "--regid=munge", "--clear-groups"]
        self._start("munge", [*user, "munged", "--foreground", *options])
        self._wait((folder / "socket").exists, "munged")

    def _start(self, name: str, command: list[str]) -> None:
        """Start a daemon in its namespaces; it ends with this process.

        Args:
            name: hostname there, if it is a node's.
            command: the daemon's words.
        """
        host = name if name in self.nodes else socket.gethostname()
        # the shell is process 1: it takes on orphans, and ends when the daemon ends
        script = (
            f"hostname {host}; mount --bind {self.folder}/hosts /etc/hosts;"
            f' "$@" >>{self.folder}/{name}.out 2>&1 & wait $!'
        )
        environment = self.environment
        environment["PATH"] += ":/usr/sbin:/sbin"
        self.daemons[name] = subprocess.Popen(
            [*NAMESPACES, "sh", "-c", script, "sh", *command],
            env=environment,
            stdin=DEVNULL,
            stderr=DEVNULL,  # unshare's line about a killed child
            preexec_fn=end_with_parent,
            start_new_session=True,
        )

    def _kill(self, name: str) -> None:
        """Kill a daemon and everything in its namespace; return when all have ended."""
        daemon = self.daemons.pop(name)
        for child in find_children(daemon.pid):
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        daemon.wait(20)

    def _wait(self, ready: Callable[[], bool], name: str, timeout: float = 30) -> None:
        """Wait until a daemon is ready."""
        end = time.monotonic() + timeout
        while not ready():
            if time.monotonic() > end:
                raise AssertionError(f"{name} is not ready\n{self.logs()}")
            time.sleep(0.05)


def find_children(process: int) -> list[int]:
    """Return the ids of the processes that a process has started; none when it has ended."""
    with suppress(OSError):
        children = Path(f"/proc/{process}/task/{process}/children")
        return [int(word) for word in children.read_text().split()]
    return []


def free_ports(count: int) -> list[int]:
    """Return free ports, below those that Linux gives to clients."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.SystemRandom().randrange(10000, 32000)
        with socket.socket() as server, suppress(OSError):
            server.bind(("127.0.0.1", port))
            ports += [port] * (port not in ports)
    return ports
