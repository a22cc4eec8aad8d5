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
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from jsonargparse._typehints import ActionTypeHint
from lightning.pytorch.cli import (
    LightningArgumentParser,
    LightningCLI,
    LRSchedulerCallable,
    OptimizerCallable,
)
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from data.datamodule import DataModule
from data.files import errors_named
from deploy.cli import complete_flags
from deploy.hints import explain, one_line
from models.checkpoint import newest_checkpoint, read_checkpoint
from trainer.callbacks.checkpoint import Checkpoints
from trainer.callbacks.keep_config import KeepConfig
from trainer.callbacks.loss_guard import LossGuard, out_of_memory
from trainer.callbacks.metrics_log import MetricsLog
from trainer.callbacks.preemption import PREEMPTED_EXIT_CODE, Preemption
from trainer.callbacks.stall_watchdog import STALLED_EXIT_CODE, StallWatchdog
from trainer.engine.checkpoint_io import AtomicCheckpointIO
from trainer.engine.fast_loop import fast_loop
from trainer.optimization import OptimizedModule

COMPONENT_PACKAGES = ("models", "data", "trainer.objectives", "trainer.callbacks")
COMPONENT_MODULES = ("trainer.module", "trainer.autoencoder", "trainer.normalizing_flow")
PACKAGES = ("models", "data", "trainer", "deploy")
# Messages of torch.distributed when another rank has ended.
LOST_RANK = r"(?i)closed by peer|reset by peer|connection refused|broken pipe|NCCL|timed out"
IGNORED_WARNINGS = (
    r".*(LightningCLI's args parameter|does not have many workers|treespec|LeafSpec"
    r"|across ranks is zero|in eval mode).*"
)
WANDB_RETRY_SECONDS = (1, 2, 4)
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
            raise ValueError(f"fit: {explain(error, names)}") from error

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

    def before_instantiate_classes(self) -> None:
        """Exit if the run is finished; log to wandb, offline, if no logger is configured."""
        config = self.config
        run = Path(config.out)
        max_steps = config.trainer.max_steps
        if max_steps < 1:
            raise ValueError(
                f"trainer.max_steps is {max_steps}; set the number of optimizer steps to train "
                "(the stream of batches is endless)"
            )

        # the newest checkpoint
        self.newest = None
        saved: dict[str, Any] = {}
        if any((run / "checkpoints").glob("step=*.ckpt")):
            self.newest = newest_checkpoint(run)
            saved = read_checkpoint(self.newest, tensors=False)
        if self.newest and saved["global_step"] >= max_steps:
            print(f"fit: {run} is finished ({self.newest.name})", file=sys.stderr)
            raise SystemExit(0)

        # the logger
        if config.trainer.logger is None:
            os.environ.setdefault("WANDB_SILENT", "true")
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
            options = {
                "offline": True,
                "project": "rectify",
                "name": run.name,
                "save_dir": str(run),
            }
            earlier = saved.get("origin", {}).get("wandb")
            if earlier:
                options |= {"id": earlier, "resume": "allow"}
            config.trainer.logger = Namespace(
                class_path="lightning.pytorch.loggers.WandbLogger", init_args=Namespace(**options)
            )

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


def check_yaml(args: Sequence[str]) -> None:
    """Check that the YAML files among a command's words can be parsed.

    Raises:
        ValueError: one cannot. jsonargparse would overflow its stack on endless nesting.
    """
    for word in args:
        path = Path(word.removeprefix("--config="))
        if word.endswith((".yaml", ".yml")) and path.is_file():
            with errors_named(path):
                yaml.safe_load(path.read_text())


def build(args: Sequence[str]) -> Fit:
    """Build trainer, model and data.

    Raises:
        ValueError: the configuration is wrong; the message names the key.
    """
    check_yaml(args)
    cli = Fit(args)
    cli.trainer.strategy.checkpoint_io = AtomicCheckpointIO()
    start_logger(cli.trainer.logger)
    return cli


def start_logger(logger: Any) -> None:
    """Start the wandb run, if the logger is wandb's.

    The service of a killed process may hold that process's run for a moment. So a run that is in
    use is tried again, and at last a new run is started under the same name.
    """
    if not isinstance(logger, WandbLogger):
        return
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
    try:
        with ExitStack() as stack:
            if cli.config.fast_loop:
                stack.enter_context(fast_loop(cli.trainer))
            cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.newest, weights_only=True)
    except SystemExit:
        if cli.trainer.interrupted:  # Lightning turns an interrupt into an exit
            raise KeyboardInterrupt from None
        raise
    except (LookupError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        memory_advice = out_of_memory(error, cli.trainer)
        if memory_advice:
            raise ValueError(memory_advice) from error
        if cli.trainer.world_size > 1 and re.search(LOST_RANK, str(error)):
            cause = one_line(error)[:200]
            message = f"another rank ended ({cause}); run the same command again"
            print(f"rectify: error: {message}", file=sys.stderr)
            raise SystemExit(STALLED_EXIT_CODE) from error

        # An error during training, or a ValueError of this project, is raised as it is.
        has_started = cli.config_init.checkpoints.saved >= 0
        if has_started or (isinstance(error, ValueError) and raised_in_project(error)):
            raise
        what = f"{cli.newest}: cannot resume from it" if cli.newest else "fit: cannot start"
        raise ValueError(f"{what} ({type(error).__name__}: {one_line(error)})") from error


def raised_in_project(error: BaseException) -> bool:
    """Whether an error was raised by this project's code, so that its message names the cause."""
    last = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        last = frame
    if last is None:
        return False
    return last.f_globals.get("__name__", "").split(".")[0] in PACKAGES


def fit(args: Sequence[str]) -> None:
    """Train a configuration, from its newest checkpoint if there is one."""
    import_components()
    warnings.filterwarnings("ignore", IGNORED_WARNINGS)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)

    # train
    cli = build(args)
    begin(cli)

    # end
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish()  # otherwise its process writes for a while longer
    if cli.config_init.preemption.stopped:
        step = cli.trainer.global_step
        message = f"fit: stopped by a signal at step {step}, saved; run the same command again"
        print(message, file=sys.stderr)
        raise SystemExit(PREEMPTED_EXIT_CODE)
