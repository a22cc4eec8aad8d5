"""What may change when a run is resumed: docs/reproducibility.md has the table.

The run's newest checkpoint has the whole configuration, with all defaults. It is compared with the
configuration of the command, key by key.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from data.schema import shorten

# Keys that may change: they do not change what is learned, or are checked by what they name.
FREE = (
    "out",
    "override",
    "resume",
    "trainer",
    "checkpoints",
    "metrics",
    "loss_guard",
    "preemption",
    "watchdog",
    "fast_loop",
    "data.workers",
    "data.heldout",
    "data.heldout_batches",
    "model.recompute",
    "model.compile",
)
# Keys among these that change what is learned.
NEEDS_OVERRIDE = (
    "trainer.gradient_clip_val",
    "trainer.gradient_clip_algorithm",
    "trainer.callbacks.EMA",
)
# Where samples are read, and how: the samples themselves are compared by their checksums.
SAMPLES_MOVED = r"data\.source(\..*)?\.(path|urls|cache|limit|tolerance|allow_pipe)(\[\d+\])?"
# Keys that the model and the data module compare, when they load the checkpoint.
CHECKED_LATER = ("seed_everything", "data.batch", "data.seed", "model.denoiser", "model.flow")
OPTIMIZER_KEYS = ("optimizer", "lr_scheduler")
ENDING_DECAYS = ("cosine", "linear")  # decays of WarmUp that depend on its `steps`


class Change(NamedTuple):
    """A value that differs between a run's configuration and that of a command."""

    key: str  # as an option of the command, for example `optimizer.lr`
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key} is {show(self.now)}, it was {show(self.before)}"


def show(value: Any) -> str:
    """Return a value as YAML has it; of a class its name."""
    if isinstance(value, dict) and "class_path" in value:
        return str(value["class_path"]).rpartition(".")[2]
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return value if isinstance(value, str) else shorten(value)


def is_below(key: str, names: Sequence[str]) -> bool:
    """Return whether a key is one of some keys, or below one of them."""
    return any(key == name or key.startswith((f"{name}.", f"{name}[")) for name in names)


def changes_since(saved: Mapping[str, Any], configured: str) -> list[Change]:
    """Return what differs from the configuration in a checkpoint; nothing if it has none.

    Args:
        saved: the checkpoint.
        configured: the configuration of this command, as YAML.
    """
    if "origin" not in saved:
        return []
    before = yaml.safe_load(saved["origin"]["config"])
    return list_changes(before, yaml.safe_load(configured))


def list_changes(before: dict[str, Any], now: dict[str, Any]) -> list[Change]:
    """Return every difference between a run's configuration and a command's.

    Args:
        before: the run's, with all defaults.
        now: the command's, with all defaults.
    """
    changes = []
    for change in compare("", by_name(before), by_name(now)):
        if not is_below(change.key, CHECKED_LATER):
            changes.append(change)
    return changes


def by_name(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration with its callbacks by class name, and the length of its schedule."""
    trainer = config.get("trainer") or {}

    # the callbacks
    callbacks = trainer.get("callbacks") or []
    named: dict[str, Any] = {}
    for spec in callbacks if isinstance(callbacks, list) else [callbacks]:
        name = show(spec)
        while name in named:
            name += "'"
        named[name] = spec

    # a schedule that ends with training
    schedule = config.get("lr_scheduler")
    if isinstance(schedule, dict) and show(schedule) == "WarmUp":
        arguments = {**schedule["init_args"]}
        if arguments["decay"] in ENDING_DECAYS and arguments["steps"] is None:
            arguments["steps"] = trainer["max_steps"]
        schedule = {**schedule, "init_args": arguments}
    return {**config, "trainer": {**trainer, "callbacks": named}, "lr_scheduler": schedule}


def compare(key: str, before: Any, now: Any) -> Iterator[Change]:
    """Yield the differences of two values of a configuration.

    An entry that one of them does not have at all is an argument of another version of the code,
    which has its default; but a callback may be left out.
    """
    if before == now:
        return
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for i, (left, right) in enumerate(zip(before, now)):
            yield from compare(f"{key}[{i}]", left, right)
        return
    is_same_kind = (
        isinstance(before, dict)
        and isinstance(now, dict)
        and before.get("class_path") == now.get("class_path")
    )
    if not is_same_kind:
        yield Change(key, before, now)
        return
    for name in [*before, *(name for name in now if name not in before)]:
        part = key if name == "init_args" else f"{key}.{name}".lstrip(".")
        if key == "trainer.callbacks" or (name in before and name in now):
            yield from compare(part, before.get(name), now.get(name))


def check_changes(run: Path, changes: Sequence[Change], override: bool, finished: bool) -> None:
    """Check that a run may go on with the changes of its configuration.

    Args:
        run: the run folder.
        changes: every difference.
        override: the user wants the new settings.
        finished: no step is left to train.

    Raises:
        ValueError: it may not; the message names the keys and the way out.
    """
    # What no run can go on with.
    for change in changes:
        if change.key in ("model", "optimizer"):
            raise ValueError(
                f"{run}: {change}; another class cannot go on from its state: give the same class, "
                f"or begin another run from it with another --out and --model.initial {run}"
            )

    # What has to be meant.
    bound = [change for change in changes if not is_free(change.key)]
    if not bound or (override and not finished):
        return
    listing = "; ".join(map(str, bound))
    if finished:
        raise ValueError(
            f"{run}: is finished, with other settings ({listing}); choose another --out, or raise "
            "trainer.max_steps and add --override to go on with the new ones"
        )
    raise ValueError(
        f"{run}: began with other settings ({listing}); give the same ones, choose another --out, "
        "or add --override to go on with the new ones"
    )


def is_free(key: str) -> bool:
    """Return whether a key may change without `--override`."""
    if is_below(key, NEEDS_OVERRIDE):
        return False
    return is_below(key, FREE) or re.fullmatch(SAMPLES_MOVED, key) is not None


def changes_optimizer(changes: Sequence[Change]) -> bool:
    """Return whether the optimizer or its schedule has other settings."""
    return any(is_below(change.key, OPTIMIZER_KEYS) for change in changes)


def changes_stopping(changes: Sequence[Change]) -> bool:
    """Return whether a run that was stopped early is to stop by another rule."""
    return any(is_below(change.key, ("trainer.callbacks.EarlyStopping",)) for change in changes)
