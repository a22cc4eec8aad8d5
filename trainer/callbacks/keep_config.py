"""The configuration of a run, written to its folder and into its checkpoints."""

import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger

from data.files import atomic_file


def revision() -> str:
    """Return the git commit, with "-dirty" if files were changed, or the package's version."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():  # installed from a wheel, perhaps inside another repository
        return version("rectify")
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # git is not installed, or fails
        return version("rectify")


class KeepConfig(SaveConfigCallback):
    """Writes RUN/config.yaml when training starts, and the configuration into every checkpoint.

    It is not written earlier, because a configuration that is refused must not replace the last.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Do nothing; Lightning's callback would write the file here."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the configuration with all defaults."""
        text = self.parser.dump(self.config, skip_none=False)
        if trainer.is_global_zero:
            with atomic_file(Path(trainer.default_root_dir) / "config.yaml") as file:
                file.write(text.encode())
        self.origin = {"config": text, "revision": revision()}

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the configuration, the code's version, and the wandb run that a restart continues."""
        wandb_run = None
        if isinstance(trainer.logger, WandbLogger) and trainer.logger.version:
            wandb_run = str(trainer.logger.version)
        checkpoint["origin"] = {**self.origin, "wandb": wandb_run}
