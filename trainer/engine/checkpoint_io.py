"""How Lightning writes and reads checkpoints."""

from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import TorchCheckpointIO

from data.files import atomic_file
from models.checkpoint import read_checkpoint
from models.tensors import save_nested


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically, and reads them with `models.checkpoint.read_checkpoint`.

    No code in a checkpoint is run. The error about a damaged checkpoint names its file.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint to a temporary file, and rename it."""
        with atomic_file(Path(path)) as file:
            save_nested(checkpoint, file)

    def load_checkpoint(self, path: str | Path, *_: Any, **__: Any) -> dict[str, Any]:
        """Return a checkpoint, on the CPU."""
        return read_checkpoint(path, resume=True)
