"""Sharded training: FSDP2 under Lightning, with checkpoints that ranks write side by side while training goes on."""

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from data.files import atomic_folder, canonical
from models import sharded, teacher
from models.tensors import save_nested


def shard(net: nn.Module, blocks: Iterable[nn.Module], module: LightningModule) -> None:
    """Shard a network over the ranks, block by block (nothing happens under other strategies)."""
    if (mesh := module.device_mesh) is not None:
        for part in (*blocks, net):
            fully_shard(part, mesh=mesh["data_parallel"])


def local(value: Tensor) -> Tensor:
    """Return this rank's part of a tensor, sharing its memory."""
    return value.to_local() if isinstance(value, DTensor) else value


def own(value: Tensor, memory: DeviceMesh) -> Tensor:
    """Return a copy of a tensor that training does not write to, in main memory (a mesh of the ranks' CPUs)."""
    if isinstance(value, DTensor):
        local = value.to_local().detach().to("cpu", copy=True)
        return DTensor.from_local(local, memory, value.placements, shape=value.shape, stride=value.stride())
    return value.detach().to("cpu", copy=True)


class FSDP2(ModelParallelStrategy):
    """Weights, averages and optimizer state are spread over all ranks; so are checkpoints, which are folders.

    A checkpoint is copied to main memory, written while training goes on, and renamed when all ranks have written.

    Args:
        timeout: seconds after which a rank that others wait for is given up.
    """

    def __init__(self, timeout: float = 1800.0):
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=True, timeout=timedelta(seconds=timeout))
        self._writing: Future[None] | None = None

    def setup_environment(self) -> None:
        """Join the other ranks; all of them share the data."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()
        self._group = dist.new_group(backend="gloo", timeout=self._timeout)  # of its own: training uses the other meanwhile
        self._memory = DeviceMesh.from_group(self._group, "cpu")
        self._writer = ThreadPoolExecutor(1, "checkpoint")

    def setup(self, trainer: Trainer) -> None:
        """Refuse what cannot be sharded."""
        if not is_overridden("configure_model", trainer.lightning_module):
            raise ValueError(f"trainer.strategy: fsdp2 shards generators, not {type(trainer.lightning_module).__name__}; use ddp")
        super().setup(trainer)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Copy the state, and begin to write it."""
        self.finish()
        rest, tensors = sharded.split(checkpoint)
        self._path, stack = Path(filepath), ExitStack()
        folder = self.broadcast(stack.enter_context(atomic_folder(self._path)) if self.global_rank == 0 else self._path)
        copies = {key: own(value, self._memory) for key, value in tensors.items()}
        self._writing = self._writer.submit(self._write, stack, folder, rest, copies)

    def _write(self, stack: ExitStack, folder: Path, rest: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Write this rank's part; the folder gets its name when all have; no rank goes on before that is known."""
        sums: dict[str, str] = {}
        try:
            writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
            dcp.save(tensors, storage_writer=writer, process_group=self._group)
            mine = folder.glob(f"shard-{self.global_rank + 1:05d}-*.safetensors")
            sums = {path.name: sharded.checksum(path) for path in mine}
            failed = ""
        except (Exception, CheckpointException) as error:
            failed = causes(error)
        told = self._exchange((failed, sums))
        failed = "; ".join(sorted({text for text, _ in told if text}))
        if self.global_rank == 0:
            failed = self._name(stack, folder, rest, {name: value for _, part in told for name, value in part.items()}, failed)
        if failed := self._exchange(failed)[0]:
            raise OSError(f"{self._path}: {failed}; make room and run the same command again")

    def _name(self, stack: ExitStack, folder: Path, rest: dict[str, Any], sums: dict[str, str], failed: str) -> str:
        """Add what is no tensor, and give the folder its name; return what went wrong, if anything did."""
        try:
            with stack:
                if failed:
                    raise OSError(failed)
                with (folder / sharded.REST).open("wb") as file:
                    save_nested(rest, file)
                sums[sharded.REST] = sharded.checksum(folder / sharded.REST)
                (folder / sharded.SUMS).write_bytes(canonical(sums))
        except Exception as error:
            return failed or causes(error)
        return ""

    def _exchange(self, value: Any) -> list[Any]:
        """Return every rank's value, by rank, to all of them."""
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def finish(self) -> None:
        """Wait until the last checkpoint has its name."""
        writing, self._writing = self._writing, None
        if writing:
            writing.result()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint of any number of ranks, sharded or not."""
        path = Path(checkpoint_path)
        assert self.model is not None
        whole = not path.is_dir()
        checkpoint = teacher.read(path) if whole else sharded.read(path, self.device_mesh["data_parallel"])
        options = StateDictOptions(full_state_dict=whole)
        set_model_state_dict(self.model, checkpoint["state_dict"], options=options)
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            set_optimizer_state_dict(self.model, optimizer, named(state, self.model) if whole else state, options=options)
        return checkpoint

    def teardown(self) -> None:
        """Let the last checkpoint be written."""
        self.finish()
        super().teardown()


def causes(error: BaseException) -> str:
    """Return on one line what went wrong, of all ranks if torch gathered it."""
    found = [cause[0] for cause in error.failures.values()] if isinstance(error, CheckpointException) else [error]
    return "; ".join(sorted({" ".join(str(cause).split()) for cause in found}))


def named(state: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return an optimizer's state with parameters by name instead of by number."""
    names = [name for name, value in model.named_parameters() if value.requires_grad]
    groups = [{**group, "params": [names[i] for i in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[i]: value for i, value in state["state"].items()}, "param_groups": groups}


StrategyRegistry.register("fsdp2", FSDP2, description="fully sharded, checkpoints written while training goes on")
