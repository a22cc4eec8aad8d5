"""Sharded training: FSDP2 in Lightning, with sharded checkpoints written in the background."""

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from data.files import atomic_folder, canonical, file_checksum
from models import sharded
from models.checkpoint import read_checkpoint
from models.tensors import save_nested


def shard(net: nn.Module, blocks: Iterable[nn.Module], module: LightningModule) -> None:
    """Shard a network over the ranks, block by block; under other strategies do nothing."""
    mesh = module.device_mesh
    if mesh is None:
        return
    for part in (*blocks, net):
        fully_shard(part, mesh=mesh["data_parallel"])


def to_local(value: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor, sharing its memory; any other tensor itself."""
    return value.to_local() if isinstance(value, DTensor) else value


def copy_to_cpu(value: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return a copy of a tensor in main memory, which training does not change.

    Args:
        value: the tensor.
        mesh: the CPUs of the ranks, over which the copy of a sharded tensor is sharded.
    """
    copy = to_local(value).detach().to("cpu", copy=True)
    if not isinstance(value, DTensor):
        return copy
    return DTensor.from_local(
        copy, mesh, value.placements, shape=value.shape, stride=value.stride()
    )


class FSDP2(ModelParallelStrategy):
    """Shards weights, averages and optimizer state over all ranks.

    A checkpoint is a folder with files from every rank. Its state is copied to main memory and
    written while training continues; the folder is renamed once all ranks have written their part.

    Args:
        timeout: seconds that a rank waits for others before it raises an error.
    """

    def __init__(self, timeout: float = 1800.0):
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=True,
            timeout=timedelta(seconds=timeout),
        )
        self._writing: Future[None] | None = None

    def setup_environment(self) -> None:
        """Connect the ranks, all of which train on different data."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()
        # A separate process group: training uses the other one while a checkpoint is written.
        self._group = dist.new_group(backend="gloo", timeout=self._timeout)
        self._cpu_mesh = DeviceMesh.from_group(self._group, "cpu")
        self._writer = ThreadPoolExecutor(1, "checkpoint")

    def setup(self, trainer: Trainer) -> None:
        """Check that the module can be sharded."""
        module = trainer.lightning_module
        if not is_overridden("configure_model", module):
            raise ValueError(
                f"trainer.strategy: fsdp2 shards generators, not {type(module).__name__}; use ddp"
            )
        super().setup(trainer)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        """Copy the state, and start to write it in the background."""
        self.wait_for_checkpoint()
        rest, tensors = sharded.split(checkpoint)

        # The first rank makes a temporary folder for all.
        self._path = Path(filepath)
        stack = ExitStack()
        folder = self._path
        if self.global_rank == 0:
            folder = stack.enter_context(atomic_folder(self._path))
        folder = self.broadcast(folder)

        # Copy the tensors, and write the copies.
        copies = {key: copy_to_cpu(value, self._cpu_mesh) for key, value in tensors.items()}
        self._writing = self._writer.submit(self._write, stack, folder, rest, copies)

    def _write(
        self, stack: ExitStack, folder: Path, rest: dict[str, Any], tensors: dict[str, Tensor]
    ) -> None:
        """Write a checkpoint; all ranks raise if any rank fails.

        Args:
            stack: on the first rank, renames the folder when it is closed.
            folder: the temporary folder.
            rest: what is not a tensor, as split by `models.sharded`.
            tensors: the tensors by name.
        """
        # torch.distributed.checkpoint is slow to import.
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

        # 1. Write this rank's part.
        failure = ""
        checksums: dict[str, str] = {}
        try:
            writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
            dcp.save(tensors, storage_writer=writer, process_group=self._group)
            for path in folder.glob(f"shard-{self.global_rank + 1:05d}-*.safetensors"):
                checksums[path.name] = file_checksum(path)
        except (Exception, CheckpointException) as error:
            failure = describe_error(error)
            checksums = {}

        # 2. Exchange the results.
        failures = set()
        all_checksums: dict[str, str] = {}
        for rank_failure, rank_checksums in self._gather(failure, checksums):
            if rank_failure:
                failures.add(rank_failure)
            all_checksums |= rank_checksums
        failure = "; ".join(sorted(failures))

        # 3. The first rank completes the folder; no rank continues before it is renamed.
        if self.global_rank == 0:
            failure = self._complete_folder(stack, folder, rest, all_checksums, failure)
        (failure,) = self._gather(failure)[0]
        if failure:
            raise OSError(f"{self._path}: {failure}; make room and run the same command again")

    def _complete_folder(
        self,
        stack: ExitStack,
        folder: Path,
        rest: dict[str, Any],
        checksums: dict[str, str],
        failure: str,
    ) -> str:
        """Write what is not a tensor, and rename the folder.

        Args:
            stack: renames the folder when it is closed, or deletes it after an error.
            folder: the temporary folder.
            rest: what is not a tensor.
            checksums: of the files with tensors, by name.
            failure: why a rank could not write its part, or "".

        Returns:
            Why the checkpoint could not be written, or "".
        """
        try:
            with stack:
                if failure:
                    raise OSError(failure)
                with (folder / sharded.REST).open("wb") as file:
                    save_nested(rest, file)
                checksums[sharded.REST] = file_checksum(folder / sharded.REST)
                (folder / sharded.CHECKSUMS).write_bytes(canonical(checksums))
        except Exception as error:
            return failure or describe_error(error)
        return ""

    def _gather(self, *values: Any) -> list[tuple[Any, ...]]:
        """Return every rank's values, by rank, on all ranks."""
        gathered: list[tuple[Any, ...]] = [()] * self.world_size
        dist.all_gather_object(gathered, values, group=self._group)
        return gathered

    def wait_for_checkpoint(self) -> None:
        """Wait until the last checkpoint is complete; raise if it could not be written."""
        writing = self._writing
        self._writing = None
        if writing:
            writing.result()

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load a checkpoint that any number of ranks wrote, sharded or not."""
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            set_model_state_dict,
            set_optimizer_state_dict,
        )

        # Read it.
        path = Path(checkpoint_path)
        assert self.model is not None
        is_sharded = path.is_dir()
        if is_sharded:
            checkpoint = sharded.read(path, self.device_mesh["data_parallel"])
        else:
            checkpoint = read_checkpoint(path, resume=True)

        # Load the weights and the optimizers' states.
        options = StateDictOptions(full_state_dict=not is_sharded)
        set_model_state_dict(self.model, checkpoint["state_dict"], options=options)
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            named = state if is_sharded else name_parameters(state, self.model)
            set_optimizer_state_dict(self.model, optimizer, named, options=options)
        return checkpoint

    def teardown(self) -> None:
        """Wait until the last checkpoint is complete."""
        self.wait_for_checkpoint()
        super().teardown()


def describe_error(error: BaseException) -> str:
    """Return an error's message on one line; those of all ranks if torch has gathered them."""
    from torch.distributed.checkpoint.api import CheckpointException

    errors = [error]
    if isinstance(error, CheckpointException):
        errors = [failure[0] for failure in error.failures.values()]
    messages = {" ".join(str(one).split()) for one in errors}
    return "; ".join(sorted(messages))


def name_parameters(state: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return an optimizer's state with names of parameters instead of their numbers."""
    names = [name for name, value in model.named_parameters() if value.requires_grad]
    groups = []
    for group in state["param_groups"]:
        groups.append({**group, "params": [names[i] for i in group["params"]]})
    return {
        "state": {names[i]: value for i, value in state["state"].items()},
        "param_groups": groups,
    }


StrategyRegistry.register(
    "fsdp2", FSDP2, description="fully sharded; checkpoints are written while training continues"
)
