"""Quality of generated samples in every validation."""

from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from data.images import Images, read_all
from data.noise import noises
from models.sampler import DDIM
from trainer.callbacks.ema import find_averages
from trainer.callbacks.preemption import Preemption
from trainer.callbacks.trajectory_metrics import averaged_weights, check_validates_generator
from trainer.conditions import encode_condition, requested_conditions
from trainer.engine.trainer_parts import find_callback
from trainer.metrics.classifier import load_or_train_classifier
from trainer.metrics.sample_distances import frechet_distance, recall
from trainer.module import Generator

SAMPLE_CHUNK = 250  # samples generated at once, as in `rectify evaluate`


class SampleQuality(Callback):
    """Generates samples in every validation, and logs their quality with `heldout_loss`.

    The sampler is DDIM with the EMA weights, if the run has an EMA, without guidance and with every
    class in turn. It starts from the same noises as `rectify evaluate`. Samples are compared in
    the features of the image set's classifier. `fd_1`, `accuracy_1`, `recall_1` and `precision_1`
    are the metrics of one sampling step. The evaluations of the network do not count as training.

    Args:
        images: folder made by `rectify pack`, with train and heldout sets and class labels.
        steps: numbers of sampling steps, each of which is measured.
        samples: samples for each number of steps; a multiple of the number of processes.
        seed: seed of the noises.
    """

    def __init__(
        self,
        images: str,
        steps: list[int] = [1, 4],  # noqa: B006 (never modified)
        samples: int = 1000,
        seed: int = 2,
    ):
        if not steps or min(steps) < 1:
            raise ValueError(
                f"SampleQuality: steps is {steps}; give one or more numbers, each at least 1"
            )
        if samples < 100:
            raise ValueError(f"SampleQuality: samples is {samples}; it must be at least 100")
        self.images = images
        self.steps = steps
        self.samples = samples
        self.seed = seed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the run validates a generator, and that ranks can share the samples."""
        check_validates_generator(self, trainer, pl_module)
        if self.samples % trainer.world_size:
            raise ValueError(
                f"SampleQuality: samples is {self.samples}; it must be a multiple of the number of "
                f"processes, {trainer.world_size}"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the classifier and compute the features of the real images."""
        # The first rank trains the classifier if it does not exist yet; the others then load it.
        sets = [Images(f"{self.images}/{split}") for split in ("train", "heldout")]
        for first in (True, False):
            if trainer.is_global_zero == first:
                self.classifier, _ = load_or_train_classifier(Path(self.images), *sets)
            trainer.strategy.barrier("classifier")

        # Features of the real images.
        real = []
        with torch.no_grad():
            for images in sets:
                for x, _ in read_all(images, len(images)):
                    features, _ = self.classifier(x)
                    real.append(features)
        self.real = torch.cat(real)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Generate samples on all ranks, and log their metrics."""
        assert isinstance(pl_module, Generator)
        with averaged_weights(pl_module.denoiser, find_averages(trainer)):
            for steps in self.steps:
                metrics = self._measure(trainer, pl_module, steps)
                pl_module.log_dict(metrics, logger=False, batch_size=1)

    def _measure(self, trainer: Trainer, module: Generator, steps: int) -> dict[str, float]:
        """Return the metrics of samples, named such as fd_4; each rank gathers all features."""
        # Generate this rank's samples.
        chunk_features = []
        chunk_hits = []
        preemption = find_callback(trainer, Preemption)
        for number, indices in enumerate(self._chunks(trainer)):
            if preemption:
                preemption.stop_validation(trainer, number)
            features, hits = self._generate(module, indices, steps)
            chunk_features.append(features)
            chunk_hits.append(hits)

        # Gather those of all ranks.
        all_features = trainer.strategy.all_gather(torch.cat(chunk_features))
        all_hits = trainer.strategy.all_gather(torch.cat(chunk_hits))
        fake = all_features.reshape(-1, all_features.shape[-1]).cpu()

        # Compare them with the real images.
        found = {
            f"fd_{steps}": frechet_distance(self.real, fake),
            f"recall_{steps}": recall(self.real, fake),
            f"precision_{steps}": recall(fake, self.real),
        }
        if requested_conditions(module.condition, range(1)) is not None:
            found[f"accuracy_{steps}"] = all_hits.float().mean().item()
        return found

    def _chunks(self, trainer: Trainer) -> list[range]:
        """Return the indices of this rank's samples, in chunks; all ranks have the same number."""
        mine = range(trainer.global_rank, self.samples, trainer.world_size)
        starts = range(0, len(mine), SAMPLE_CHUNK)
        return [mine[start : start + SAMPLE_CHUNK] for start in starts]

    def _generate(self, module: Generator, indices: range, steps: int) -> tuple[Tensor, Tensor]:
        """Generate samples.

        Returns:
            Their features (B, d), and whether the classifier recognises the requested class, (B,).
        """
        # Conditions and noises.
        raw = requested_conditions(module.condition, indices)
        cond = encode_condition(module.condition, raw, module.device)
        eps = noises(self.seed, indices, module.denoiser.shape)
        eps = eps.to(module.device)

        # Samples, decoded to images.
        samples = DDIM(steps)(module.denoiser, eps, cond)
        images = module.codec.decode(samples).clamp(-1, 1).cpu()

        # Their features and classes.
        features, logits = self.classifier(images)
        hits = torch.zeros(len(images), dtype=torch.bool)
        if raw is not None:
            hits = logits.argmax(1) == raw
        return features.to(module.device), hits.to(module.device)
