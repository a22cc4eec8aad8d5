"""Launchers: the Trainer follows their processes; what is left over of another is removed."""

import inspect
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch
from lightning.pytorch.strategies.launchers import subprocess_script
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from deploy import launched_trainer, launcher
from deploy.launched_trainer import count_devices, follow_launcher
from deploy.launcher import (
    LAUNCHER,
    MPI_VARIABLES,
    OTHER_RANKS,
    RANK_VARIABLES,
    adopt_launcher,
    explain_lost_process,
    find_launch,
    is_first_rank,
)
from deploy.spread import explain_failures
from tests.distributed.runs import tiny_fit_words
from tests.helpers.commands import run_command
from tests.helpers.refusals import PREFIX, assert_refused, refused
from tests.helpers.training import QUIET

OPTIONS = {"devices": "auto", "num_nodes": 1, "strategy": "auto", "plugins": None}
TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
}
SRUN = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
    "SLURM_STEP_NODELIST": "gpu[07-08,11]",
    "SLURM_NTASKS": "6",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Return a function that sets variables, in an environment without a launcher's."""
    for name in os.environ:
        if name.startswith(("SLURM_", "TORCHELASTIC_")):
            monkeypatch.delenv(name)
    for name in (*RANK_VARIABLES, *OTHER_RANKS, *MPI_VARIABLES, LAUNCHER):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)

    def set_variables(variables, **more):
        for name, value in {**variables, **more}.items():
            monkeypatch.setenv(name, str(value))

    return set_variables


def test_the_trainer_follows_the_launcher(environment):
    environment(TORCHRUN)
    adopt_launcher("fit")
    assert find_launch() == (3, 4, 2, 2)
    assert not is_first_rank()
    followed = follow_launcher(OPTIONS)
    assert (followed["devices"], followed["num_nodes"], followed["strategy"]) == (2, 2, "ddp")
    assert followed["plugins"][0].world_size() == 4
    given = follow_launcher({**OPTIONS, "devices": "2", "num_nodes": 2, "strategy": "fsdp2"})
    assert "devices" not in given and "strategy" not in given


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [("devices", 4, "2 processes"), ("devices", "0,1,2", "0,1,2"), ("num_nodes", 3, "2 nodes")],
)
def test_what_contradicts_the_launcher_is_refused(environment, option, value, named):
    environment(TORCHRUN)
    adopt_launcher("fit")
    with refused(f"trainer.{option}", value, named, kind=ValueError):
        follow_launcher({**OPTIONS, option: value})


@pytest.mark.parametrize(
    ("devices", "number"),
    [("auto", None), (-1, None), (2, 2), ("2", 2), ("0,1", 2), ("0,", 1), ([0, 3, 4], 3)],
)
def test_devices_are_counted_as_lightning_counts_them(devices, number):
    assert count_devices(devices) == number


@pytest.mark.parametrize(
    ("command", "code", "lines"), [("kill -KILL $$", 137, 1), ("exit 3", 3, 0), ("true", None, 0)]
)
def test_a_failed_rank_that_lightning_started_ends_the_others(
    monkeypatch, capfd, command, code, lines
):
    """Lightning would kill the first rank without a line."""
    codes = []
    monkeypatch.setattr(launched_trainer, "WATCH_SECONDS", 0.01)
    monkeypatch.setattr(launched_trainer, "LAST_SECONDS", 0.01)
    monkeypatch.setattr(os, "_exit", codes.append)
    other = "sleep 60" if code else "true"
    ranks = [subprocess.Popen(["sh", "-c", f"exec {other}"])]
    ranks.append(subprocess.Popen(["sh", "-c", command]))
    launched_trainer.end_with_failed_rank(ranks)
    for rank in ranks:
        rank.wait()
    assert codes == ([code] if code else [])
    err = capfd.readouterr().err
    assert err.count("\n") == lines
    assert not lines or f"rank 2 (pid {ranks[1].pid})" in err and "SIGKILL" in err
    launch = inspect.getsource(subprocess_script._SubprocessScriptLauncher.launch)
    assert "_launch_process_observer(self.procs)" in launch


def test_several_nodes_need_a_launcher():
    with refused("trainer.num_nodes", 2, "rectify spread", kind=ValueError):
        follow_launcher({**OPTIONS, "num_nodes": 2})


@pytest.mark.parametrize(
    "left",
    [
        {"LOCAL_RANK": 1},
        {"NODE_RANK": 1},
        {"WORLD_SIZE": 2},
        {"RANK": 1, "WORLD_SIZE": 2},
        {"PMI_SIZE": 2},
    ],
)
def test_variables_that_are_left_over_are_removed_with_a_line(environment, capsys, left):
    environment(left, MASTER_PORT=1, SLURM_PROCID=1)
    adopt_launcher("fit")
    assert not set(os.environ) & {*RANK_VARIABLES, *OTHER_RANKS, *MPI_VARIABLES}
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert all(name in line for name in left)
    assert find_launch() is None and is_first_rank()


def test_waiting_for_other_ranks_has_a_line_and_an_end(environment, monkeypatch, capsys):
    def end(code):
        raise SystemExit(code)

    environment(TORCHRUN)
    monkeypatch.setattr(launcher.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(launcher.os, "_exit", end)
    monkeypatch.setattr(launcher, "_is_connecting", lambda: True)
    with pytest.raises(SystemExit) as ended:
        launcher.limit_waiting()
    assert ended.value.code == 4
    first, last = capsys.readouterr().err.splitlines()
    for line in (first, last):
        assert all(name in line for name in ("rank 3", "WORLD_SIZE is 4", "MASTER_PORT 29500"))
    assert last.startswith(PREFIX)


def test_a_rank_of_a_launcher_that_was_killed_before_ends():
    code = "import deploy.launcher; deploy.launcher.end_with_launcher()"
    variables = {**os.environ, LAUNCHER: str(2**22 - 1)}
    assert subprocess.run([sys.executable, "-c", code], env=variables).returncode == 137


def test_a_complete_set_of_variables_is_a_launcher(environment):
    """As an operator of Kubernetes sets it, with one process in each pod."""
    environment({"RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "pod-0", "MASTER_PORT": 23456})
    adopt_launcher("collect")
    assert find_launch() == (1, 2, 1, 2)
    assert (os.environ["LOCAL_RANK"], os.environ["GROUP_RANK"]) == ("0", "1")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"RANK": 4}, ("RANK", 4, "WORLD_SIZE")),
        ({"RANK": "x"}, ("RANK", "x")),
        ({"WORLD_SIZE": 0}, ("WORLD_SIZE", 0)),
        ({"LOCAL_RANK": 2}, ("LOCAL_RANK", 2, "LOCAL_WORLD_SIZE")),
        ({"WORLD_SIZE": 5}, ("WORLD_SIZE", 5, "LOCAL_WORLD_SIZE", 2)),
    ],
)
def test_variables_that_contradict_each_other_are_refused(environment, changes, named):
    environment(TORCHRUN, **changes)
    with refused(*named, kind=ValueError):
        adopt_launcher("fit")


def test_a_task_of_slurm_is_translated(environment):
    environment(SRUN, SLURM_TASK_PID=os.getppid())
    adopt_launcher("collect")
    assert find_launch() == (3, 6, 2, 3)
    assert os.environ["MASTER_ADDR"] == "gpu07"
    assert 15000 <= int(os.environ["MASTER_PORT"]) < 30000


def test_a_launcher_on_each_node_of_slurm_is_no_rank(environment):
    environment(SRUN, SLURM_TASK_PID=os.getppid(), RANK=7)
    adopt_launcher("spread")
    assert not set(os.environ) & set(RANK_VARIABLES)


@pytest.mark.parametrize("changes", [{"SLURM_TASK_PID": 2**22 - 1}, {"SLURM_STEP_NUM_TASKS": 1}])
def test_an_interactive_shell_of_slurm_is_no_launcher(environment, changes):
    environment({**SRUN, "SLURM_TASK_PID": os.getppid()}, **changes)
    adopt_launcher("fit")
    assert find_launch() is None


def test_a_verb_of_one_process_is_refused_on_several(environment, capfd, tmp_path):
    environment(TORCHRUN)
    assert_refused(capfd, ("pack", "--out", tmp_path), "pack", "WORLD_SIZE", 4)
    assert not list(tmp_path.iterdir())


def test_a_local_run_beside_slurms_client_is_quiet(
    environment, workspace, monkeypatch, tmp_path, capfd
):
    """An interactive shell has Slurm's variables, and its client is installed."""
    srun = tmp_path / "srun"
    srun.write_text("")
    srun.chmod(0o755)
    environment(SRUN, PATH=f"{tmp_path}:{os.environ['PATH']}", SLURM_TASK_PID=2**22 - 1)
    monkeypatch.chdir(workspace.path)
    assert run_command(*tiny_fit_words(tmp_path / "run", 1, *QUIET)) == 0
    err = capfd.readouterr().err
    assert "srun" not in err
    assert "anonymous" not in err


@pytest.mark.parametrize(
    ("text", "world", "code", "named"),
    [
        ("DataLoader worker (pid 71) is killed by signal: Killed.", 1, 137, "71"),
        ("DataLoader worker (pid(s) 71, 72) exited unexpectedly", 1, 137, "71, 72"),
        ("Connection closed by peer [127.0.0.1]:2", 2, 4, "127.0.0.1"),
        ("failed to listen on any local network address. EADDRINUSE", 2, 2, "MASTER_PORT"),
    ],
)
def test_a_lost_process_is_explained(text, world, code, named):
    lost = explain_lost_process(RuntimeError(text), world)
    assert lost.code == code
    assert named in lost.message


def test_a_reading_process_that_was_killed_while_it_handed_a_batch_over(monkeypatch):
    def fail():
        raise RuntimeError("DataLoader worker (pid 71) is killed by signal: Killed.")

    error = ConnectionResetError(104, "Connection reset by peer")
    assert explain_lost_process(error, 2) is None, "no reading process was killed"
    monkeypatch.setattr(torch._C, "_error_if_any_worker_fails", fail)
    lost = explain_lost_process(error, 2)
    assert lost.code == 137 and "71" in lost.message


@pytest.mark.parametrize(
    ("error", "world"), [(RuntimeError("timed out"), 1), (ValueError("http: timed out"), 2)]
)
def test_other_errors_are_no_lost_rank(error, world):
    assert explain_lost_process(error, world) is None


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--processes", "2", "--", "pack"), ("fit, encode", "pack")),
        (("--processes", "2"), ("`--`",)),
        (("--processes", "0", "--", "fit"), ("processes", 0)),
        (("--nodes", "2", "--node_rank", "2", "--", "fit"), ("node_rank", 2)),
    ],
)
def test_what_cannot_be_spread_is_refused(capfd, words, named):
    assert_refused(capfd, ("spread", *words), *named)


def test_a_busy_port_of_several_nodes_is_named(environment, monkeypatch, capfd):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with socket.socket() as busy:
        busy.bind(("", 0))
        busy.listen()
        port = busy.getsockname()[1]
        node = ("--processes", 1, "--nodes", 2, "--master_port", port)
        assert_refused(capfd, ("spread", *node, "--", "fit"), "master_port", port)


@pytest.mark.parametrize(
    ("found", "code", "line"),
    [
        ((2, 2), 2, ""),  # a typo, which rank 0 has printed to the terminal
        ((4, 1), 1, "line of rank 1"),
        ((75, 3), 3, "line of rank 1"),
        ((4, -signal.SIGKILL), 137, "SIGKILL"),
        ((75, 75), 75, ""),
        ((4, 4), 4, ""),
    ],
)
def test_the_rank_at_fault_is_the_one_that_is_no_consequence(tmp_path, capsys, found, code, line):
    failures = {}
    for rank, number in enumerate(found):
        log = tmp_path / f"attempt_0/{rank}/stderr.log"
        log.parent.mkdir(parents=True)
        log.write_text(f"line of rank {rank}\n")
        failures[rank] = ProcessFailure(rank, 40 + rank, number, "")
    assert explain_failures(failures, tmp_path) == code
    err = capsys.readouterr().err
    assert line in err and bool(err) == bool(line)
