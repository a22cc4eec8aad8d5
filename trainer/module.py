"""The training step of every generator, teacher or student."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint as recomputed

from data.batch import Batch, BatchStream, IndexedDataset
from data.files import atomic_folder
from data.pairs import Pairs
from data.sequential import SequentialTars
from models.checkpoint import CODEC, FORMAT, TEXTS, fingerprint, load_checkpoint
from models.codec import Codec, LatentCodec, describe_codec, load_codec
from models.condition import Condition, Unconditional
from models.denoiser import Denoiser, count_evaluations
from models.description import build, describe
from models.diffusers.text import Prompts
from models.guidance import GuidanceConditioned
from models.interpolant import expand
from models.nets import Net, WithEndTime
from models.nets.embedding import ScalarEmbedding
from trainer.compatibility import (
    check_condition,
    check_pairs,
    check_parts,
    check_same_codec,
    check_same_model,
    check_same_texts,
    check_source,
    list_codecs,
    list_conditions,
)
from trainer.engine.fsdp import shard, to_local
from trainer.engine.trainer_parts import find_datamodule
from trainer.objectives import Matching, Objective
from trainer.objectives.base import Loss
from trainer.optimization import OptimizedModule, ParameterGroup
from trainer.step_outputs import StepOutputs
from trainer.step_random import StepRandom


def couple_noise(batch: Batch, random: StepRandom, x: Tensor) -> Tensor:
    """Return the noise coupled with x, (B, ...): a pair's, or fresh noise for samples without."""
    if batch.noise is None:
        return random.noise(x)
    if batch.paired is None:
        return batch.noise
    return batch.noise.where(expand(batch.paired, x), random.noise(x))


def inherit_weights(denoiser: Denoiser, source: Denoiser) -> None:
    """Load another denoiser's weights.

    Scalar embeddings that only this network has keep their initialisation, which adds nothing:
    the two denoisers then compute the same.
    """
    embeddings = tuple(
        f"{name}." for name, part in denoiser.named_modules() if isinstance(part, ScalarEmbedding)
    )
    weights = {}
    for key, value in denoiser.state_dict().items():
        if key.startswith(embeddings):
            weights[key] = value
    denoiser.load_state_dict(weights | source.state_dict())


def list_blocks(network: nn.Module) -> list[nn.Module]:
    """Return the blocks of a network, or of a denoiser's: none if it does not name any."""
    net = network.net if isinstance(network, Denoiser) else network
    return net.list_blocks() if isinstance(net, Net) else []


class SkipStudentUpdate(Callback):
    """Leaves the denoiser unchanged in steps that train only the objective's networks."""

    def __init__(self) -> None:
        self.step = 0  # of the current batch; trainer.global_step is larger after an epoch

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Note the step of the batch."""
        self.step = batch.step

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Drop the denoiser's gradients: the optimizer skips parameters without one."""
        assert isinstance(pl_module, Generator)
        if not pl_module.objective.student_learns(self.step):
            for value in pl_module.denoiser.parameters():
                value.grad = None


class Generator(OptimizedModule):
    """Trains a denoiser on images, latents or pairs.

    Args:
        denoiser: the network with its interpolant and prediction.
        objective: the loss; Matching by default.
        condition: what the network is conditioned on; nothing by default.
        codec: folder of the frozen autoencoder that encodes images, or encoded the latents in
            the data; none for pixels.
        initial: run or checkpoint with the (EMA) weights that training starts from: a student's
            teacher.
        recompute: recompute the activations of blocks in the backward pass: less memory, a third
            more time.
        compile: compile every block (torch.compile).
    """

    def __init__(
        self,
        denoiser: Denoiser,
        objective: Objective | None = None,
        condition: Condition | None = None,
        codec: str | None = None,
        initial: str | None = None,
        recompute: bool = False,
        compile: bool = False,
    ):
        super().__init__()
        if recompute and objective and objective.uses_jvp:
            raise ValueError(
                f"model.recompute: {type(objective).__name__} differentiates the network in "
                "forward mode, which cannot be recomputed; set it to false"
            )
        check_condition(denoiser, condition)

        # 1. What is trained. The objective's networks come after the denoiser.
        self.recompute = recompute
        self.compile_blocks = compile
        self.denoiser = denoiser
        self.objective = objective or Matching()
        self.condition = condition or Unconditional()
        self.networks = nn.ModuleDict(self.objective.networks)

        # 2. The frozen codec. In a list it is neither trained nor checkpointed.
        self._codec = [load_codec(codec)]

        # 3. What checkpoints record, so that the model can be rebuilt.
        self.spec = {
            "format": FORMAT,
            "codec": CODEC if isinstance(self.codec, LatentCodec) else None,
            "denoiser": describe(denoiser),
            "condition": describe(self.condition),
        }
        denoiser.jumps = self.objective.teaches_jumps
        if isinstance(denoiser.net, WithEndTime) and denoiser.net.two_time:
            self.spec["jumps"] = denoiser.jumps

        # 4. Teachers inside the objective, and initial weights: all in the same latents.
        for name, other in list_codecs(self.objective):
            check_same_codec(name, other, self.codec)
        for name, texts in list_conditions(self.objective):
            check_same_texts(name, texts, self.condition)
        self.initial = initial
        self.teacher_hash: str | None = None
        # A run that has begun has the weights, and goes on without what it started from.
        self.lacks_initial = bool(initial) and not Path(str(initial)).exists()
        if initial and not self.lacks_initial:
            loaded = load_checkpoint(initial)
            source = loaded.denoiser
            check_same_codec(f"model.initial ({initial})", describe_codec(loaded.codec), self.codec)
            check_same_texts(f"model.initial ({initial})", loaded.condition, self.condition)
            self.teacher_hash = fingerprint(source)
            inherit_weights(self.denoiser, source)

    @property
    def codec(self) -> Codec:
        """The frozen codec."""
        return self._codec[0]

    # The training step

    def training_step(self, batch: Batch, _: int) -> StepOutputs:
        """Return the loss of a batch; the step is the same for every objective."""
        # 1. Random numbers, keyed by the seed, the step and the position in the global batch.
        random = StepRandom(batch)

        # 2. The condition, dropped now and then for classifier-free guidance.
        drop = partial(random.uniform, "drop")
        cond = self.condition(batch.condition, chance=drop)

        # 3. The objective's loss, and its cost.
        with count_evaluations() as counter:
            loss = self.loss(batch, random, cond)

        # 4. In a step without the student, zero gradients: ranks wait for one of every weight.
        total = loss.total
        if not self.objective.student_learns(batch.step):
            total = total + sum(0 * to_local(value).sum() for value in self.denoiser.parameters())
        return {
            "loss": total,
            "parts": loss.parts,
            "per_sample": loss.per_sample,
            "evaluations": counter.count,
        }

    def validation_step(self, batch: Batch, _: int) -> None:
        """Log the loss of a held-out batch, without dropping conditions."""
        cond = self.condition(batch.condition)
        loss = self.loss(batch, StepRandom(batch), cond)
        self.log_heldout_loss(loss.total, batch)

    def loss(self, batch: Batch, random: StepRandom, cond: Tensor | None) -> Loss:
        """Return the objective's loss of a batch.

        Args:
            batch: images, latents or pairs.
            random: source of random numbers.
            cond: encoded condition, if any.
        """
        # 1. Data x, encoded by the codec.
        with torch.no_grad():
            x = batch.x if batch.latent else self.codec.encode(batch.x)

        # 2. Noise eps: a pair's, or fresh.
        eps = couple_noise(batch, random, x)

        # 3. The student, conditioned on the guidance scale of each sample if pairs record it.
        student: Denoiser | GuidanceConditioned = self.denoiser
        if batch.guidance is not None:
            student = GuidanceConditioned(self.denoiser, batch.guidance)

        # 4. The loss of x coupled with eps.
        return self.objective(student, x, eps, cond, random)

    # Set-up

    def configure_model(self) -> None:
        """Recompute, compile and shard the networks' blocks, as the arguments and strategy say."""
        for block in list_blocks(self.denoiser):
            if self.recompute:
                block.forward = partial(recomputed, block.forward, use_reentrant=False)
            if self.compile_blocks:
                block.compile()
        for network in (self.denoiser, *self.networks.values()):
            shard(network, list_blocks(network), self)

    def configure_callbacks(self) -> list[Callback]:
        """Return what keeps the denoiser unchanged while only other networks are trained."""
        return [SkipStudentUpdate()] if self.networks else []

    def parameter_groups(self) -> list[ParameterGroup]:
        """Return the parameters to optimize: the denoiser's, then those of the objective."""
        student = []
        for name, value in self.named_parameters():
            if not name.startswith("networks."):
                student.append(value)
        groups = [ParameterGroup(student)]
        others = list(self.networks.parameters())
        if others:
            groups.append(ParameterGroup(others, self.objective.learning_rate_ratio))
        return groups

    def on_fit_start(self) -> None:
        """Check that the data fit the model, and save codec and text encoders in the run."""
        # 1. The data, which may be a mixture.
        datamodule = find_datamodule(self.trainer)
        if datamodule:
            for source in datamodule.sources():
                self.check_data(source)

        # 2. Frozen parts: a run folder is complete by itself.
        self.codec.to(self.device)
        if self.trainer.is_global_zero:
            run = Path(self.trainer.default_root_dir)
            if isinstance(self.condition, Prompts):
                with atomic_folder(run / TEXTS) as folder:
                    self.condition.save(folder)
            if isinstance(self.codec, LatentCodec):
                with atomic_folder(run / CODEC) as folder:
                    self.codec.save(folder)

    def on_train_start(self) -> None:
        """Check that a run that begins has what it starts from."""
        if self.initial and self.lacks_initial and self.trainer.global_step == 0:
            load_checkpoint(self.initial)

    def check_data(self, source: BatchStream) -> None:
        """Check that a source fits the model, and record the guidance of pairs for checkpoints."""
        if isinstance(source, IndexedDataset | SequentialTars):
            check_source(source, self.denoiser, self.condition, self.codec)
        if isinstance(source, Pairs):
            check_pairs(source, self.denoiser, self.condition, self.teacher_hash)
            check_parts(source, self.codec, self.condition, self.initial)
            # A range of scales is what the student is conditioned on: no later scale replaces it.
            if not isinstance(self.spec.get("guidance"), list):
                self.spec["guidance"] = source.guidance

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what rebuilds the model without its configuration (models.checkpoint)."""
        checkpoint["rectify"] = self.spec

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the resumed run has this model."""
        # An argument that the stored description lacks has its default.
        stored = describe(build(checkpoint["rectify"].get("denoiser")))
        run = self.trainer.default_root_dir
        check_same_model(run, "model.denoiser", stored, self.spec["denoiser"])

        # The run's codec, which is about to be written again.
        frozen = Path(run) / CODEC
        if checkpoint["rectify"].get("codec") and frozen.is_dir():
            check_same_codec(f"this run ({frozen})", describe_codec(load_codec(frozen)), self.codec)
        if (Path(run) / TEXTS).is_dir():
            texts = Path(run) / TEXTS
            check_same_texts(f"this run ({texts})", Prompts(str(texts)), self.condition)
