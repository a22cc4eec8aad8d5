"""A tiny training run in a real process, and how two runs are compared."""

from pathlib import Path
from typing import Any

import torch

from models.checkpoint import read_checkpoint
from tests.helpers.commands import Workspace
from tests.helpers.refusals import PREFIX, assert_names, refused_line
from tests.helpers.training import config_words

CONFIG = (Path("configs/digits/base.yaml"), Path("configs/digits/teacher.yaml"))
TINY_RUN = (
    *("--model.denoiser.net.width", "16", "--model.denoiser.net.depth", "1"),
    *("--checkpoints.every", "5", "--metrics.every", "1"),
)
TRAINING_STATE = (
    "state_dict",
    "ema",
    "ema_profiles",
    "optimizer_states",
    "global_step",
    "evaluations",
)


def tiny_fit_words(
    out: object, steps: int = 40, *more: object, config: tuple[Path, ...] = CONFIG
) -> tuple[object, ...]:
    """Return the words of a tiny training command."""
    last_step = ("--trainer.max_steps", str(steps))
    return ("fit", *config_words(config), "--out", out, *last_step, *TINY_RUN, *more)


def final_state(run: Path, steps: int = 40) -> dict[str, Any]:
    """Return weights, averages, optimizer states and cost from a run's last checkpoint."""
    checkpoint = read_checkpoint(run / "checkpoints" / f"step={steps:09d}.ckpt", resume=True)
    return {name: checkpoint[name] for name in TRAINING_STATE}


def equal(a: Any, b: Any) -> bool:
    """Return whether two nested values are the same, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def assert_fails(
    workspace: Workspace, words: tuple[object, ...], *named: object, code: int = 2
) -> str:
    """Run `rectify WORDS`; it must end with `code` and one error line that names each of `named`.

    Returns what the command wrote to standard error.
    """
    ended = workspace.rectify(*words, code=code)
    assert_names(refused_line(ended.stderr), named)
    return ended.stderr


def assert_last_line_is_the_error(err: str) -> None:
    """Assert that standard error ends with the error line."""
    assert err.strip().splitlines()[-1].startswith(PREFIX), err


def assert_a_rank_names(err: str, *named: object) -> None:
    """Assert that at least one rank's error line contains each of `named`."""
    lines = [line for line in err.splitlines() if line.startswith(PREFIX)]
    naming_lines = [line for line in lines if all(str(name) in line for name in named)]
    assert naming_lines, err
