"""Two hosts (two network namespaces) train together by `rectify spread`.

When one is cut off, the other reports it and ends, and the same command resumes the run.
"""

import os
import shutil
import signal
import subprocess
import time

import pytest

from models.checkpoint import newest_checkpoint
from tests.distributed.processes import wait_until
from tests.distributed.runs import equal, final_state, tiny_fit_words
from tests.helpers.refusals import refused_line

HOSTS = ("rectify-a", "rectify-b")
STALL = 6  # seconds
OPTIONS = ("--watchdog.timeout", str(STALL), "--trainer.logger", "false")


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


def start_training(workspace, out, steps, *more):
    """Start `rectify spread` on both hosts; nobody gives the trainer's devices and nodes."""
    address = ("--master_addr", "10.77.0.1", "--master_port", "29571")
    words = tiny_fit_words(out, steps, *OPTIONS, *more)
    processes = []
    for rank, name in enumerate(HOSTS):
        before = ("ip", "netns", "exec", name, "env", "GLOO_SOCKET_IFNAME=cable")
        node = ("--processes", "1", "--nodes", "2", "--node_rank", str(rank), *address)
        processes.append(workspace.start("spread", *node, "--", *words, before=before))
    return processes


def newest_step(out):
    """Return the step of a run's newest checkpoint."""
    return int(newest_checkpoint(out).stem.removeprefix("step="))


def wait_for_codes(processes, code):
    """Wait for the ends of processes, which must have the same exit code; returns their errors."""
    errors = []
    for process in processes:
        _, err = process.communicate(timeout=120)
        assert process.returncode == code, err
        errors.append(err)
    return errors


@pytest.mark.slow
@pytest.mark.parametrize("lost", [1, 0], ids=["second", "first"])
def test_exit_codes_of_two_hosts_and_the_loss_of_one(workspace, hosts, tmp_path, lost):
    """A typo is 2 on both, a signal to one is 75, a lost host is 4; then the run goes on."""
    out = tmp_path / "run"
    for err in wait_for_codes(start_training(workspace, out, 1500, "--data.bach", "9"), 2):
        assert "bach" in refused_line(err)
        assert err.count("\n") == 1
    assert not out.exists()

    # a signal to one host stops and saves both
    processes = start_training(workspace, out, 1500)
    wait_until(processes[0], lambda: (out / "metrics.jsonl").exists())
    processes[1 - lost].send_signal(signal.SIGTERM)
    errors = wait_for_codes(processes, 75)
    assert "Traceback" not in "".join(errors)
    step = newest_step(out)

    # cut one host off: the other reports it, and ends
    processes = start_training(workspace, out, 1500)
    wait_until(processes[0], lambda: newest_step(out) > step)
    ip("-n", HOSTS[lost], "link", "set", "cable", "down")
    began = time.monotonic()
    (err,) = wait_for_codes([processes[1 - lost]], 4)
    assert time.monotonic() - began < 5 * STALL
    named = ("rank 1",) if lost else ("host", f"{STALL} s")
    assert all(name in refused_line(err) for name in named), err

    # power the lost host off: its rank ends with the launcher
    os.killpg(processes[lost].pid, signal.SIGKILL)
    ip("-n", HOSTS[lost], "link", "set", "cable", "up")

    # the same command resumes on both hosts, to the result of one host
    last_step = newest_step(out) + 7
    wait_for_codes(start_training(workspace, out, last_step), 0)
    if lost:
        one_host = tmp_path / "one-host"
        words = tiny_fit_words(one_host, last_step, *OPTIONS)
        workspace.rectify("spread", "--processes", "2", "--", *words)
        assert equal(final_state(out, last_step), final_state(one_host, last_step))
