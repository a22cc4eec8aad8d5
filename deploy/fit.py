"""`rectify fit`: LightningCLI with short class names, our checkpoints and log, and "to resume, run the same command"."""

import importlib
import logging
import os
import pkgutil
import re
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer

from data.files import atomic, naming
from data.stream import Stream
from deploy.hints import explain, one_line
from models import teacher
from trainer.callbacks.checkpoint import Checkpoints, WholeFiles
from trainer.callbacks.metrics import Metrics
from trainer.callbacks.preemption import EXIT, Preemption
from trainer.callbacks.watch import Watch, out_of_memory
from trainer.callbacks.watchdog import EXIT as LOST_EXIT
from trainer.callbacks.watchdog import Watchdog
from trainer.lean import lean
from trainer.module import Generator

ROOMS = ("models", "data", "trainer.objectives", "trainer.callbacks")
MODULES = ("trainer.module", "trainer.autoencoder", "trainer.flow", "trainer.times", "trainer.weights", "trainer.errors")
LOST = r"(?i)closed by peer|reset by peer|connection refused|broken pipe|NCCL|timed out"  # what collectives say of it
DEFAULTS = {  # of the Trainer; a configuration may say otherwise
    "max_epochs": -1,
    "use_distributed_sampler": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "check_val_every_n_epoch": None,  # there are no epochs:
    "val_check_interval": 500,  # batches between looks at data.heldout, if there is one
}


def import_components() -> None:
    """Import all that a configuration can name: imported classes are known by their short names."""
    for room in ROOMS:
        package = importlib.import_module(room)
        for module in pkgutil.walk_packages(package.__path__, room + "."):
            importlib.import_module(module.name)
    for name in MODULES:
        importlib.import_module(name)


def revision() -> str:
    """Return the version of this code: the commit it is checked out at, and whether it was changed since, or the package's."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():  # installed from a wheel, perhaps inside somebody's repository
        return version("rectify")
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git here
        return version("rectify")


class KeepConfig(SaveConfigCallback):
    """Writes RUN/config.yaml once nothing is left that could refuse the configuration; checkpoints carry it too."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write nothing yet."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the configuration, complete with defaults."""
        if trainer.is_global_zero:
            with atomic(Path(trainer.default_root_dir) / "config.yaml") as file:
                file.write(self.parser.dump(self.config, skip_none=False).encode())
        self.origin = {"config": self.parser.dump(self.config, skip_none=False), "revision": revision()}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the configuration, the version of the code, and wandb's run, which a resumed run goes on with."""
        run = str(trainer.logger.version) if isinstance(trainer.logger, WandbLogger) and trainer.logger.version else None
        checkpoint["origin"] = {**self.origin, "wandb": run}


def groups(module: LightningModule, rate: float) -> list[dict[str, Any]]:
    """Return the optimizer's groups: those that a module states, or all weights in one."""
    return module.groups(rate) if isinstance(module, Generator) else [{"params": list(module.parameters())}]


class Fit(LightningCLI):
    """Parses a configuration and builds trainer, model and data."""

    names: list[str] = []  # of all options, for hints

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run folder, and the callbacks that every run has."""
        parser.add_argument("--out", type=str, required=True, help="Run folder: config, checkpoints, metrics, codec.")
        parser.add_lightning_class_args(Checkpoints, "checkpoints")
        parser.add_lightning_class_args(Metrics, "metrics")
        parser.add_lightning_class_args(Watch, "watch")
        parser.add_lightning_class_args(Preemption, "preemption")
        parser.add_lightning_class_args(Watchdog, "watchdog")
        parser.link_arguments("out", "trainer.default_root_dir")
        parser.link_arguments("seed_everything", "data.seed")
        Fit.names = [action.dest for action in parser._actions]

    @staticmethod
    def configure_optimizers(lightning_module: LightningModule, optimizer: Optimizer, lr_scheduler: Any = None) -> Any:
        """Step the schedule with every optimizer step: the stream has no epochs, Lightning's default interval."""
        fresh = groups(lightning_module, optimizer.defaults.get("lr", 1.0))
        for group, now in zip(optimizer.param_groups, fresh, strict=True):
            group["params"] = now["params"]  # sharding replaces those it was built with
        if lr_scheduler is None:
            return optimizer
        if isinstance(lr_scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise ValueError("lr_scheduler: ReduceLROnPlateau waits for epochs, of which a stream has none; use one of steps")
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": lr_scheduler, "interval": "step"}}

    def _add_configure_optimizers_method_to_model(self, subcommand: str | None) -> None:
        """Build optimizer and schedule over the model's groups; Lightning's own would put all weights into one."""
        told = self.config_init.get("optimizer")
        rate = told.init_args.get("lr", 1.0) if told else 1.0
        stated = groups(self.model, rate)
        self.model.parameters = lambda: stated  # what Lightning asks for
        super()._add_configure_optimizers_method_to_model(subcommand)
        del self.model.parameters

    def before_instantiate_classes(self) -> None:
        """Stop early where nothing is left to do; log to wandb, offline, unless told otherwise."""
        config, run = self.config, Path(self.config.out)
        if config.trainer.max_steps < 1:
            raise ValueError(
                f"trainer.max_steps: {config.trainer.max_steps}; say how many steps to train (the stream is endless)"
            )
        self.newest = teacher.newest(run) if any((run / "checkpoints").glob("step=*.ckpt")) else None
        before = teacher.read(self.newest, tensors=False) if self.newest else {}
        if self.newest and before["global_step"] >= config.trainer.max_steps:
            print(f"fit: {run} is finished ({self.newest.name})", file=sys.stderr)
            raise SystemExit(0)
        if config.trainer.logger is None:
            os.environ.setdefault("WANDB_SILENT", "true")
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
            options = {"offline": True, "project": "rectify", "name": run.name, "save_dir": str(run)}
            if earlier := before.get("origin", {}).get("wandb"):
                options |= {"id": earlier, "resume": "allow"}
            config.trainer.logger = Namespace(class_path="lightning.pytorch.loggers.WandbLogger", init_args=Namespace(**options))


def build(args: Sequence[str]) -> Fit:
    """Build trainer, model and data; what a configuration cannot mean is a ValueError."""
    for path in (Path(word.removeprefix("--config=")) for word in args if word.endswith((".yaml", ".yml"))):
        with naming(path):  # the parser would overflow its stack on endless nesting
            yaml.safe_load(path.read_text()) if path.is_file() else None
    try:
        cli = Fit(
            datamodule_class=Stream,
            save_config_callback=KeepConfig,
            trainer_defaults=DEFAULTS,
            seed_everything_default=0,
            parser_kwargs={"exit_on_error": False, "prog": "rectify fit"},
            run=False,
            args=list(args),
        )
    except MisconfigurationException as error:
        raise ValueError(f"fit: trainer: {one_line(error)}") from error
    except OSError:
        raise
    except Exception as error:  # constructors, torch's too, raise many kinds on values that they cannot take
        raise ValueError(f"fit: {explain(error, Fit.names)}") from error
    cli.trainer.strategy.checkpoint_io = WholeFiles()
    join_log(cli.trainer.logger)
    return cli


def join_log(logger: Any) -> None:
    """Begin wandb's run: its service may hold a killed process's run for a moment, or one that it was slow to begin itself."""
    for wait in (1, 2, 4, 0) if isinstance(logger, WandbLogger) else ():
        if not wait:
            logger._wandb_init["id"] = None  # a new one, under the same name
        try:
            logger.experiment  # noqa: B018 (this begins it)
            return
        except Exception as error:  # wandb's own kinds, which it moves about
            if not wait or "is in use" not in str(error):
                raise OSError(
                    f"trainer.logger: wandb does not begin ({one_line(error)}); or give --trainer.logger false"
                ) from error
            time.sleep(wait)


def begin(cli: Fit) -> None:
    """Train; what cannot even begin is the configuration's or the checkpoint's fault, and named."""
    callbacks = cli.trainer.callbacks  # type: ignore[attr-defined]
    try:
        with lean(cli.trainer):
            cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.newest, weights_only=True)
    except SystemExit:
        if cli.trainer.interrupted:  # Lightning ends with its own code
            raise KeyboardInterrupt from None
        raise
    except (LookupError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        if said := out_of_memory(error, cli.trainer):
            raise ValueError(said) from error
        if cli.trainer.world_size > 1 and re.search(LOST, str(error)):
            print(f"rectify: error: another rank ended ({one_line(error)[:200]}); run the same command again", file=sys.stderr)
            raise SystemExit(LOST_EXIT) from error
        begun = any(isinstance(callback, Checkpoints) and callback.saved >= 0 for callback in callbacks)
        if begun or (isinstance(error, ValueError) and ours(error)):
            raise
        what = f"{cli.newest}: cannot go on from it" if cli.newest else "fit: cannot begin"
        raise ValueError(f"{what} ({type(error).__name__}: {one_line(error)})") from error


def ours(error: BaseException) -> bool:
    """Tell whether an error was raised by our own code, which says what it is about."""
    last = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        last = frame
    return last is not None and last.f_globals.get("__name__", "").split(".")[0] in ("models", "data", "trainer", "deploy")


def fit(args: Sequence[str]) -> None:
    """Train what a configuration says, from its newest checkpoint on if there is one."""
    import_components()
    warnings.filterwarnings(
        "ignore",
        r".*(LightningCLI's args parameter|does not have many workers|treespec|LeafSpec|across ranks is zero|in eval mode).*",
    )
    for chatty in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    cli = build(args)
    begin(cli)
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish()  # its own process would write on for a while
    callbacks = cli.trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(callback, Preemption) and callback.stopped for callback in callbacks):
        print(f"fit: stopped by a signal at step {cli.trainer.global_step}, saved; run the same command again", file=sys.stderr)
        raise SystemExit(EXIT)
