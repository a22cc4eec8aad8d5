"""The one training step of every generator, teacher or student."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint as recomputed

from data.batch import Batch, Set
from data.files import atomic_folder
from data.mixed import Mixed
from data.pairs import Pairs
from data.streamed import Streamed
from models import codec as codecs
from models import teacher
from models.codec import KL
from models.condition import Condition, Unconditional
from models.denoiser import Denoiser
from models.guidance import Told
from models.interpolant import expand
from models.nets.pretrained import Pretrained
from models.nets.reading import Reading
from models.text import Prompts
from trainer.draws import Draws
from trainer.fsdp import local, shard
from trainer.objectives import Matching, Objective


def coupled(batch: Batch, draws: Draws, x: Tensor) -> Tensor:
    """Return the noise of x: what a pair brings, fresh noise for samples that bring none."""
    if batch.noise is None:
        return draws.noise(x)
    if batch.paired is None:
        return batch.noise
    return batch.noise.where(expand(batch.paired, x), draws.noise(x))


def inherit(denoiser: Denoiser, source: Denoiser) -> None:
    """Begin with another denoiser's weights; what only this network reads beside stays silent, as it begins."""
    own, there = denoiser.state_dict(), source.state_dict()
    readings = tuple(f"{name}." for name, part in denoiser.named_modules() if isinstance(part, Reading))
    denoiser.load_state_dict({key: own[key] for key in own if key.startswith(readings)} | there)


def answers(denoiser: Denoiser, condition: Condition | None) -> None:
    """Refuse a condition that tells what the network does not read."""
    net = denoiser.net
    if getattr(net, "always_told", False) and getattr(condition, "dropout", 0):
        raise ValueError("model.condition.dropout: this network has no label that means 'not told'; set it to 0")
    here, there = getattr(net, "tokens", 0), len(condition.empty) if isinstance(condition, Prompts) else 0
    if here != there:
        raise ValueError(f"model.condition: tells texts of {there} tokens, the network reads {here} (0: none); give it Prompts")
    if isinstance(condition, Prompts) and isinstance(net, Pretrained):
        nothing = condition.empty.to(net.nothing.device)
        if nothing.shape != net.nothing.shape or not torch.allclose(nothing, net.nothing, atol=1e-3):
            raise ValueError(f"model.condition.encoder: {condition.encoder} has not the text encoder of this network")


class Rests(Callback):
    """Leaves the denoiser as it is while it rests: without gradients the optimizer does nothing."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Drop the gradients that only kept ranks from waiting."""
        assert isinstance(pl_module, Generator)
        if pl_module.objective.rests:
            for value in pl_module.denoiser.parameters():
                value.grad = None


class Generator(LightningModule):
    """Trains a denoiser on images, latents or pairs.

    Args:
        denoiser: what is trained.
        objective: the loss.
        condition: what the network is told.
        codec: folder of the frozen autoencoder that images, or the latents in the data, go through; none for pixels.
        initial: run or checkpoint whose (EMA) weights the denoiser starts from: a student's teacher.
        recompute: blocks keep no activations for the backward pass but compute them again: less memory, a third more time.
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
        if recompute and objective and objective.derives:
            raise ValueError(f"model.recompute: {type(objective).__name__} differentiates the network forward; set it to false")
        answers(denoiser, condition)
        self.recompute, self.compile_blocks = recompute, compile
        self.denoiser, self.objective = denoiser, objective or Matching()
        self.condition, self.initial = condition or Unconditional(), initial
        self.networks = nn.ModuleDict(self.objective.networks)  # registered last: the denoiser's weights come first
        self._codec = [codecs.load(codec)]  # in a list: frozen, so neither trained nor in checkpoints
        parts = {"denoiser": teacher.describe(denoiser), "condition": teacher.describe(self.condition)}
        self.spec = {"format": teacher.FORMAT, "codec": "codec" if isinstance(self.codec, KL) else None, **parts}
        self.teacher_hash: str | None = None
        if initial:
            source = teacher.load(initial)[0]
            self.teacher_hash = teacher.fingerprint(source)
            inherit(self.denoiser, source)

    def configure_model(self) -> None:
        """Prepare the network's blocks as the strategy and the arguments say, once."""
        blocks = getattr(self.denoiser.net, "blocks", [])
        for block in blocks:
            if self.recompute:
                block.forward = partial(recomputed, block.forward, use_reentrant=False)
            if self.compile_blocks:
                block.compile()
        for denoiser in (self.denoiser, *self.networks.values()):
            shard(denoiser, getattr(getattr(denoiser, "net", denoiser), "blocks", []), self)

    def groups(self, rate: float) -> list[dict[str, Any]]:
        """Return the optimizer's groups: the denoiser at this learning rate, what the objective owns at that of its own."""
        others = list(self.networks.parameters())
        mine = [value for name, value in self.named_parameters() if not name.startswith("networks.")]
        return [{"params": mine}, *([{"params": others, "lr": rate * self.objective.rate}] if others else [])]

    @property
    def codec(self) -> codecs.Codec:
        """The frozen codec."""
        return self._codec[0]

    def training_step(self, batch: Batch, _: int) -> Tensor:
        """One step: the same for every method, because a pair brings its own noise."""
        draws = Draws(batch)
        loss = self.loss(batch, draws, self.condition(batch.condition, chance=partial(draws.uniform, "drop")))
        if self.objective.rests:  # ranks wait for a gradient of every weight
            loss = loss + sum(0 * local(value).sum() for value in self.denoiser.parameters())
        return loss

    def configure_callbacks(self) -> list[Callback]:
        """Let the denoiser rest while networks of the objective are trained alone."""
        return [Rests()] if self.networks else []

    def validation_step(self, batch: Batch, _: int) -> None:
        """The same on held-out samples, told all."""
        self.log(
            "heldout_loss",
            self.loss(batch, Draws(batch), self.condition(batch.condition)),
            sync_dist=True,
            batch_size=len(batch.x),
        )

    def loss(self, batch: Batch, draws: Draws, cond: Tensor | None) -> Tensor:
        """Return the objective's loss of a batch."""
        with torch.no_grad():
            x = batch.x if batch.latent else self.codec.encode(batch.x)
        denoiser = self.denoiser if batch.scale is None else Told(self.denoiser, batch.scale)
        return self.objective(denoiser, x, coupled(batch, draws, x), cond, draws)

    def on_fit_start(self) -> None:
        """Refuse pairs of another origin, and put codec and text encoder into the run, which is whole by itself."""
        self.codec.to(self.device)
        stream = getattr(self.trainer, "datamodule", None)
        for source in (getattr(stream, "source", None), getattr(stream, "heldout", None)):
            for part in source.sources if isinstance(source, Mixed) else [source]:
                if isinstance(part, Set | Streamed):
                    self._agree(part)
        if isinstance(self.condition, Prompts) and self.trainer.is_global_zero:
            with atomic_folder(Path(self.trainer.default_root_dir) / teacher.TEXTS) as folder:
                self.condition.save(folder)
        if isinstance(self.codec, KL) and self.trainer.is_global_zero:
            with atomic_folder(Path(self.trainer.default_root_dir) / "codec") as folder:
                self.codec.save(folder)

    def _agree(self, source: Set | Streamed) -> None:
        """Refuse data that this model cannot have been meant for, naming both values."""
        found, one = source.manifest, source.sample()
        told, classes = getattr(self.denoiser.net, "classes", None), getattr(self.condition, "classes", 0)
        if told is not None and told != classes:
            raise ValueError(f"model.denoiser.net.classes is {told}, model.condition has {classes}: make them equal")
        if found["kind"] == "latents" and not isinstance(self.codec, KL):
            raise ValueError("model.codec: the data are latents; give the codec folder beside them (LATENTS/codec)")
        weights = self.codec.weights() if isinstance(self.codec, KL) else None  # foreign latents do not tell theirs
        if found["kind"] == "latents" and isinstance(self.codec, KL) and found.get("codec", weights) != weights:
            raise ValueError(f"model.codec: {self.codec.path} is not the codec that {source} was encoded with")
        x = one.x if one.latent else self._codec[0].encode(one.x)
        if x.shape[1:] != self.denoiser.shape:
            sizes = f"{tuple(x.shape[1:])}, model.denoiser.net is built for {self.denoiser.shape}"
            raise ValueError(f"data.source: a sample has the shape (channels, size, size) = {sizes}")
        if classes and len(found.get("classes") or []) > classes:
            raise ValueError(f"data.source: has {len(found['classes'])} classes, model.condition.classes is {classes}")
        if isinstance(source, Pairs):
            for part in () if source.convert else ("interpolant", "prediction"):
                source.agree(part, repr(getattr(self.denoiser, part)), "; to convert them set data.source.convert")
            if self.teacher_hash:
                source.agree("teacher", self.teacher_hash)
            if isinstance(self.condition, Prompts):
                source.agree("prompts", self.condition.digest)
            self._note(source)

    def _note(self, source: Pairs) -> None:
        """Note for checkpoints which guidance the pairs hold; refuse scales that nobody would read."""
        if isinstance(source.guidance, list) and not self.denoiser.told_scale:
            raise ValueError(
                f"data.source: {source.path} records scales of guidance, from {source.guidance[0]:g} to {source.guidance[1]:g}, "
                "which the network does not read; set model.denoiser.net.scaled"
            )
        if not isinstance(self.spec.get("guidance"), list):  # a range is what a student can be told
            self.spec["guidance"] = source.guidance

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what rebuilds the denoiser without this configuration (models.teacher.load)."""
        checkpoint["rectify"] = self.spec

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume a run with another model."""
        here, there = self.spec["denoiser"], checkpoint["rectify"].get("denoiser")
        if teacher.describe(teacher.build(there)) != here:  # arguments that it does not know have their defaults
            raise ValueError(f"{self.trainer.default_root_dir}: holds a run of another model ({there}); this one is {here}")
