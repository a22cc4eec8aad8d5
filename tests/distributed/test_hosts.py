"""Two hosts (two network namespaces) train together.

When one is cut off, the other reports it and ends, and the same command resumes the run.
"""

import os
import shutil
import signal
import subprocess
import time

import pytest

from models.checkpoint import newest_checkpoint, read_checkpoint
from tests.distributed.processes import wait_until
from tests.distributed.runs import equal, final_state, tiny_fit_words
from tests.helpers.refusals import PREFIX

HOSTS = ("rectify-a", "rectify-b")
STALL = 6  # seconds
DDP = ("--trainer.strategy", "ddp", "--watchdog.timeout", str(STALL))


def ip(*words):
    """Run iproute2's `ip`."""
    return subprocess.run(["ip", *words], capture_output=True, text=True)


def connect_hosts():
    """Join the two namespaces by a virtual cable; returns the command that made it."""
    first, second = HOSTS
    ends = ("cable", "netns", first, "type", "veth", "peer", "name", "cable", "netns", second)
    cable = ip("link", "add", *ends)
    for number, name in enumerate(HOSTS, 1):
        ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "cable")
        for device in ("lo", "cable"):
            ip("-n", name, "link", "set", device, "up")
    return cable


@pytest.fixture
def hosts(request):
    """Make two namespaces, 10.77.0.1 and 10.77.0.2, joined by a cable.

    There is one pair of names: without --long, which runs one test at a time, only one test has it.
    """
    if not request.node.callspec.params["lost"] and not request.config.getoption("--long"):
        pytest.skip("only with --long")
    first, second = HOSTS
    if not shutil.which("ip") or os.geteuid() != 0 or ip("netns", "add", first).returncode:
        pytest.skip("network namespaces need root and iproute2")
    try:
        ip("netns", "add", second)
        cable = connect_hosts()
        if cable.returncode:
            pytest.skip(f"this machine has no veth: {cable.stderr.strip()}")
        yield HOSTS
    finally:
        for name in HOSTS:
            ip("netns", "del", name)


def start_training(workspace, out, steps):
    """Start torchrun on both hosts."""
    rendezvous = ("--master-addr=10.77.0.1", "--master-port=29571")
    torchrun = ("--nnodes=2", "--nproc-per-node=1", *rendezvous)
    words = tiny_fit_words(out, steps, *DDP, "--trainer.devices", "1", "--trainer.num_nodes", "2")
    processes = []
    for rank, name in enumerate(HOSTS):
        before = ("ip", "netns", "exec", name, "env", "GLOO_SOCKET_IFNAME=cable")
        ranked = (*torchrun, f"--node-rank={rank}")
        processes.append(workspace.start(*words, torchrun=ranked, before=before))
    return processes


@pytest.mark.slow
@pytest.mark.parametrize("lost", [1, 0], ids=["second", "first"])
def test_losing_a_host_ends_the_run_and_the_same_command_resumes(workspace, hosts, tmp_path, lost):
    out = tmp_path / "run"
    processes = start_training(workspace, out, 4000)
    wait_until(processes[0], lambda: list((out / "checkpoints").glob("step=*")))

    # cut one host off: the other reports it, and ends
    ip("-n", HOSTS[lost], "link", "set", "cable", "down")
    began = time.monotonic()
    remaining = processes[1 - lost]
    line = next(line for line in remaining.stderr if line.startswith(PREFIX))
    assert time.monotonic() - began < 3 * STALL
    named = ("rank 1",) if lost else ("host", f"{STALL} s")
    assert all(name in line for name in named), line
    assert remaining.wait(timeout=60) != 0

    # power the lost host off: kill torchrun, and its rank by the run's folder in the command line
    os.killpg(processes[lost].pid, signal.SIGKILL)
    subprocess.run(["pkill", "-KILL", "-f", str(out)])
    ip("-n", HOSTS[lost], "link", "set", "cable", "up")

    # the same command resumes on both hosts
    last_step = read_checkpoint(newest_checkpoint(out))["global_step"] + 7
    for process in start_training(workspace, out, last_step):
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    if lost:
        one_host = tmp_path / "one-host"
        two = (*DDP, "--trainer.devices", "2")
        workspace.rectify(*tiny_fit_words(one_host, last_step, *two), processes=2)
        assert equal(final_state(out, last_step), final_state(one_host, last_step))
