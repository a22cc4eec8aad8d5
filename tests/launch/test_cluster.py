"""What the Slurm launcher relies on, checked against a real Slurm of two nodes.

Slurm's manual leaves most of it open: which processes a signal reaches, what a requeue keeps, what
the commands print and return when the controller is away.
"""

import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.commands import REPOSITORY
from tests.helpers.slurm import SlurmCluster, require_slurm

pytestmark = pytest.mark.service

# A task logs the signals that it gets and exits with the code that its node has after USR1 or TERM.
TASK = """\
import os, signal, sys, time

node = os.environ["SLURMD_NODENAME"]

def stop(number, frame):
    print(node, "got", signal.Signals(number).name, flush=True)
    os._exit(int(sys.argv[1 + int(os.environ["SLURM_PROCID"])]))

signal.signal(signal.SIGUSR1, stop)
signal.signal(signal.SIGTERM, stop)
print(node, "starts", flush=True)
time.sleep(60)
"""

# The process of a batch script: it forwards signals to srun, reads the job's state, requeues it.
BATCH = """\
import os, signal, subprocess, sys

srun = subprocess.Popen(["srun", "--export=ALL", sys.executable, *sys.argv[2:]])
signal.signal(signal.SIGTERM, lambda *_: None)
signal.signal(signal.SIGUSR1, lambda *_: srun.send_signal(signal.SIGUSR1))
code = srun.wait()
job = os.environ["SLURM_JOB_ID"]
state = subprocess.run(["squeue", "-h", "-j", job, "-o", "%T"], capture_output=True, text=True)
print("restart", os.environ.get("SLURM_RESTART_COUNT"), "exit", code, state.stdout, flush=True)
if sys.argv[1] == "requeue":
    subprocess.run(["scontrol", "requeue", job], check=True)
sys.exit(code)
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    require_slurm()
    with SlurmCluster(answer_within=3) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def free_nodes(cluster: SlurmCluster) -> Iterator[None]:
    """Leave no job behind for the next test."""
    yield
    cluster.run("scancel", "--signal=KILL", "--full", "--user=root")
    cluster.run("scancel", "--user=root")
    cluster.wait_until_idle()


def submit(cluster: SlurmCluster, *options: object, command: str = "true") -> str:
    """Submit a command as a job and return the job's number."""
    words = ("sbatch", "--parsable", "--output=/dev/null", *options)
    return cluster.run(*words, "--wrap", command)


def submit_tasks(cluster: SlurmCluster, folder: Path, then: str, *codes: int) -> tuple[str, Path]:
    """Submit two tasks, one on each node, and return the job's number and its log.

    Args:
        cluster: where.
        folder: of the scripts and the log.
        then: `requeue` to requeue the job at its end.
        codes: exit code of each task after a signal.
    """
    (folder / "task.py").write_text(TASK)
    (folder / "batch.py").write_text(BATCH)
    words = " ".join(map(str, codes))
    command = f"exec {sys.executable} {folder}/batch.py {then} {folder}/task.py {words}"
    log = folder / "log.txt"
    options = ("--nodes=2", "--ntasks-per-node=1", "--open-mode=append", f"--output={log}")
    job = submit(cluster, "--export=NONE", *options, command=command)
    wait_for_text(log, "n1 starts", "n2 starts")
    return job, log


def wait_for(ready: Callable[[], bool], name: str, timeout: float = 30) -> None:
    """Wait until something is true."""
    end = time.monotonic() + timeout
    while not ready():
        assert time.monotonic() < end, name
        time.sleep(0.05)


def wait_for_text(path: Path, *texts: str) -> None:
    """Wait until a file holds the texts."""
    wait_for(
        lambda: path.exists() and all(text in path.read_text() for text in texts),
        f"{texts} in {path}",
    )


@pytest.mark.parametrize("codes, code", [((75, 75), 75), ((2, 4), 4), ((75, 2), 75)])
def test_user_signal_reaches_tasks_of_all_nodes_and_srun_returns_largest_code(
    cluster: SlurmCluster, tmp_path: Path, codes: tuple[int, int], code: int
) -> None:
    job, log = submit_tasks(cluster, tmp_path, "end", *codes)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    cluster.wait_for(job, "FAILED")
    text = log.read_text()
    assert "n1 got SIGUSR1" in text and "n2 got SIGUSR1" in text
    assert f"restart None exit {code} RUNNING" in text
    assert cluster.show(job)["ExitCode"] == f"{code}:0"


def test_requeued_job_keeps_its_id_log_and_dependants(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    job, log = submit_tasks(cluster, tmp_path, "requeue", 75, 75)
    dependant = submit(cluster, f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes")
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    cluster.wait_for(job, "PENDING")
    cluster.start_now(job)
    cluster.wait_for(job, "RUNNING")
    wait_for(lambda: log.read_text().count("n1 starts") == 2, "second start")
    assert "restart None exit 75 RUNNING" in log.read_text()
    assert cluster.show(job)["Restarts"] == "1"
    assert cluster.show(dependant)["JobState"] == "PENDING"


def test_cancelled_job_is_completing_and_its_script_could_requeue_it(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    """TERM reaches the batch process and all tasks; only the state shows that it is a cancel."""
    job, log = submit_tasks(cluster, tmp_path, "end", 75, 75)
    cluster.run("scancel", job)
    cluster.wait_for(job, "CANCELLED")
    text = log.read_text()
    assert "n1 got SIGTERM" in text and "n2 got SIGTERM" in text
    assert "restart None exit 75 COMPLETING" in text
    (tmp_path / "requeue").mkdir()
    job, log = submit_tasks(cluster, tmp_path / "requeue", "requeue", 75, 75)
    cluster.run("scancel", job)
    cluster.wait_for(job, "PENDING")


def test_tasks_get_the_scripts_environment_only_by_export_all(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    log = tmp_path / "log.txt"
    script = tmp_path / "job.sh"
    script.write_text(
        "#!/bin/bash\n"
        f"#SBATCH --export=NONE --nodes=2 --output={log}\n"
        "export ADDED=1\n"
        "srun --export=ALL bash -c 'echo \"task [$ADDED$SECRET]\"'\n"
        "srun bash -c true\n"
    )
    submission = {**cluster.environment, "SECRET": "2"}
    words = ["sbatch", "--parsable", str(script)]
    job = subprocess.run(words, env=submission, capture_output=True, text=True).stdout.strip()
    cluster.wait_for(job, "FAILED")
    assert log.read_text().count("task [1]\n") == 2
    assert "execve(): bash: No such file or directory" in log.read_text()


def test_dependencies_on_failed_cancelled_and_unknown_jobs(cluster: SlurmCluster) -> None:
    failed = submit(cluster, command="exit 3")
    array = submit(cluster, "--array=0-2", command="sleep 2")
    kill = "--kill-on-invalid-dep=yes"
    first = submit(cluster, f"--dependency=afterok:{failed}", kill)
    second = submit(cluster, f"--dependency=afterok:{first}", kill)
    all_tasks = submit(cluster, f"--dependency=afterok:{array}", kill)
    any_end = submit(cluster, f"--dependency=afterany:{array}", kill)
    unknown = submit(cluster, "--dependency=afterok:99999", kill)
    time.sleep(0.5)
    cluster.run("scancel", f"{array}_1")
    for job in (first, second, all_tasks):
        cluster.wait_for(job, "CANCELLED")
        assert cluster.show(job)["Reason"] == "DependencyNeverSatisfied"
    cluster.wait_for(any_end, "COMPLETED")
    cluster.wait_for(unknown, "COMPLETED")  # a job that Slurm has forgotten counts as finished


def test_range_of_nodes_takes_what_is_free_and_goes_on_without_a_lost_node(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    log = tmp_path / "log.txt"
    command = (
        "srun -N $SLURM_JOB_NUM_NODES --ntasks-per-node=1 --export=ALL "
        "bash -c 'echo task $SLURM_PROCID of $SLURM_NTASKS on $(hostname); sleep 60'"
    )
    options = ("--nodes=1-8", "--cpus-per-task=4", "--open-mode=append", f"--output={log}")
    job = submit(cluster, *options, command=command)
    wait_for_text(log, "task 0 of 2 on n1", "task 1 of 2 on n2")
    try:
        cluster.stop_node("n2")
        cluster.wait_for(job, "PENDING")
        cluster.start_now(job)
        wait_for_text(log, "task 0 of 1 on n1")
    finally:
        cluster.start_node("n2", wait=False)
    assert cluster.show(job)["Restarts"] == "1"
    # with a number of tasks per node, Slurm takes no more nodes than it must
    cluster.run("scancel", job)
    cluster.wait_until_idle()
    options = ("--nodes=1-8", "--ntasks-per-node=1", "--cpus-per-task=4")
    job = submit(cluster, *options, command="sleep 60")
    cluster.wait_for(job, "RUNNING")
    assert cluster.show(job)["NumNodes"] == "1"


def test_failing_task_stops_the_others_by_term(cluster: SlurmCluster, tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text(TASK)
    log = tmp_path / "log.txt"
    task = (
        f"[ $SLURM_PROCID = 1 ] && sleep 1 && exit 2; exec {sys.executable} {tmp_path}/task.py 75"
    )
    command = f"srun --kill-on-bad-exit=1 --export=ALL bash -c '{task}'; exit $?"
    job = submit(cluster, "--nodes=2", f"--output={log}", command=command)
    cluster.wait_for(job, "FAILED")
    assert "n1 got SIGTERM" in log.read_text()
    assert cluster.show(job)["ExitCode"] == "75:0"  # the 2 of the task that failed is not shown


def test_jobs_are_found_by_name_while_slurm_remembers_them(cluster: SlurmCluster) -> None:
    names = ("--noheader", "--states=all", "--array", "--format=%F|%K|%T|%j", "--name")
    assert cluster.run("squeue", *names, "rectify-abc/fit") == ""
    job = submit(cluster, "--job-name=rectify-abc/fit")
    cluster.wait_for(job, "COMPLETED")
    assert (
        cluster.run("squeue", *names, "rectify-abc/fit") == f"{job}|N/A|COMPLETED|rectify-abc/fit"
    )
    assert cluster.run("squeue", *names, "rectify-abc") == ""
    job = submit(cluster, "--job-name=array", "--array=0-3%1", command="sleep 60")
    cluster.wait_for(f"{job}_0", "RUNNING")
    lines = set(cluster.run("squeue", *names, "array").splitlines())
    assert lines == {f"{job}|0|RUNNING|array"} | {f"{job}|{i}|PENDING|array" for i in (1, 2, 3)}


@pytest.mark.parametrize(
    "option, line",
    [
        ("--nodes=3", "allocation failure: Requested node configuration is not available"),
        ("--cpus-per-task=99", "allocation failure: Requested node configuration is not available"),
        ("--mem=99G", "allocation failure: Requested node configuration is not available"),
        ("--gpus-per-node=1", "Invalid generic resource (gres) specification"),
        ("--partition=none", "allocation failure: Invalid partition name specified"),
    ],
)
def test_resources_that_can_never_fit_are_refused_by_a_test(
    cluster: SlurmCluster, option: str, line: str
) -> None:
    words = ["sbatch", "--test-only", option, "--wrap", "true"]
    result = run_raw(cluster, words)
    assert result.returncode == 1 and line in result.stderr
    result = run_raw(cluster, ["sbatch", "--test-only", "--nodes=1-8", "--wrap", "true"])
    assert result.returncode == 0
    assert re.search(r"Job \d+ to start at \S+ using 2 processors on nodes n\[1-2\]", result.stderr)


def run_raw(cluster: SlurmCluster, words: list[str]) -> subprocess.CompletedProcess:
    """Run a command, which may fail."""
    return subprocess.run(words, env=cluster.environment, capture_output=True, text=True)


COMMANDS = (
    ["squeue", "--noheader"],
    ["scontrol", "show", "job", "-o", "1"],
    ["sbatch", "--job-name=hanging", "--output=/dev/null", "--wrap", "true"],
    ["scancel", "1"],
    ["scontrol", "ping"],
)


def test_commands_fail_without_controller_and_jobs_run_on(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    log = tmp_path / "log.txt"
    submit(cluster, f"--output={log}", command="echo starts; sleep 3; echo lives; sleep 60")
    wait_for_text(log, "starts")
    cluster.stop_controller()
    try:
        for words in COMMANDS:
            result = run_raw(cluster, words)
            assert result.returncode != 0
            line = "is DOWN" if "ping" in words else "Unable to contact slurm controller"
            assert line in result.stdout + result.stderr
        wait_for_text(log, "lives")
    finally:
        cluster.start_controller()


def test_submission_that_got_no_answer_may_have_made_a_job(cluster: SlurmCluster) -> None:
    with cluster.paused_controller():
        result = run_raw(cluster, COMMANDS[2])
        assert result.returncode == 1 and "Socket timed out" in result.stderr
    time.sleep(0.5)
    names = cluster.run("squeue", "--noheader", "--states=all", "--name=hanging", "--format=%j")
    assert names == "hanging"


def test_killed_test_leaves_no_process() -> None:
    """Nothing outlives the process that holds the cluster, not even a job that ignores TERM."""
    code = (
        "from tests.helpers.slurm import SlurmCluster\n"
        "with SlurmCluster() as cluster:\n"
        "    words = ('sbatch', '--parsable', '--output=/dev/null', '--wrap')\n"
        "    job = cluster.run(*words, 'trap \"\" TERM; sleep 98765')\n"
        "    cluster.wait_for(job, 'RUNNING')\n"
        "    print(cluster.folder, flush=True)\n"
        "    input()\n"
    )
    words = [sys.executable, "-c", code]
    process = subprocess.Popen(words, cwd=REPOSITORY, stdin=-1, stdout=-1, text=True)
    folder = process.stdout.readline().strip()
    assert len(find_processes(folder)) > 4
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(lambda: not find_processes(folder), "end of all processes")
    shutil.rmtree(folder)


def find_processes(folder: str) -> list[str]:
    """Return the processes whose environment names the folder of a cluster."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if f"SLURM_CONF={folder}/".encode() in (path / "environ").read_bytes():
                found.append((path / "cmdline").read_text())
        except OSError:
            continue  # it has just ended
    return found
