"""The end of a run before trainer.max_steps: one that is meant is recorded as finished.

EarlyStopping ends a run for good. A limit of time (trainer.max_time) only ends a command: the same
command goes on.
"""

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason

from data.files import read_json, write_json
from data.schema import COUNT, check_schema
from trainer.engine.trainer_parts import parts_of

RECORD = "finished.json"  # in a run folder; docs/formats.md describes it
MEANT = (EarlyStoppingReason.STOPPING_THRESHOLD, EarlyStoppingReason.PATIENCE_EXHAUSTED)


def restart_limits(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Make a resumed command begin with the configured limits, not with those of the checkpoint.

    The time of earlier commands does not count, and EarlyStopping has the configured patience.
    """
    states = checkpoint.get("callbacks") or {}
    for callback in parts_of(trainer).callbacks:
        if isinstance(callback, Timer):
            states.pop(callback.state_key, None)
        if isinstance(callback, EarlyStopping) and callback.state_key in states:
            states[callback.state_key] |= {
                "patience": callback.patience,
                "stopping_reason": EarlyStoppingReason.NOT_STOPPED.value,
                "stopping_reason_message": None,
            }


def find_stopping(trainer: Trainer) -> EarlyStopping | None:
    """Return the EarlyStopping that has ended the run; None if none has."""
    for callback in parts_of(trainer).callbacks:
        if not isinstance(callback, EarlyStopping):
            continue
        if callback.stopping_reason != EarlyStoppingReason.NOT_STOPPED:
            return callback
    return None


def stopping_message(stopping: EarlyStopping) -> str:
    """Return why EarlyStopping ended a run."""
    message = stopping.stopping_reason_message or f"EarlyStopping of {stopping.monitor}"
    return message.removesuffix(" Signaling Trainer to stop.").rstrip(".")


def remove_record(trainer: Trainer) -> None:
    """Remove the record of an earlier end, now that the run goes on."""
    if trainer.is_global_zero:
        (Path(trainer.default_root_dir) / RECORD).unlink(missing_ok=True)


def record_end(trainer: Trainer) -> None:
    """Record that the run is finished, if EarlyStopping has reached what it waits for."""
    stopping = find_stopping(trainer)
    if stopping and stopping.stopping_reason in MEANT and trainer.is_global_zero:
        record = {"step": trainer.global_step, "reason": stopping_message(stopping)}
        write_json(Path(trainer.default_root_dir) / RECORD, record)


def recorded_reason(run: Path, step: int) -> str:
    """Return why a run was finished early.

    Args:
        run: the run folder.
        step: of its newest checkpoint.

    Returns:
        The reason; "" if the run was not finished at this step.
    """
    path = run / RECORD
    if not path.exists():
        return ""
    record = read_json(path)
    check_schema(record, {"step": COUNT, "reason": str}, str(path))
    return str(record["reason"]) if record["step"] == step else ""
