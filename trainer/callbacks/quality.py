"""What few steps draw, in every validation: the figures of `rectify evaluate`, of the averaged weights."""

from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from data.images import Images, read_all
from data.noise import noises
from models.sampler import DDIM
from trainer.callbacks.ema import EMA
from trainer.callbacks.measures import judged, lent
from trainer.collect import asked, told
from trainer.evaluate.classifier import trained
from trainer.evaluate.measures import frechet, recall
from trainer.module import Generator

CHUNK = 250  # samples drawn at once, as in `rectify evaluate`


class Quality(Callback):
    """Draws samples whenever a run validates, and tells beside `heldout_loss` how good they are.

    They are drawn by DDIM, of the averaged weights where the run has an EMA, every class in turn and not guided, from the noises
    of `rectify evaluate`, and measured in the features of the set's classifier: `fd_1`, `accuracy_1`, `recall_1` and
    `precision_1` of one step, and so on. What it takes in network evaluations does not count as training.

    Args:
        images: folder made by `rectify pack`, with train and heldout sets and class labels.
        steps: of the sampler, each measured by itself.
        samples: drawn in each number of steps, a multiple of the number of processes.
        seed: of the noises.
    """

    def __init__(self, images: str, steps: list[int] = [1, 4], samples: int = 1000, seed: int = 2):  # noqa: B006 (read only)
        if not steps or min(steps) < 1:
            raise ValueError(f"Quality: steps is {steps}, they must all be at least 1, and there must be some")
        if samples < 100:
            raise ValueError(f"Quality: samples is {samples}, they must be at least 100")
        self.images, self.steps, self.samples, self.seed = images, steps, samples, seed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a run in which nothing is validated, and samples that do not go round."""
        judged(self, trainer, pl_module)
        if self.samples % trainer.world_size:
            raise ValueError(f"Quality: samples is {self.samples}, no multiple of the {trainer.world_size} processes")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the real images; the first rank trains the classifier, if nobody has yet."""
        sets = [Images(f"{self.images}/{split}") for split in ("train", "heldout")]
        for first in (True, False):
            if trainer.is_global_zero == first:
                self.look, _ = trained(Path(self.images), *sets)
            trainer.strategy.barrier("classifier")
        with torch.no_grad():
            self.real = torch.cat([self.look(x)[0] for part in sets for x, _ in read_all(part, len(part))])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the figures; all ranks draw, and each has all features."""
        assert isinstance(pl_module, Generator)
        ema = next((one for one in trainer.callbacks if isinstance(one, EMA)), None)  # type: ignore[attr-defined]
        with lent(pl_module.denoiser, ema.averages.get("", {}) if ema else {}):
            for steps in self.steps:
                parts = [self._drawn(pl_module, chunk, steps) for chunk in self._chunks(trainer)]
                features, hits = (trainer.strategy.all_gather(torch.cat(part)) for part in zip(*parts))
                fake = features.reshape(-1, features.shape[-1]).cpu()
                found = {"fd": frechet(self.real, fake), "recall": recall(self.real, fake), "precision": recall(fake, self.real)}
                if asked(pl_module.condition, range(1)) is not None:
                    found["accuracy"] = hits.float().mean().item()
                pl_module.log_dict({f"{name}_{steps}": value for name, value in found.items()}, logger=False, batch_size=1)

    def _chunks(self, trainer: Trainer) -> list[range]:
        """Return the indices that this rank draws, as many as any other."""
        mine = range(trainer.global_rank, self.samples, trainer.world_size)
        return [mine[start : start + CHUNK] for start in range(0, len(mine), CHUNK)]

    def _drawn(self, module: Generator, indices: range, steps: int) -> tuple[Tensor, Tensor]:
        """Return (features, whether the classifier sees the asked class) of samples."""
        raw = asked(module.condition, indices)
        cond = told(module.condition, raw, module.device)
        eps = noises(self.seed, indices, module.denoiser.shape).to(module.device)
        images = module.codec.decode(DDIM(steps)(module.denoiser, eps, cond)).clamp(-1, 1).cpu()
        features, logits = self.look(images)
        hits = torch.zeros(len(images), dtype=torch.bool) if raw is None else logits.argmax(1) == raw
        return features.to(module.device), hits.to(module.device)
