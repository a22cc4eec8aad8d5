"""Pipelines that are launched on a Slurm cluster of the tests."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from tests.helpers.commands import REPOSITORY
from tests.helpers.slurm import SlurmCluster

RESOURCES = {"cpus": 1, "memory": "1500M", "time": 60, "grace": 30}
PLANE = [str(REPOSITORY / f"configs/flows/{name}.yaml") for name in ("base", "matching")]


class Launched:
    """A folder from which pipelines are launched on a cluster.

    Args:
        cluster: the cluster.
        path: the folder.
    """

    def __init__(self, cluster: SlurmCluster, path: Path):
        self.cluster = cluster
        self.path = path
        self.environment = {**cluster.environment, "WANDB_MODE": "offline"}
        (path / "configs").symlink_to(REPOSITORY / "configs")

    def start(self, *words: object) -> subprocess.Popen:
        """Start `rectify WORDS`."""
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "deploy", *map(str, words)],
            cwd=self.path,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def rectify(self, *words: object, code: int = 0) -> str:
        """Run `rectify WORDS`, check its exit code, and return what it printed."""
        process = self.start(*words)
        out, err = process.communicate(timeout=200)
        assert process.returncode == code, f"{words}: {process.returncode}\n{out}\n{err}"
        return out + err

    def launch(self, config: Path, *words: object, code: int = 0) -> str:
        """Launch a pipeline on Slurm."""
        return self.rectify("launch", config, "--on", "slurm", *words, code=code)

    def states(self, out: Path) -> dict[str, str]:
        """Return the state of each stage, as `rectify status` prints it."""
        return {name: words[0] for name, words in self.details(out).items()}

    def details(self, out: Path) -> dict[str, list[str]]:
        """Return the words that `rectify status` prints after each stage's name."""
        lines = self.rectify("status", out).splitlines()[1:]
        return {line.split()[0]: line.split()[1:] for line in lines}

    def wait(self, ready: Callable[[], Any], timeout: float = 90) -> Any:
        """Wait until something is there, and return it."""
        end = time.monotonic() + timeout
        while not (found := ready()):
            if time.monotonic() > end:
                raise AssertionError(f"{self.cluster.run('squeue', '-t', 'all')}\n{self.logs()}")
            time.sleep(0.2)
        return found

    def logs(self) -> str:
        """Return the ends of all logs of jobs."""
        texts = []
        for path in sorted(self.path.rglob("stages/*/logs/*.txt")):
            texts.append(f"{path}:\n{path.read_text()[-1500:]}")
        return "\n".join(texts)

    def wait_for(self, out: Path, stage: str, *states: str, timeout: float = 90) -> None:
        """Wait until a stage has one of some states."""
        self.wait(lambda: self.states(out)[stage] in states, timeout)


def write_pipeline(folder: Path, stages: list[dict[str, Any]], **more: Any) -> Path:
    """Write a pipeline of these stages, with results in FOLDER/out."""
    config = folder / "pipeline.yaml"
    content = {"out": str(folder / "out"), "resources": RESOURCES, "stages": stages, **more}
    config.write_text(yaml.safe_dump(content))
    return config


def fit_stage(steps: int, name: str = "fit", **options: Any) -> dict[str, Any]:
    """Return a stage that trains on points of the plane: it needs no data.

    Args:
        steps: optimizer steps.
        name: of the stage.
        options: of `rectify fit`.
    """
    return {
        "name": name,
        "needs": [],
        "fit": {
            "config": PLANE,
            "out": "{out}/" + name,
            "trainer.max_steps": steps,
            "lr_scheduler.init_args.T_max": steps,
            "checkpoints.every": 50,
            **options,
        },
    }
