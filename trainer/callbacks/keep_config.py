"""The configuration of a run, written to its folder and into its checkpoints."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger

from data.attempts import revision
from data.files import atomic_file
from data.progress import print_message
from trainer.optimization import apply_configured_settings


class KeepConfig(SaveConfigCallback):
    """Writes RUN/config.yaml when training starts, and the configuration into every checkpoint.

    It is not written earlier, because a configuration that is refused must not replace the last.
    What the program derives, such as the logger's folder, is not in it, so that it can be given to
    another run.

    Args:
        parser: of the command.
        config: what the command trains with.
        configured: what the user configured, with all defaults, as YAML.
        changes: a line for each setting that a resumed run did not have before.
        new_settings: whether optimizer and schedule of a resumed run get the configured settings
            instead of their checkpoint's.
    """

    def __init__(
        self,
        parser: LightningArgumentParser,
        config: Namespace,
        configured: str,
        changes: Sequence[str] = (),
        new_settings: bool = False,
    ):
        super().__init__(parser, config)
        self.changes = changes
        self.new_settings = new_settings
        self.origin = {"config": configured, "revision": revision()}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Do nothing; Lightning's callback would write the file here."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show what has changed, apply it, and write the configuration with all defaults."""
        if self.new_settings:
            apply_configured_settings(trainer)
        if not trainer.is_global_zero:
            return
        for change in self.changes:
            print_message(change)
        with atomic_file(Path(trainer.default_root_dir) / "config.yaml") as file:
            file.write(self.origin["config"].encode())

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the configuration, the code's version, and the wandb run that a restart continues."""
        wandb_run = None
        if isinstance(trainer.logger, WandbLogger) and trainer.logger.version:
            wandb_run = str(trainer.logger.version)
        checkpoint["origin"] = {**self.origin, "wandb": wandb_run}
