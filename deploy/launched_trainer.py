"""Lightning's Trainer on the processes that a launcher started, or on those of this machine."""

import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.fabric.plugins.environments import ClusterEnvironment, LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers import subprocess_script

from data.attempts import exit_now
from deploy.launcher import find_launch, is_started_by_lightning

WATCH_SECONDS = 1.0  # between looks at the ranks that Lightning started
LAST_SECONDS = 10.0  # that this rank has to end by itself after another one has failed


def follow_launcher(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the Trainer's options that follow from the launcher.

    Lightning would guess the launcher from the environment, and take an interactive shell of Slurm
    for one.

    Args:
        options: the configured options of the Trainer.

    Raises:
        ValueError: an option contradicts the launcher; the message names it.
    """
    launch = find_launch()
    plugins = options["plugins"] or []
    if not isinstance(plugins, list):
        plugins = [plugins]
    chosen = any(isinstance(plugin, ClusterEnvironment) for plugin in plugins)

    # without a launcher: Lightning starts the processes of this machine
    if launch is None or is_started_by_lightning():
        if options["num_nodes"] > 1 and not chosen:
            raise ValueError(
                f"trainer.num_nodes is {options['num_nodes']}, and no launcher started this "
                "process; start it on every node with `rectify spread --nodes`, torchrun or srun"
            )
        environment: ClusterEnvironment = LightningEnvironment()
        return {} if chosen else {"plugins": [*plugins, environment]}

    # with one: its numbers of processes and nodes
    given = count_devices(options["devices"])
    if given not in (None, launch.devices):
        raise ValueError(
            f"trainer.devices is {options['devices']}, and the launcher started {launch.devices} "
            "processes on this node; leave it out"
        )
    if options["num_nodes"] not in (1, launch.nodes):
        raise ValueError(
            f"trainer.num_nodes is {options['num_nodes']}, and the launcher started processes on "
            f"{launch.nodes} nodes; leave it out"
        )
    followed: dict[str, Any] = {"num_nodes": launch.nodes}
    if given is None:
        followed["devices"] = launch.devices
    if options["strategy"] == "auto" and launch.world > 1:
        followed["strategy"] = "ddp"
    if not chosen:
        followed["plugins"] = [*plugins, TorchElasticEnvironment()]
    return followed


def check_world(trainer: Trainer) -> None:
    """Check that a trainer works on all processes that a launcher started, or on its own.

    Raises:
        ValueError: it does not; each process would train the whole run.
    """
    launch = find_launch()
    if launch and not is_started_by_lightning() and trainer.world_size != launch.world:
        raise ValueError(
            f"trainer.strategy: {type(trainer.strategy).__name__} trains on {trainer.world_size} "
            f"processes, and WORLD_SIZE is {launch.world}; use ddp or fsdp2"
        )


def count_processes(devices: Any, nodes: int) -> int:
    """Return the number of processes that will train, as far as the options say it."""
    launch = find_launch()
    if launch:
        return launch.world
    return (count_devices(devices) or 1) * nodes


def count_devices(devices: Any) -> int | None:
    """Return the number of devices that an option names, e.g. 2, "2", "0,1" or [0, 1]; or None.

    It is None for those that depend on the machine: "auto" and -1.
    """
    if isinstance(devices, str) and "," in devices:
        devices = [part for part in devices.split(",") if part.strip()]
    if isinstance(devices, list | tuple):
        return len(devices)
    text = str(devices)
    return int(text) if text.isdecimal() else None


def watch_started_ranks(processes: Sequence[subprocess.Popen]) -> None:
    """Watch the ranks that Lightning has started on this machine.

    Lightning's own observer kills this process after them, without a line and whatever their code.
    """
    threading.Thread(target=end_with_failed_rank, args=(processes,), daemon=True).start()


def end_with_failed_rank(processes: Sequence[subprocess.Popen]) -> None:
    """End this process with the exit code of a rank that has failed, if it does not end by itself.

    Args:
        processes: the other ranks, from 1 on.
    """
    # Wait for a failure; a rank that has failed has printed why, unless a signal ended it.
    failed: list[subprocess.Popen] = []
    while not failed:
        time.sleep(WATCH_SECONDS)
        codes = [process.poll() for process in processes]
        if not any(code is None or code for code in codes):
            return
        failed = [process for process in processes if process.returncode]
    time.sleep(LAST_SECONDS)

    # End all ranks.
    code = failed[0].returncode
    text = ""
    if code < 0:
        rank = processes.index(failed[0]) + 1
        text = f"rank {rank} (pid {failed[0].pid}) was ended by {signal.Signals(-code).name}"
        text += "; run the same command again"
        code = 128 - code
    for process in processes:
        process.kill()
    exit_now(code, text)


subprocess_script._launch_process_observer = watch_started_ranks  # type: ignore[assignment]
