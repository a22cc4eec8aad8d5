"""`rectify fit`: train with LightningCLI.

Classes have short names in configurations, every run has this project's checkpoints and log, and
running the same command again resumes from the newest checkpoint.
"""

import importlib
import logging
import os
import pkgutil
import re
import sys
import time
import traceback
import warnings
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from jsonargparse._typehints import ActionTypeHint
from lightning.pytorch import Trainer
from lightning.pytorch.cli import (
    LightningArgumentParser,
    LightningCLI,
    LRSchedulerCallable,
    OptimizerCallable,
)
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from data.attempts import begin_attempt, note_line
from data.datamodule import DataModule
from data.files import files_by_step
from data.lease import hold
from data.signals import Stopped
from deploy.changes import (
    Change,
    changes_optimizer,
    changes_since,
    changes_stopping,
    check_changes,
    show,
)
from deploy.cli import complete_flags, fail
from deploy.hints import explain, one_line
from deploy.launched_trainer import check_world, count_processes, follow_launcher
from deploy.launcher import explain_lost_process, is_first_rank, owning_ranks
from deploy.training_options import (
    check_paths,
    check_schedule,
    check_trainer,
    class_name,
    describe_no_validation,
)
from deploy.yaml_files import check_yaml, expand_home
from models.checkpoint import CHECKPOINT_SUFFIX, newest_checkpoint, read_checkpoint
from trainer.callbacks.checkpoint import Checkpoints
from trainer.callbacks.early_end import MEANT, find_stopping, recorded_reason, stopping_message
from trainer.callbacks.keep_config import KeepConfig
from trainer.callbacks.loss_guard import LossGuard, out_of_memory
from trainer.callbacks.metrics_log import MetricsLog
from trainer.callbacks.preemption import PREEMPTED_EXIT_CODE, Preemption
from trainer.callbacks.stall_watchdog import StallWatchdog
from trainer.engine.checkpoint_io import AtomicCheckpointIO
from trainer.engine.fast_loop import fast_loop
from trainer.engine.float32_updates import update_in_float32
from trainer.optimization import OptimizedModule

COMPONENT_PACKAGES = ("models", "data", "trainer.objectives", "trainer.callbacks")
COMPONENT_MODULES = (
    "trainer.module",
    "trainer.autoencoder",
    "trainer.normalizing_flow",
    "trainer.schedules",
)
PACKAGES = ("models", "data", "trainer", "deploy")
IGNORED_WARNINGS = (
    r".*(LightningCLI's args parameter|does not have many workers|treespec|LeafSpec"
    r"|across ranks is zero|in eval mode|`srun` command is available|all_gather is deprecated).*"
)
LIGHTNING_CALLBACKS = "lightning.pytorch.callbacks."
# What Lightning prints if it is configured; the rest of its log is noise.
REPORTS = ("lightning.pytorch.profilers", "lightning.pytorch.callbacks.model_summary")
REQUIRED = ("out", "model", "data.source")
GROUPS = ("trainer", "data", "checkpoints", "metrics", "loss_guard", "preemption", "watchdog")
CHECKPOINTS = "checkpoints"  # folder in a run
WANDB_RETRY_SECONDS = (1, 2, 4)
WANDB_OFFLINE = ("offline", "dryrun")  # values of WANDB_MODE
PARSER_OPTIONS = {
    "exit_on_error": False,
    "prog": "rectify fit",
    "usage": "rectify fit --config FILE [--config FILE ...] [--NAME VALUE ...]",
    "description": "Train an autoencoder, a teacher or a student. The same command continues a "
    "run from its newest checkpoint. Later files and options win over earlier ones. "
    "`--print_config` prints the whole configuration; `--model.help Generator` lists the "
    "arguments of a class, which are options too: `--model.recompute true`.",
    "epilog": "An option of type bool needs no value: `--NAME` means `--NAME true`. Arguments of "
    "classes need one.",
}
# Defaults of the Trainer, which a configuration may override.
TRAINER_DEFAULTS = {
    "max_epochs": -1,
    "use_distributed_sampler": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "check_val_every_n_epoch": None,  # the stream of batches has no epochs
    "val_check_interval": 500,  # batches between validations on data.heldout, if there is one
}


def import_components() -> None:
    """Import every class that a configuration can name; only imported classes have short names."""
    for package_name in COMPONENT_PACKAGES:
        package = importlib.import_module(package_name)
        for module in pkgutil.walk_packages(package.__path__, package_name + "."):
            importlib.import_module(module.name)
    for name in COMPONENT_MODULES:
        importlib.import_module(name)


class Fit(LightningCLI):
    """Parses a configuration and builds trainer, model and data.

    Args:
        args: the options of the command.

    Raises:
        ValueError: the configuration is wrong; the message names the key.
    """

    def __init__(self, args: Sequence[str]):
        try:
            super().__init__(
                datamodule_class=DataModule,
                save_config_callback=KeepConfig,
                trainer_defaults=TRAINER_DEFAULTS,
                seed_everything_default=0,
                parser_kwargs=PARSER_OPTIONS,
                run=False,
                args=list(args),
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,  # our checkpoints rebuild the model themselves
            )
        except MisconfigurationException as error:
            raise ValueError(f"fit: trainer: {one_line(error)}") from error
        except OSError:
            raise
        except Exception as error:  # constructors, torch's too, raise many kinds for wrong values
            names = [action.dest for action in self.parser._actions]
            known = explain_missing(error) or explain_option(error)
            raise ValueError(f"fit: {known or explain(error, names)}") from error

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run folder, the callbacks that every run has, the loop and the optimizer."""
        parser.add_argument(
            "--out",
            type=str,
            required=True,
            help="run folder, for the configuration, checkpoints, metrics and codec.",
        )
        parser.add_lightning_class_args(Checkpoints, "checkpoints")
        parser.add_lightning_class_args(MetricsLog, "metrics")
        parser.add_lightning_class_args(LossGuard, "loss_guard")
        parser.add_lightning_class_args(Preemption, "preemption")
        parser.add_lightning_class_args(StallWatchdog, "watchdog")
        parser.add_argument(
            "--fast_loop",
            type=bool,
            default=False,
            help="skip Lightning's bookkeeping that a step does not need: a few percent of a step "
            "of 10 ms, the same weights; see trainer/engine/README.md.",
        )
        parser.add_argument(
            "--optimizer",
            type=OptimizerCallable | None,
            help="optimizer class and its arguments: `--optimizer AdamW --optimizer.lr 1e-3`.",
        )
        parser.add_argument(
            "--lr_scheduler",
            type=LRSchedulerCallable | None,
            help="schedule of the learning rate, stepped after every optimizer step; "
            "without one it is constant.",
        )
        parser.add_argument(
            "--override",
            type=bool,
            default=False,
            help="go on with a run though settings that change what is learned differ from its "
            "configuration; docs/reproducibility.md has the table.",
        )
        parser.add_argument(
            "--resume",
            type=str | None,
            help="go on from this checkpoint of the run, in RUN/checkpoints, instead of the newest "
            "one; newer ones are renamed.",
        )
        parser.link_arguments("out", "trainer.default_root_dir")
        parser.link_arguments("seed_everything", "data.seed")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the options; a boolean one without a value means true."""
        flags = []
        for action in parser._actions:
            if isinstance(action, ActionTypeHint) and action._typehint in (bool, bool | None):
                flags.append(action.dest)
        words = complete_flags(args, flags)
        check_nested_values(words, {action.dest for action in parser._actions})
        super().parse_arguments(parser, words)
        expand_home(self.config)

    def before_instantiate_classes(self) -> None:
        """Check the configuration; exit if the run is finished; derive what is not configured."""
        config = self.config
        check_groups(config)
        check_paths(config)
        run = Path(config.out)
        max_steps = config.trainer.max_steps
        if max_steps is None or max_steps < 1:
            raise ValueError(
                f"trainer.max_steps is {max_steps}; set the number of optimizer steps to train "
                "(the stream of batches is endless)"
            )
        check_trainer(config.trainer, config.data.heldout is not None)
        check_schedule(config.lr_scheduler, max_steps)

        # what the user configured, without what is derived below
        override, resume = config.override, config.resume
        config.override, config.resume = False, None  # they are meant for one command
        configured = self.parser.dump(config, skip_none=False)

        # the newest checkpoint, and what has changed since
        if is_first_rank():
            hold(run, count_processes(config.trainer.devices, config.trainer.num_nodes))
        self.newest = find_start(run, resume)
        if not self.newest:
            check_initial(config.model)
        saved: dict[str, Any] = {}
        if self.newest:
            saved = read_checkpoint(self.newest, tensors=False)
        changes = changes_since(saved, configured)
        lines = [f"fit: {run}: {change}" for change in changes]
        if self.newest:
            step = saved["global_step"]
            reason = "" if changes_stopping(changes) else recorded_reason(run, step)
            finished = step >= max_steps or bool(reason)
            check_changes(run, changes, override, finished)
            if finished:
                details = f"{reason}, {self.newest.name}" if reason else self.newest.name
                if is_first_rank():
                    print(*lines, f"fit: {run} is finished ({details})", sep="\n", file=sys.stderr)
                raise SystemExit(0)
        self.save_config_kwargs = {
            "configured": configured,
            "changes": lines,
            "new_settings": override and changes_optimizer(changes),
        }

        # what is not done in so few steps
        line = describe_no_validation(config)
        if line and is_first_rank():
            print(f"fit: {line}", file=sys.stderr)

        # what callbacks log, and the length of the schedule
        config.trainer.log_every_n_steps = config.metrics.every
        schedule = config.lr_scheduler
        if class_name(schedule) == "WarmUp" and schedule.init_args.steps is None:
            schedule.init_args.steps = max_steps

        # the logger
        if config.trainer.logger is None:
            os.environ.setdefault("WANDB_SILENT", "true")
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
            options = {
                "offline": os.environ.get("WANDB_MODE", "offline") in WANDB_OFFLINE,
                "project": os.environ.get("WANDB_PROJECT", "rectify"),
                "name": os.environ.get("WANDB_NAME", run.name),
                "save_dir": os.environ.get("WANDB_DIR", str(run)),
            }
            earlier = saved.get("origin", {}).get("wandb")
            if earlier and not is_copy(run, changes):
                options |= {"id": earlier, "resume": "allow"}
            config.trainer.logger = Namespace(
                class_path="lightning.pytorch.loggers.WandbLogger", init_args=Namespace(**options)
            )

    def instantiate_trainer(self, **options: Any) -> Trainer:
        """Build the trainer, on the processes that a launcher started if there is one."""
        launched = follow_launcher(self.config_init.trainer)
        trainer = super().instantiate_trainer(**options, **launched)
        check_world(trainer)
        # Lightning's handlers communicate inside the handler; data/signals.py has ours.
        connector = trainer._signal_connector
        connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        return trainer

    def after_instantiate_classes(self) -> None:
        """Give the model the optimizer and the schedule that it builds."""
        optimizer = self.config_init.optimizer
        if not isinstance(self.model, OptimizedModule):
            raise ValueError(
                f"model: {type(self.model).__name__} is not an OptimizedModule "
                "(trainer.optimization), whose optimizer the configuration chooses"
            )
        if optimizer is None:
            raise ValueError(
                "optimizer: none is given; choose one, e.g. --optimizer AdamW --optimizer.lr 1e-3"
            )
        self.model.make_optimizer = optimizer
        self.model.make_lr_scheduler = self.config_init.lr_scheduler


def check_initial(model: Namespace) -> None:
    """Check that what a run starts from is there; a run that has begun does without it."""
    initial = (model.get("init_args") or Namespace()).get("initial")
    if initial and not Path(initial).exists():
        newest_checkpoint(initial)  # its error names the way out


def check_nested_values(words: Sequence[str], options: Collection[str]) -> None:
    """Check that the arguments of configured classes have values.

    Their types are not known before the configuration is parsed, so none can be a bare flag.

    Args:
        words: the words of the command.
        options: the names of the parser's options.

    Raises:
        ValueError: an argument has no value.
    """
    for word, following in zip(words, [*words[1:], "--"]):
        name = word.removeprefix("--")
        is_nested = name != word and "." in name and "=" not in name and name not in options
        if is_nested and following.startswith("--"):
            raise ValueError(f"`{name}` has no value; give it one, e.g. `--{name} true`")


def explain_missing(error: Exception) -> str:
    """Return what to do about an option without a value; "" if the error is another one."""
    text = one_line(error)
    found = re.search(r"arguments are required: ([\w.]+)", text)
    found = found or re.search(r'Parser key "([\w.]+)":.*Got value: None', text)
    if not found or found[1] not in REQUIRED:
        return ""
    return (
        f"`{found[1]}` is not configured: give a base and the file that is added to it "
        f"(--config base.yaml --config more.yaml), or --{found[1]}"
    )


def explain_option(error: Exception) -> str:
    """Return why an option cannot be given; "" if the error is another one."""
    text = one_line(error)
    if "trainer.default_root_dir" in text:
        return "trainer.default_root_dir follows out; leave it out"
    if "TensorBoardLogger" in str(error) and find_spec("tensorboard") is None:
        return "trainer.logger: TensorBoardLogger needs the extra: pip install rectify[tensorboard]"
    found = re.search(r"\b(SequentialLR|ChainedScheduler)\b", text)
    if found:
        return (
            f"lr_scheduler: {found[1]} is made of other schedules, each with an optimizer, which "
            "YAML does not have; use WarmUp, for a warm-up with a decay"
        )
    return ""


def check_groups(config: Namespace) -> None:
    """Check that the keys with options below them are mappings.

    Raises:
        ValueError: one is not; the message names it.
    """
    for name in GROUPS:
        if not isinstance(config[name], Namespace):
            raise ValueError(
                f"{name} is {show(config[name])}; it must be a mapping of its options, or be left "
                "out"
            )


def is_copy(run: Path, changes: Sequence[Change]) -> bool:
    """Return whether a run folder is the copy of another one, which still exists."""
    for change in changes:
        if change.key == "out":
            return Path(change.before).exists() and not Path(change.before).samefile(run)
    return False


def find_start(run: Path, resume: str | None) -> Path | None:
    """Return the checkpoint that a run goes on from; None if it starts.

    Args:
        run: the run folder.
        resume: the checkpoint that the user chose; None for the newest.

    Raises:
        ValueError: the chosen one is none of the run's.
    """
    folder = run / CHECKPOINTS
    if resume is None:
        found = files_by_step(folder, CHECKPOINT_SUFFIX)
        return found[-1] if found else None
    path = Path(resume)
    if not path.exists() or path.resolve().parent != folder.resolve():
        names = [file.name for file in files_by_step(folder, CHECKPOINT_SUFFIX)]
        raise ValueError(
            f"resume is {resume}; it must be a checkpoint in {folder} "
            f"({', '.join(names) or 'which has none'}); to begin another run from a checkpoint, "
            "give --model.initial"
        )
    return path


def build(args: Sequence[str]) -> Fit:
    """Build trainer, model and data.

    Raises:
        ValueError: the configuration is wrong; the message names the key.
    """
    check_yaml(args)
    cli = Fit(args)
    cli.trainer.strategy.checkpoint_io = AtomicCheckpointIO()
    update_in_float32(cli.trainer)
    # else loggers obey a RANK left over in the shell
    rank_zero_only.rank = cli.trainer.global_rank  # type: ignore[attr-defined]
    for logger in cli.trainer.loggers:
        start_logger(logger)
    return cli


def start_logger(logger: Any) -> None:
    """Start the wandb run, if the logger is wandb's.

    The service of a killed process may hold that process's run for a moment. So a run that is in
    use is tried again, and at last a new run is started under the same name.
    """
    if not isinstance(logger, WandbLogger):
        return
    logger._wandb_init.pop("anonymous", None)  # wandb warns of it even if it is None
    is_online = not logger._offline and os.environ.get("WANDB_MODE") != "disabled"
    if is_online and is_first_rank():  # it waits for up to 90 s without a word
        print("fit: trainer.logger: connecting to wandb", file=sys.stderr, flush=True)
    for seconds in WANDB_RETRY_SECONDS:
        try:
            logger.experiment  # noqa: B018 (this starts the run)
            return
        except Exception as error:  # wandb's own kinds, which differ between its versions
            if "is in use" not in str(error):
                raise logger_error(error) from error
            time.sleep(seconds)
    logger._wandb_init["id"] = None
    try:
        logger.experiment  # noqa: B018
    except Exception as error:
        raise logger_error(error) from error


def logger_error(error: Exception) -> OSError:
    """Return the error to raise if wandb does not start."""
    return OSError(
        f"trainer.logger: wandb does not start ({one_line(error)}); fix it, "
        "or train without it: --trainer.logger false"
    )


def begin(cli: Fit) -> None:
    """Train from the newest checkpoint, or from the start.

    Raises:
        ValueError: training cannot start because of the configuration or the checkpoint, or
            memory ran out; the message names the cause.
        SystemExit: another rank ended.
    """
    trainer = cli.trainer
    begin_attempt(Path(cli.config.out), trainer.world_size, trainer.global_rank)
    try:
        with ExitStack() as stack:
            if cli.config.fast_loop:
                stack.enter_context(fast_loop(cli.trainer))
            stack.enter_context(owning_ranks())  # which Lightning starts
            cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.newest, weights_only=True)
    except Stopped:
        if not cli.config_init.preemption.stopped:  # nothing was to be saved
            raise
    except SystemExit:
        if cli.trainer.interrupted:  # Lightning turns an interrupt into an exit
            raise KeyboardInterrupt from None
        raise
    except (
        AssertionError,
        AttributeError,
        LookupError,
        MisconfigurationException,
        RuntimeError,
        TypeError,
        ValueError,
        ZeroDivisionError,
    ) as error:
        memory_advice = out_of_memory(error, cli.trainer)
        if memory_advice:
            raise ValueError(memory_advice) from error
        lost = explain_lost_process(error, cli.trainer.world_size)
        if lost:
            raise SystemExit(fail(lost.message, lost.code)) from error

        # What Lightning's callbacks and torch's optimizers refuse is the configuration's fault.
        module = raising_module(error)
        if module.startswith(LIGHTNING_CALLBACKS) or isinstance(error, MisconfigurationException):
            raise ValueError(f"fit: trainer.callbacks: {one_line(error)}") from error
        if module.startswith("torch.optim."):
            text = one_line(error) or type(error).__name__
            raise ValueError(f"fit: optimizer or lr_scheduler: {text}") from error

        # An error during training, or a ValueError of this project, is raised as it is.
        has_started = cli.config_init.checkpoints.saved >= 0
        in_project = module.split(".")[0] in PACKAGES
        is_defect = isinstance(error, AssertionError | ZeroDivisionError)
        if has_started or is_defect or (isinstance(error, ValueError) and in_project):
            raise
        what = f"{cli.newest}: cannot resume from it" if cli.newest else "fit: cannot start"
        raise ValueError(f"{what} ({type(error).__name__}: {one_line(error)})") from error


def raising_module(error: BaseException) -> str:
    """Return the name of the module that raised an error."""
    last = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        last = frame
    return "" if last is None else str(last.f_globals.get("__name__", ""))


def end_early(cli: Fit) -> None:
    """End a command that has not reached trainer.max_steps.

    Raises:
        SystemExit: more is to be done, with exit code 75.
        FloatingPointError: what EarlyStopping monitors has diverged.
    """
    trainer = cli.trainer
    run = trainer.default_root_dir
    where = f"at step {trainer.global_step} of {trainer.max_steps}"
    stopping = find_stopping(trainer)
    if stopping and stopping.stopping_reason not in MEANT:
        raise FloatingPointError(
            f"{run}: stopped {where}: {stopping_message(stopping)}; lower optimizer.lr or set "
            "trainer.gradient_clip_val, and begin another run"
        )
    if stopping:
        message = f"fit: {run} is finished, {where}: {stopping_message(stopping)}"
        code = 0
    else:
        message = f"fit: {run}: stopped {where}, saved; run the same command again to go on"
        code = PREEMPTED_EXIT_CODE
    if trainer.is_global_zero:
        print(message, file=sys.stderr)
    if code:
        note_line(message)
        raise SystemExit(code)


def fit(args: Sequence[str]) -> None:
    """Train a configuration, from its newest checkpoint if there is one."""
    import_components()
    warnings.filterwarnings("ignore", IGNORED_WARNINGS)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in REPORTS:
        logging.getLogger(name).setLevel(logging.INFO)

    # train
    cli = build(args)
    begin(cli)

    # end
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish()  # otherwise its process writes for a while longer
    if cli.config_init.preemption.stopped:
        step = cli.trainer.global_step
        message = f"fit: stopped by a signal at step {step}, saved; run the same command again"
        if cli.trainer.is_global_zero:
            print(message, file=sys.stderr)
        note_line(message)
        raise SystemExit(PREEMPTED_EXIT_CODE)
    if cli.trainer.global_step < cli.trainer.max_steps:
        end_early(cli)
