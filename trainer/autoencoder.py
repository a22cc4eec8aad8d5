"""Training of a small AutoencoderKL: reconstruction, and a weak KL of latents to N(0, 1)."""

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from data.batch import Batch, IndexedDataset
from data.files import atomic_folder
from models.checkpoint import CODEC, FORMAT
from models.codec import save_codec
from trainer.engine.trainer_parts import find_datamodule
from trainer.optimization import OptimizedModule
from trainer.step_outputs import StepOutputs
from trainer.step_random import StepRandom


class AutoencoderLosses(NamedTuple):
    """The two parts of the loss, scalars."""

    mse: Tensor  # squared error per pixel
    kl: Tensor  # KL to N(0, 1), in nats per latent number


class Autoencoder(OptimizedModule):
    """A diffusers AutoencoderKL, trained with mean squared error and KL.

    Latent Diffusion, Rombach et al. 2021 (arXiv 2112.10752).

    Args:
        image_channels: 1 for grey, 3 for RGB.
        latent_channels: channels of the latents.
        block_out_channels: channels at each resolution; each but the last halves height and
            width.
        layers_per_block: residual layers at each resolution.
        norm_num_groups: groups of the group norms, a divisor of all block_out_channels.
        kl_weight: weight of the KL to N(0, 1), in nats per latent number, relative to the squared
            error per pixel.
    """

    def __init__(
        self,
        image_channels: int = 1,
        latent_channels: int = 4,
        block_out_channels: tuple[int, ...] = (16, 32, 32),
        layers_per_block: int = 1,
        norm_num_groups: int = 8,
        kl_weight: float = 1e-4,
    ):
        from diffusers import AutoencoderKL  # slow to import

        super().__init__()
        self.kl_weight = kl_weight
        self.vae = AutoencoderKL(
            in_channels=image_channels,
            out_channels=image_channels,
            latent_channels=latent_channels,
            block_out_channels=tuple(block_out_channels),
            down_block_types=("DownEncoderBlock2D",) * len(block_out_channels),
            up_block_types=("UpDecoderBlock2D",) * len(block_out_channels),
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
        )

    def on_fit_start(self) -> None:
        """Check that height and width of all images can be halved as often as needed."""
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        datamodule = find_datamodule(self.trainer)
        for source in datamodule.sources() if datamodule else ():
            if not isinstance(source, IndexedDataset):
                continue
            for sample in source.samples_of_sizes():
                height, width = sample.x.shape[2:]
                if height % factor or width % factor:
                    raise ValueError(
                        f"data.source: {source} has images of {width}x{height} pixels, but "
                        f"model.block_out_channels divides both by {factor}; pack the images again "
                        f"with multiples of {factor}, or give fewer block_out_channels"
                    )

    def training_step(self, batch: Batch, _: int) -> StepOutputs:
        """Return the loss of a batch, with its two parts."""
        mse, kl = self.losses(batch)
        parts = {"mse": mse.detach(), "kl": kl.detach()}
        return {"loss": mse + self.kl_weight * kl, "parts": parts}

    def validation_step(self, batch: Batch, _: int) -> None:
        """Log the loss of held-out images."""
        mse, kl = self.losses(batch)
        self.log_heldout_loss(mse + self.kl_weight * kl, batch)

    def losses(self, batch: Batch) -> AutoencoderLosses:
        """Return the two parts of the loss, reconstructing from a sample of the posterior."""
        # The noise is keyed like all random numbers of a training step.
        posterior = self.vae.encode(batch.x).latent_dist
        noise = StepRandom(batch).noise(posterior.mean)
        latent = posterior.mean + posterior.std * noise
        reconstruction = self.vae.decode(latent).sample
        mse = (reconstruction - batch.x).square().mean()
        nats = posterior.mean.square() + posterior.var - 1 - posterior.logvar
        return AutoencoderLosses(mse, nats.mean() / 2)

    def _spec(self) -> dict[str, Any]:
        """Return the autoencoder's configuration as plain values."""
        spec = {}
        for key, value in self.vae.config.items():
            if not key.startswith("_"):
                spec[key] = list(value) if isinstance(value, tuple) else value
        return spec

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the resumed run has this model."""
        if checkpoint["rectify"].get("autoencoder") != self._spec():
            raise ValueError(
                f"{self.trainer.default_root_dir}: holds a run of another model; choose another "
                "--out"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record the model, and write the diffusers folder `codec/` for later stages."""
        checkpoint["rectify"] = {"format": FORMAT, "autoencoder": self._spec()}
        if self.trainer.is_global_zero:
            with atomic_folder(Path(self.trainer.default_root_dir) / CODEC) as folder:
                save_codec(self.vae, folder)
