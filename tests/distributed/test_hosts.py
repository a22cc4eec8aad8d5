"""Two hosts, made of two network namespaces, train together; one is cut off, the other says so and ends, the rerun resumes."""

import os
import shutil
import signal
import subprocess
import time

import pytest

from models import teacher
from tests.distributed.runs import equal, final, fit

NAMES = ("rectify-a", "rectify-b")
STALL = 6  # seconds
TOGETHER = ("--trainer.strategy", "ddp", "--watchdog.timeout", str(STALL))


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True)


@pytest.fixture
def hosts():
    """Make two namespaces joined by a cable, 10.77.0.1 and 10.77.0.2."""
    if not shutil.which("ip") or os.geteuid() != 0 or ip("netns", "add", NAMES[0]).returncode:
        pytest.skip("network namespaces need root and iproute2")
    try:
        ip("netns", "add", NAMES[1])
        made = ip("link", "add", "cable", "netns", NAMES[0], "type", "veth", "peer", "name", "cable", "netns", NAMES[1])
        if made.returncode:
            pytest.skip(f"no veth here: {made.stderr.strip()}")
        for number, name in enumerate(NAMES, 1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")
        yield NAMES
    finally:
        for name in NAMES:
            ip("netns", "del", name)


def train(workspace, out, steps):
    """Start torchrun on both hosts."""
    torchrun = ("--nnodes=2", "--nproc-per-node=1", "--master-addr=10.77.0.1", "--master-port=29571")
    words = fit(out, steps, *TOGETHER, "--trainer.devices", "1", "--trainer.num_nodes", "2")
    started = []
    for rank, name in enumerate(NAMES):
        before = ("ip", "netns", "exec", name, "env", "GLOO_SOCKET_IFNAME=cable")
        started.append(workspace.start(*words, torchrun=(*torchrun, f"--node-rank={rank}"), before=before))
    return started


@pytest.mark.parametrize("lost", [1, 0], ids=["second", "first"])
def test_a_host_that_is_cut_off_ends_the_run_and_the_rerun_resumes(request, workspace, hosts, tmp_path, lost):
    if not lost and not request.config.getoption("--long"):
        pytest.skip("only with --long")
    out = tmp_path / "run"
    processes = train(workspace, out, 4000)
    while not list((out / "checkpoints").glob("step=*")):
        assert processes[0].poll() is None, processes[0].communicate()
        time.sleep(0.01)
    ip("-n", NAMES[lost], "link", "set", "cable", "down")
    began, kept = time.monotonic(), processes[1 - lost]
    line = next(line for line in kept.stderr if line.startswith("rectify: error"))
    assert time.monotonic() - began < 3 * STALL
    assert ("no sign of life from rank 1 on" if lost else "the first host has not been reachable") in line
    assert kept.wait(timeout=60) != 0
    os.killpg(processes[lost].pid, signal.SIGKILL)  # the lost host
    subprocess.run(["pkill", "-KILL", "-f", str(out)])
    ip("-n", NAMES[lost], "link", "set", "cable", "up")
    step = teacher.read(teacher.newest(out))["global_step"]
    for process in train(workspace, out, step + 7):
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    if lost:
        two = (*TOGETHER, "--trainer.devices", "2")
        workspace.rectify(*fit(tmp_path / "whole", step + 7, *two), processes=2)
        assert equal(final(out, step + 7), final(tmp_path / "whole", step + 7))
