"""Options of `rectify fit` that cannot do what their documentation promises: refused by name.

Lightning documents most of the Trainer's options by epochs, which a stream of batches does not
have. Each error names the option to use instead.
"""

from datetime import timedelta
from typing import Any, NamedTuple

from jsonargparse import Namespace

from deploy.changes import show


class Refused(NamedTuple):
    """An option of the Trainer that has no effect here, or a wrong one."""

    neutral: tuple[Any, ...]  # the values that leave it off
    instead: str  # why, and what to use


NO_EPOCHS = "the stream of batches has no epochs"
ONLY_TRAINS = "`rectify fit` only trains and validates; use `rectify evaluate --samples`"
NO_BAR = "progress, rate, loss and time left are shown without it; leave it out"
REFUSED_OPTIONS = {
    "max_epochs": Refused((-1, None), f"{NO_EPOCHS}; set trainer.max_steps"),
    "min_epochs": Refused((None,), f"{NO_EPOCHS}; set trainer.max_steps"),
    "min_steps": Refused(
        (None,), "training ends at trainer.max_steps; to stop later, raise EarlyStopping's patience"
    ),
    "limit_train_batches": Refused(
        (None, 1.0),
        "it would repeat the same batches, noise and times; for a shorter training set "
        "trainer.max_steps, for fewer samples give a smaller data.source",
    ),
    "overfit_batches": Refused(
        (0.0, 0),
        "it would repeat the same batches, noise and times; to overfit, give a small data.source",
    ),
    "fast_dev_run": Refused(
        (False, 0), "to try a configuration, set trainer.max_steps 1 and a scratch folder as --out"
    ),
    "check_val_every_n_epoch": Refused(
        (None,), f"{NO_EPOCHS}; set trainer.val_check_interval, in batches"
    ),
    "reload_dataloaders_every_n_epochs": Refused((0,), f"{NO_EPOCHS}; leave it out"),
    "limit_test_batches": Refused((None,), ONLY_TRAINS),
    "limit_predict_batches": Refused((None,), ONLY_TRAINS),
    "log_every_n_steps": Refused((None,), "set metrics.every, which callbacks follow too"),
    "enable_progress_bar": Refused((False,), NO_BAR),
    "enable_checkpointing": Refused(
        (None, True), "a run always has checkpoints; set checkpoints.every and checkpoints.keep"
    ),
    "barebones": Refused((False,), "set fast_loop"),
    "model_registry": Refused((None,), "no logger here uploads models; leave it out"),
}

USE_EMA = "use EMA, whose averages other commands load"
REFUSED_CALLBACKS = {
    "StochasticWeightAveraging": USE_EMA,
    "WeightAveraging": USE_EMA,
    "EMAWeightAveraging": USE_EMA,
    "GradientAccumulationScheduler": "set trainer.accumulate_grad_batches",
    "BatchSizeFinder": "set data.batch and trainer.accumulate_grad_batches",
    "LearningRateFinder": "compare short runs with several optimizer.lr",
    "BackboneFinetuning": NO_EPOCHS,
    "ModelPruning": NO_EPOCHS,
    "BasePredictionWriter": ONLY_TRAINS,
    "OnExceptionCheckpoint": "a signal saves a checkpoint without it; set checkpoints.every",
    "Timer": "set trainer.max_time",
    "ProgressBar": NO_BAR,
    "TQDMProgressBar": NO_BAR,
    "RichProgressBar": NO_BAR,
    "Checkpoints": "every run has it; set checkpoints.every and checkpoints.keep",
    "MetricsLog": "every run has it; set metrics.every and metrics.bins",
    "LossGuard": "every run has it; set loss_guard.every, loss_guard.limit and loss_guard.skip",
    "Preemption": "every run has it; leave it out",
    "StallWatchdog": "every run has it; set its arguments under the key watchdog",
}
ONCE = ("EMA", "SampleQuality", "TrajectoryMetrics")  # each writes its results under fixed names
# Arguments of callbacks, with the value by which they wait for the end of an epoch.
EPOCH_ARGUMENTS = {
    "interval": "epoch",
    "logging_interval": "epoch",
    "check_on_train_epoch_end": True,
    "save_on_train_epoch_end": True,
}
LOGGING_CALLBACKS = ("LearningRateMonitor", "DeviceStatsMonitor", "ThroughputMonitor")
STARTS_PROCESSES = ("spawn", "fork", "notebook")  # in names of strategies
PATHS = ("out", "resume", "path", "codec", "initial", "run", "dirpath")  # keys that are paths
DOUBLE = ("64-true", "64")  # precisions


def class_name(spec: Any) -> str:
    """Return the class name in an entry of a configuration; "" if there is none."""
    return str(spec.class_path).rpartition(".")[2] if isinstance(spec, Namespace) else ""


def check_trainer(trainer: Namespace, has_heldout: bool) -> None:
    """Check that every option of the Trainer does what Lightning documents.

    Args:
        trainer: the options, before defaults are derived.
        has_heldout: whether there are data to validate on.

    Raises:
        ValueError: one does not; the message names the option to use instead.
    """
    for name, option in REFUSED_OPTIONS.items():
        value = trainer[name]
        if not any(value == off and type(value) is type(off) for off in option.neutral):
            raise ValueError(f"trainer.{name} is {show(value)}: {option.instead}")
    if isinstance(trainer.val_check_interval, float):
        raise ValueError(
            f"trainer.val_check_interval is {trainer.val_check_interval}, a part of an epoch: "
            f"{NO_EPOCHS}; give a number of batches, or a time such as 00:01:00:00"
        )
    if isinstance(trainer.limit_val_batches, float) and trainer.limit_val_batches != 1:
        raise ValueError(
            f"trainer.limit_val_batches is {trainer.limit_val_batches}, a part of an epoch: "
            f"{NO_EPOCHS}; set data.heldout_batches"
        )
    check_values(trainer)

    # Strategies.
    strategy = trainer.strategy
    if isinstance(strategy, str) and any(word in strategy for word in STARTS_PROCESSES):
        raise ValueError(
            f"trainer.strategy is {strategy}, whose processes would start from a copy of this one; "
            "use ddp"
        )

    # Callbacks.
    validates = has_heldout and trainer.limit_val_batches != 0
    names = [class_name(spec) for spec in list_callbacks(trainer)]
    for name in ONCE:
        if names.count(name) > 1:
            raise ValueError(f"trainer.callbacks: {name} occurs twice; leave out one of the two")
    for spec in list_callbacks(trainer):
        name = class_name(spec)
        arguments = spec.get("init_args") or Namespace()
        for argument, value in EPOCH_ARGUMENTS.items():
            if arguments.get(argument) == value:
                raise ValueError(
                    f"trainer.callbacks: {name}: {argument} is {show(value)}: {NO_EPOCHS}; leave "
                    "it out"
                )
        if name in REFUSED_CALLBACKS:
            raise ValueError(f"trainer.callbacks: {name}: {REFUSED_CALLBACKS[name]}")
        if name in LOGGING_CALLBACKS and trainer.logger is False:
            raise ValueError(
                f"trainer.callbacks: {name} needs a logger, but trainer.logger is false; leave out "
                "one of the two"
            )
        if name == "EarlyStopping" and not validates:
            raise ValueError(
                "trainer.callbacks: EarlyStopping reads what a validation measures, and there is "
                "none; set data.heldout, and leave out trainer.limit_val_batches"
            )
        if name == "ModelCheckpoint":
            check_saving(arguments, validates)


def check_values(trainer: Namespace) -> None:
    """Check numbers that Lightning would take, though nothing can follow from them.

    Raises:
        ValueError: one is wrong; the message names the option.
    """
    if trainer.accumulate_grad_batches < 1:
        raise ValueError(
            f"trainer.accumulate_grad_batches is {trainer.accumulate_grad_batches}; it must be at "
            "least 1"
        )
    if (trainer.gradient_clip_val or 0) < 0:
        raise ValueError(
            f"trainer.gradient_clip_val is {trainer.gradient_clip_val}; it must be positive, or "
            "null for no clipping"
        )
    if trainer.gradient_clip_algorithm is not None and not trainer.gradient_clip_val:
        raise ValueError(
            f"trainer.gradient_clip_algorithm is {trainer.gradient_clip_algorithm}, but "
            f"trainer.gradient_clip_val is {show(trainer.gradient_clip_val)}, so that nothing is "
            "clipped; set it"
        )
    if str(trainer.precision) in DOUBLE:
        raise ValueError(
            f"trainer.precision is {trainer.precision}, but samples, noise and times are float32; "
            "use 32-true"
        )

    # a limit of time
    limit = trainer.max_time
    if isinstance(limit, dict):
        try:
            limit = timedelta(**limit)
        except TypeError as error:
            raise ValueError(f"trainer.max_time is {limit}: {error}; give minutes") from error
    is_empty = isinstance(limit, str) and not limit.strip("0:")
    if is_empty or (isinstance(limit, timedelta) and limit <= timedelta(0)):
        raise ValueError(
            f"trainer.max_time is {trainer.max_time}, in which no step can be made; give a time "
            "such as 00:01:00:00 (days, hours, minutes, seconds), or leave it out"
        )


def check_saving(arguments: Namespace, validates: bool) -> None:
    """Check that Lightning's ModelCheckpoint saves something.

    Args:
        arguments: its arguments.
        validates: whether there are validations, after which it saves by default.

    Raises:
        ValueError: it does not.
    """
    if arguments.get("every_n_epochs"):
        raise ValueError(
            f"trainer.callbacks: ModelCheckpoint: every_n_epochs is {arguments.every_n_epochs}: "
            f"{NO_EPOCHS}; set every_n_train_steps"
        )
    by_time = arguments.get("train_time_interval")
    if not (validates or by_time or arguments.get("every_n_train_steps")):
        raise ValueError(
            "trainer.callbacks: ModelCheckpoint saves after validations, and there are none; set "
            "every_n_train_steps or train_time_interval"
        )


def describe_no_validation(config: Namespace) -> str:
    """Return a line if there are data to validate on, but no step validates; "" otherwise."""
    trainer = config.trainer
    interval = trainer.val_check_interval
    batches = trainer.max_steps * trainer.accumulate_grad_batches
    if config.data.heldout is None or not isinstance(interval, int) or interval <= batches:
        return ""
    return (
        f"trainer.val_check_interval is {interval}, and training takes {batches} batches: "
        "data.heldout is not used"
    )


def check_paths(config: Namespace) -> None:
    """Check that no path is empty: it would be the current folder, or none at all.

    Raises:
        ValueError: one is; the message names its key.
    """
    for key, value in config.items():  # of all levels
        if key.rpartition(".")[2] in PATHS and isinstance(value, str) and not value.strip():
            raise ValueError(
                f"{key.replace('.init_args', '')} is empty; give a path, or leave it out"
            )


def list_callbacks(trainer: Namespace) -> list[Namespace]:
    """Return the entries of the configured callbacks."""
    callbacks = trainer.callbacks or []
    return callbacks if isinstance(callbacks, list) else [callbacks]


def check_schedule(schedule: Namespace | None, max_steps: int) -> None:
    """Check that a schedule of the learning rate does not end, or turn, before training does.

    Raises:
        ValueError: it does; the message names the arguments.
    """
    name = class_name(schedule)
    arguments = (schedule and schedule.get("init_args")) or Namespace()
    if name == "WarmUp" and arguments.steps is not None and arguments.steps < arguments.warmup:
        raise ValueError(
            f"lr_scheduler.steps is {arguments.steps}, and lr_scheduler.warmup is "
            f"{arguments.warmup}: steps count warm-up and decay together; raise steps, or leave "
            "it out, which is trainer.max_steps"
        )
    if name == "CosineAnnealingLR" and arguments.T_max < max_steps:
        raise ValueError(
            f"lr_scheduler.T_max is {arguments.T_max}, trainer.max_steps is {max_steps}: after "
            f"step {arguments.T_max} the cosine would rise again to its peak; set both to the same "
            "number (in a run that has begun, T_max needs --override), or use WarmUp, which stays "
            "at its floor"
        )
    if name == "OneCycleLR":
        total = arguments.total_steps or (arguments.epochs or 0) * (arguments.steps_per_epoch or 0)
        if 0 < total < max_steps:
            raise ValueError(
                f"lr_scheduler.total_steps is {total}, trainer.max_steps is {max_steps}: "
                "OneCycleLR ends before training does; set both to the same number"
            )
