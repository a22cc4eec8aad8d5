"""Train from a configuration in this process; read what the run logged."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.helpers.commands import REPOSITORY, run_command

QUIET = ("--trainer.accelerator", "cpu", "--trainer.logger", "false")
# A configuration: its content, which is written beside the run's folder, its file, or its files.
Config = Mapping[str, Any] | Path | tuple[Path, ...]


def study_config(study: str, name: str) -> tuple[Path, Path]:
    """Return the files of a published configuration: its study's base and what is added to it."""
    folder = REPOSITORY / "configs" / study
    return (folder / "base.yaml", folder / f"{name}.yaml")


def config_words(files: tuple[Path, ...]) -> tuple[object, ...]:
    """Return the words that name a configuration's files."""
    return tuple(word for file in files for word in ("--config", file))


def read_config(files: tuple[Path, ...]) -> dict[str, Any]:
    """Return the content of a configuration's files: entries of later ones win."""
    content: dict[str, Any] = {}
    for file in files:
        merge_into(content, yaml.safe_load(file.read_text()))
    return content


def merge_into(content: dict[str, Any], more: dict[str, Any]) -> None:
    """Set entries of nested objects."""
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(content.get(key), dict):
            merge_into(content[key], value)
        else:
            content[key] = value


def spec(name: str, **arguments: Any) -> dict[str, Any]:
    """Return the entry of a class in a configuration: its class path and its arguments."""
    return {"class_path": name, "init_args": arguments}


SMALL_DIT = spec("DiT", size=8, channels=1, patch=4, width=16, depth=1, heads=2)


def small_config(
    source: dict[str, Any],
    net: dict[str, Any] = SMALL_DIT,
    interpolant: str = "Linear",
    prediction: str = "Velocity",
    batch: int = 8,
    lr: float = 1e-3,
    **model: Any,
) -> dict[str, Any]:
    """Return the configuration of a small generator that is trained by matching with AdamW.

    Args:
        source: entry of the data source, e.g. `spec("Images", path="...")`.
        net: entry of the network; by default a DiT for images of 1 x 8 x 8 pixels without classes.
        interpolant: class name.
        prediction: class name.
        batch: samples of a batch.
        lr: learning rate.
        model: more arguments of the Generator, e.g. `condition`.
    """
    denoiser = spec("Denoiser", net=net, interpolant=interpolant, prediction=prediction)
    return {
        "model": spec("Generator", **{"denoiser": denoiser, "objective": "Matching", **model}),
        "data": {"source": source, "batch": batch},
        "optimizer": spec("AdamW", lr=lr),
        "trainer": {"accelerator": "cpu", "logger": False},
    }


def fit_words(
    config: Config, out: Path, *words: object, steps: int | None = None
) -> tuple[object, ...]:
    """Return the words of the command that trains.

    Args:
        config: see `Config`.
        out: the run's folder.
        words: more words of the command; they come last, so they win.
        steps: value of trainer.max_steps; by default the configuration's.
    """
    if isinstance(config, Mapping):
        file = out.with_name(f"{out.name}.yaml")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(dict(config)))
        config = file
    if isinstance(config, Path):
        config = (config,)
    length = () if steps is None else ("--trainer.max_steps", steps)
    return ("fit", *config_words(config), "--out", out, *QUIET, *length, *words)


def train(config: Config, out: Path, *words: object, steps: int | None = None) -> Path:
    """Train in this process, see `fit_words`; it must succeed. Returns the run's folder."""
    command = fit_words(config, out, *words, steps=steps)
    assert run_command(*command) == 0, " ".join(map(str, command))
    return out


def log_lines(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    """Return the training losses that a run logged."""
    return [line["loss"] for line in log_lines(run) if "loss" in line]
