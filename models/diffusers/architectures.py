"""Networks of diffusers: for each kind, its inputs, its outputs and how it is called.

All kinds are called as `architecture(x_t, time, condition, guidance) -> y`. A text condition is
one tensor, (B, tokens, channels), as `models.diffusers.text` makes it: the states of the tokens,
and where the network needs more, one more token or channel.
"""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# Inputs of a UNet2DConditionModel that rectify does not provide.
UNKNOWN_INPUTS = (
    "class_embed_type",
    "encoder_hid_dim_type",
    "num_class_embeds",
    "time_cond_proj_dim",
)


class Architecture(ABC):
    """One kind of diffusers network.

    Args:
        model: the network.
        source: its folder or kind, for error messages.
        pixels: height and width of the images, an input of SDXL and PixArt.
        side: height and width of the states, where the config does not contain it (Flux).
    """

    reads_text = False
    reads_guidance = False  # whether it takes a guidance scale
    needs_class = False  # whether it has no label for "no class"
    may_output_variance = False  # after the mean; it is ignored
    patch = 0  # height and width of a token, where diffusers shifts times by their number
    text_channels = 0
    pooled_channels = 0  # of the last token that embed the whole text; 0: no such token

    def __init__(self, model: nn.Module, source: Path | str, pixels: int, side: int):
        config = dict(model.config)  # type: ignore[arg-type]
        self.model = model
        self.source = source
        self.pixels = pixels
        self.size: Any = config.get("sample_size")
        self.channels = config["in_channels"]
        self.classes = 0
        self.configure(config, side)
        if not isinstance(self.size, int):
            raise ValueError(
                f"{source}: its sample_size is {self.size}; it must be one number, for squares"
            )
        self._check_output(config["out_channels"] or config["in_channels"], config["in_channels"])

    def _check_output(self, outputs: int, inputs: int) -> None:
        """Check that the network outputs as many channels as it takes, or also a variance."""
        if outputs != inputs and not (self.may_output_variance and outputs == 2 * inputs):
            raise ValueError(
                f"{self.source}: it outputs {outputs} channels for {inputs}; they must be equal"
            )

    @abstractmethod
    def configure(self, config: dict[str, Any], side: int) -> None:
        """Set the sizes of states and conditions from a complete config."""

    def __call__(
        self, x_t: Tensor, time: Tensor, condition: Tensor | None, guidance: Tensor | None
    ) -> Tensor:
        """Return the network's output, (B, C, H, W); where it also outputs a variance, the mean.

        Args:
            x_t: states, (B, C, H, W).
            time: 1000 t, (B,).
            condition: class labels (B,) or None; texts (B, tokens, channels).
            guidance: guidance scales, (B,), or None.
        """
        arguments = self.arguments(x_t, time, condition)
        return self.model(x_t, time, **arguments).sample[:, : self.channels]

    def arguments(self, x_t: Tensor, time: Tensor, condition: Tensor | None) -> dict[str, Any]:
        """Return the network's arguments for a condition."""
        return {}

    def blocks(self) -> list[nn.Module]:
        """Return the network's blocks: the units that are sharded, compiled and recomputed."""
        blocks: list[nn.Module] = []
        for part in self.model.children():
            if isinstance(part, nn.ModuleList):
                blocks += part
        return blocks


class UNet2D(Architecture):
    """UNet2DModel: unconditional, or with classes, of which one is always required."""

    def configure(self, config: dict[str, Any], side: int) -> None:
        self.classes = config.get("num_class_embeds") or 0
        self.needs_class = self.classes > 0

    def arguments(self, x_t: Tensor, time: Tensor, condition: Tensor | None) -> dict[str, Any]:
        if self.needs_class and condition is None:
            raise ValueError(
                "Pretrained: this UNet2DModel needs a class; it has no label for 'no class'"
            )
        return {"class_labels": condition if self.classes else None}


class DiTTransformer(Architecture):
    """DiTTransformer2DModel: with classes, of which the last means "no class"."""

    may_output_variance = True

    def configure(self, config: dict[str, Any], side: int) -> None:
        self.classes = config.get("num_embeds_ada_norm") or 0

    def arguments(self, x_t: Tensor, time: Tensor, condition: Tensor | None) -> dict[str, Any]:
        if condition is None:
            condition = torch.full_like(time, self.classes, dtype=torch.long)
        return {"class_labels": condition}

    def blocks(self) -> list[nn.Module]:
        return super().blocks()[1:]  # DiT calls its first block's embedding from outside


class UNet2DCondition(Architecture):
    """UNet2DConditionModel: Stable Diffusion 1 and 2; SDXL, with image sizes and a pooled text."""

    reads_text = True

    def configure(self, config: dict[str, Any], side: int) -> None:
        embed_type = config["addition_embed_type"]
        self.reads_sizes = embed_type == "text_time"
        if embed_type and not self.reads_sizes:
            raise ValueError(
                f"{self.source}: its addition_embed_type is {embed_type}; "
                "it must be text_time (SDXL) or none"
            )
        for key in UNKNOWN_INPUTS:
            if config[key] is not None:
                raise ValueError(
                    f"{self.source}: it has more inputs than a text ({key}: {config[key]}); "
                    "only texts are supported"
                )
        self.text_channels = config["cross_attention_dim"]
        if not isinstance(self.text_channels, int):
            raise ValueError(
                f"{self.source}: its cross_attention_dim is {self.text_channels}; "
                "it must be one number"
            )
        projected = config["projection_class_embeddings_input_dim"] or 0
        self.pooled_channels = projected - 6 * (config["addition_time_embed_dim"] or 0)

    def arguments(self, x_t: Tensor, time: Tensor, condition: Tensor | None) -> dict[str, Any]:
        assert condition is not None
        if not self.reads_sizes:
            return {"encoder_hidden_states": condition}
        # original size, top left of the crop, target size
        sizes = [self.pixels, self.pixels, 0, 0, self.pixels, self.pixels]
        return {
            "encoder_hidden_states": condition[:, :-1],
            "added_cond_kwargs": {
                "text_embeds": condition[:, -1, : self.pooled_channels],
                "time_ids": condition.new_tensor(sizes).expand(len(x_t), -1),
            },
        }


class PixArtTransformer(Architecture):
    """PixArtTransformer2DModel: texts with a mask of their tokens, and perhaps image sizes."""

    reads_text = True
    may_output_variance = True

    def configure(self, config: dict[str, Any], side: int) -> None:
        self.reads_sizes = bool(self.model.use_additional_conditions)
        # The mask is one more channel.
        self.text_channels = (config["caption_channels"] or config["cross_attention_dim"]) + 1

    def arguments(self, x_t: Tensor, time: Tensor, condition: Tensor | None) -> dict[str, Any]:
        assert condition is not None
        resolution = None
        ratio = None
        if self.reads_sizes:
            sizes = condition.new_tensor([[self.pixels, self.pixels]])
            resolution = sizes.expand(len(x_t), -1)
            ratio = condition.new_ones(len(x_t), 1)
        return {
            "timestep": time,
            "encoder_hidden_states": condition[..., :-1],
            "encoder_attention_mask": condition[..., -1],
            "added_cond_kwargs": {"resolution": resolution, "aspect_ratio": ratio},
        }

    def __call__(
        self, x_t: Tensor, time: Tensor, condition: Tensor | None, guidance: Tensor | None
    ) -> Tensor:
        arguments = self.arguments(x_t, time, condition)
        return self.model(x_t, **arguments).sample[:, : self.channels]


class SD3Transformer(Architecture):
    """SD3Transformer2DModel: Stable Diffusion 3, with a pooled text as the last token."""

    reads_text = True

    def configure(self, config: dict[str, Any], side: int) -> None:
        self.text_channels = config["joint_attention_dim"]
        self.pooled_channels = config["pooled_projection_dim"]
        self.patch = config["patch_size"]

    def __call__(
        self, x_t: Tensor, time: Tensor, condition: Tensor | None, guidance: Tensor | None
    ) -> Tensor:
        assert condition is not None
        output = self.model(
            x_t,
            timestep=time,
            encoder_hidden_states=condition[:, :-1],
            pooled_projections=condition[:, -1, : self.pooled_channels],
        )
        return output.sample[:, : self.channels]


class FluxTransformer(Architecture):
    """FluxTransformer2DModel: its tokens are patches of 2 x 2, with positions; its time is t."""

    reads_text = True

    def configure(self, config: dict[str, Any], side: int) -> None:
        self.text_channels = config["joint_attention_dim"]
        self.pooled_channels = config["pooled_projection_dim"]
        self.reads_guidance = config["guidance_embeds"]
        self.patch = 2
        self.channels = config["in_channels"] // 4
        self.size = side

    def __call__(
        self, x_t: Tensor, time: Tensor, condition: Tensor | None, guidance: Tensor | None
    ) -> Tensor:
        assert condition is not None
        b, c, h, w = x_t.shape
        # patches of 2 x 2 as tokens
        patches = x_t.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
        tokens = patches.reshape(b, h * w // 4, 4 * c)
        # positions of the patches; those of a text's tokens are zero
        rows = torch.arange(h // 2, device=x_t.device)
        columns = torch.arange(w // 2, device=x_t.device)
        row, column = torch.meshgrid(rows, columns, indexing="ij")
        positions = torch.stack([torch.zeros_like(row), row, column], -1)
        optional = {}
        if self.reads_guidance:
            optional["guidance"] = torch.ones_like(time) if guidance is None else guidance
        y = self.model(
            tokens,
            timestep=time / 1000,
            img_ids=positions.reshape(-1, 3).to(x_t.dtype),
            txt_ids=x_t.new_zeros(condition.shape[1] - 1, 3),
            encoder_hidden_states=condition[:, :-1],
            pooled_projections=condition[:, -1, : self.pooled_channels],
            **optional,
        ).sample
        patches = y.reshape(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return patches.reshape(b, c, h, w)


ARCHITECTURES: dict[str, type[Architecture]] = {
    "UNet2DModel": UNet2D,
    "DiTTransformer2DModel": DiTTransformer,
    "UNet2DConditionModel": UNet2DCondition,
    "PixArtTransformer2DModel": PixArtTransformer,
    "SD3Transformer2DModel": SD3Transformer,
    "FluxTransformer2DModel": FluxTransformer,
}
TEXT_ARCHITECTURES = tuple(name for name, cls in ARCHITECTURES.items() if cls.reads_text)
