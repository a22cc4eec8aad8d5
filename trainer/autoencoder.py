"""Training a small AutoencoderKL: reconstruction and a light pull of the latents to a standard normal."""

from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL
from lightning.pytorch import LightningModule
from torch import Tensor

from data.batch import Batch
from data.files import atomic_folder
from models import codec, teacher
from trainer.draws import Draws


class Autoencoder(LightningModule):
    """A diffusers AutoencoderKL (Latent Diffusion, 2112.10752), trained with mean squared error and KL.

    Args:
        image_channels: 1 for grey, 3 for RGB.
        latent_channels: channels of the latents.
        block_out_channels: channels at each resolution; each but the last halves height and width.
        layers_per_block: residual layers at each resolution.
        norm_num_groups: groups of the group norms, a divisor of all block_out_channels.
        kl_weight: weight of the KL to N(0, 1), in nats per latent number, beside the squared error per pixel.
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

    def training_step(self, batch: Batch, _: int) -> dict[str, Tensor]:
        """Reconstruct from a draw of the posterior, whose noise is keyed like every other draw."""
        error, kl = self.losses(batch)
        return {"loss": error + self.kl_weight * kl, "mse": error.detach(), "kl": kl.detach()}

    def validation_step(self, batch: Batch, _: int) -> None:
        """The same on held-out images."""
        error, kl = self.losses(batch)
        self.log("heldout_loss", error + self.kl_weight * kl, sync_dist=True, batch_size=len(batch.x))

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the squared error per pixel, and the KL per latent number."""
        posterior = self.vae.encode(batch.x).latent_dist
        latent = posterior.mean + posterior.std * Draws(batch).noise(posterior.mean)
        error = (self.vae.decode(latent).sample - batch.x).square().mean()
        return error, (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean() / 2

    def _spec(self) -> dict[str, Any]:
        plain = {key: value for key, value in self.vae.config.items() if not key.startswith("_")}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume a run with another model."""
        if checkpoint["rectify"].get("autoencoder") != self._spec():
            raise ValueError(f"{self.trainer.default_root_dir}: holds a run of another model; choose another --out")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Mark the checkpoint as ours, and write the diffusers folder `codec/` that other stages read."""
        checkpoint["rectify"] = {"format": teacher.FORMAT, "autoencoder": self._spec()}
        if self.trainer.is_global_zero:
            with atomic_folder(Path(self.trainer.default_root_dir) / "codec") as folder:
                codec.save(self.vae, folder)
