"""`rectify spread`: run a command on several processes, by torchrun's agent.

torchrun turns every exit code into 1, prints 60 lines, and dies of SIGUSR1. This hands the exit
code of the rank at fault through, and prints that rank's lines alone.
"""

import logging
import os
import re
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from data.signals import (
    STOP_SIGNALS,
    STOPPED_EXIT_CODE,
    find_children,
    forward_signals,
    raise_if_stopped,
    send_signal,
    stop_requested,
)
from deploy.cli import fail
from deploy.hints import one_line
from deploy.launcher import (
    LOST_RANK_EXIT_CODE,
    PORT_IN_USE,
    SHARED_VERBS,
    WAITING_SECONDS,
    order_of_causes,
    owning_ranks,
)

FAILED_LOG_LINES = 40  # of a failed rank that are printed


def spread(
    command: list[str],
    processes: int = 2,
    nodes: int = 1,
    node_rank: int = 0,
    master_addr: str = "localhost",
    master_port: int = 29500,
    grace: int = 60,
) -> None:
    """Run fit, encode, collect, invert or evaluate on several processes and nodes.

    `rectify spread --processes 2 -- fit --config base.yaml ...` ends with the exit code of `fit`,
    which takes devices, nodes and strategy from here. On several nodes start the same command on
    each of them, with its --node_rank. A signal is forwarded to all processes.

    Args:
        command: the words after `--`: a verb and its options.
        processes: processes on this node, one for each GPU.
        nodes: number of nodes.
        node_rank: number of this node, from 0.
        master_addr: name or address of node 0.
        master_port: a free port of node 0, for several nodes; one node finds a port itself.
        grace: seconds that processes have to save after a signal, or after another one has failed,
            before they are killed.
    """
    check_numbers(command, processes, nodes, node_rank)
    for name in ("torch.distributed", "torch.multiprocessing"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))

    # On one node the agent has the store of the ranks, on a port that it finds.
    endpoint = f"{master_addr}:{master_port}" if nodes > 1 else "localhost:0"
    with tempfile.TemporaryDirectory(prefix="rectify-spread-") as logs, owning_ranks():
        config = LaunchConfig(
            min_nodes=nodes,
            max_nodes=nodes,
            nproc_per_node=processes,
            # Only the first rank of a node writes to the terminal.
            logs_specs=DefaultLogsSpecs(logs, {rank: Std.ERR for rank in range(1, processes)}),
            run_id=str(uuid.uuid4()) if nodes == 1 else "rectify",
            rdzv_endpoint=endpoint,
            rdzv_backend="static" if nodes > 1 else "c10d",
            rdzv_configs={"rank": node_rank} if nodes > 1 else {},
            max_restarts=0,
            signals_to_handle="SIGINT",  # others are forwarded by data/signals.py
            shutdown_timeout=grace,
        )
        forward_signals()
        ended = threading.Event()
        threading.Thread(target=kill_late_ranks, args=(grace, ended), daemon=True).start()
        if nodes > 1:
            threading.Thread(target=print_waiting, args=(endpoint,), daemon=True).start()
        try:
            elastic_launch(config, sys.executable)("-u", "-P", "-m", "deploy", *command)
        except ChildFailedError as error:
            code = explain_failures(error.failures, Path(logs))
            if code == STOPPED_EXIT_CODE:
                raise_if_stopped()
            raise SystemExit(code) from None
        except SignalException:
            raise KeyboardInterrupt from None
        except DistError as error:
            if re.search(PORT_IN_USE, str(error)):
                advice = "choose another, or end the process that uses it"
                raise ValueError(f"master_port {master_port} is in use; {advice}") from error
            text = f"spread: the nodes did not connect at {endpoint} ({one_line(error)[:200]})"
            raise SystemExit(
                fail(f"{text}; start all of them again", LOST_RANK_EXIT_CODE)
            ) from error
        finally:
            ended.set()


def check_numbers(command: list[str], processes: int, nodes: int, node_rank: int) -> None:
    """Check what is to be run, and where.

    Raises:
        ValueError: it cannot be run; the message names the option.
    """
    if processes < 1 or nodes < 1:
        raise ValueError(f"processes is {processes}, and nodes is {nodes}; both must be at least 1")
    if not 0 <= node_rank < nodes:
        raise ValueError(f"node_rank is {node_rank}; it must be from 0 to {nodes - 1}")
    verb = command[0] if command else "nothing"
    if verb not in SHARED_VERBS:
        raise ValueError(f"spread runs {', '.join(SHARED_VERBS)} after `--`, not {verb}")


def kill_late_ranks(grace: int, ended: threading.Event) -> None:
    """Kill the ranks that have not ended `grace` seconds after a signal."""
    while not stop_requested():
        if ended.wait(0.5):
            return
    if not ended.wait(grace):
        send_signal(find_children(), signal.SIGKILL)


def print_waiting(endpoint: str) -> None:
    """Print that other nodes have not come, if the ranks of this one do not start for a while."""
    for _ in range(WAITING_SECONDS):
        time.sleep(1)
        if find_children():
            return
    print(f"rectify: spread waits for the other nodes at {endpoint}", file=sys.stderr, flush=True)


def explain_failures(failures: Mapping[int, ProcessFailure], logs: Path) -> int:
    """Print the lines of the rank at fault, unless it wrote to the terminal; return its exit code.

    Args:
        failures: of the ranks that were found to have failed first.
        logs: folder with the lines of ranks.
    """
    failure = min(
        failures.values(), key=lambda one: (order_of_causes(one.exitcode), one.local_rank)
    )
    code = failure.exitcode

    # A rank that a signal ended before it could handle it had nothing to save.
    if stop_requested() and -code in STOP_SIGNALS:
        code = STOPPED_EXIT_CODE

    # Its lines.
    if failure.local_rank != 0 and code != STOPPED_EXIT_CODE:
        for path in logs.rglob(f"{failure.local_rank}/stderr.log"):
            lines = path.read_text(errors="replace").splitlines(True)
            sys.stderr.writelines(lines[-FAILED_LOG_LINES:])
    if code < 0:
        name = signal.Signals(-code).name
        text = f"local rank {failure.local_rank} (pid {failure.pid}) was ended by {name}"
        print(f"rectify: error: {text}; run the same command again", file=sys.stderr)
    return code if code >= 0 else 128 - code
