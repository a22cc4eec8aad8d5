"""A network of diffusers as a backbone, trained as a whole or by low-rank adapters."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.diffusers.architectures import ARCHITECTURES, TEXT_ARCHITECTURES
from models.diffusers.parts import load_part, update_config
from models.nets import Net
from models.time_input import ScaledTime

# The layers of attention, in all kinds of networks; where texts have others, those of the image.
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
BASE_LAYER = ".base_layer."  # in peft's names of an adapted layer's own weights
LORA_LAYER = ".lora_"  # in peft's names of an adapter's weights


class Pretrained(Net):
    """A backbone of diffusers, conditioned on its classes, or on texts.

    Args:
        config: its folder (config.json and safetensors weights, as in a pipeline's folder), or the
            text of that config.json: the network without its weights, as a checkpoint rebuilds it.
        lora: rank of adapters on the layers of attention (Hu et al. 2021, arXiv 2106.09685), which
            alone are trained; 0 trains all weights.
        tokens: number of tokens of a text, as `Prompts` encodes it. The buffer `empty_text`,
            (tokens, channels), is the condition without a text.
        pixels: height and width of the images, an input of SDXL and PixArt.
        side: height and width of the states, where the config does not contain it (Flux).
    """

    empty_text: Tensor

    def __init__(self, config: str, lora: int = 0, tokens: int = 0, pixels: int = 0, side: int = 0):
        super().__init__()
        folder = None if config.lstrip().startswith("{") else Path(config)
        source = folder or "Pretrained"
        # the config, without diffusers' private entries
        parsed = update_config(_parse_config(config, folder))
        kind = parsed.get("_class_name")
        if not isinstance(kind, str) or kind not in ARCHITECTURES:
            raise ValueError(
                f"{source}: is a {kind}; Pretrained supports {', '.join(ARCHITECTURES)}"
            )
        if (kind in TEXT_ARCHITECTURES) != (tokens > 0):
            raise ValueError(
                f"{folder or kind}: is a {kind} and tokens is {tokens}; "
                f"only {', '.join(TEXT_ARCHITECTURES)} have tokens of texts"
            )
        plain = {}
        for key, value in parsed.items():
            if key == "_class_name" or not key.startswith("_"):
                plain[key] = value
        self.config = json.dumps(plain, sort_keys=True)
        self.lora = lora
        self.tokens = tokens
        self.pixels = pixels
        self.side = side
        self.kind = kind
        self.time_input = ScaledTime(1000.0)
        # the network, and what is known of its kind
        self.model = _make_network(kind, folder, plain)
        self.architecture = ARCHITECTURES[kind](self.model, folder or kind, pixels, side)
        self.size = self.architecture.size
        self.channels = self.architecture.channels
        self.classes = self.architecture.classes
        self.guidance_embedded = self.architecture.reads_guidance
        self.needs_class = self.architecture.needs_class
        self.pooled = self.architecture.pooled_channels
        if tokens:
            empty_text = torch.zeros(tokens, self.architecture.text_channels)
            self.register_buffer("empty_text", empty_text)
        if lora:
            self._add_adapters()

    def list_blocks(self) -> list[nn.Module]:
        return self.architecture.blocks()

    def null_condition(self, cond: Tensor) -> Tensor | None:
        if self.tokens and cond.shape[1:] == self.empty_text.shape:
            return self.empty_text.to(cond).expand_as(cond)
        if self.classes and not self.needs_class:
            return torch.full_like(cond, self.classes)
        return None

    def train(self, mode: bool = True) -> "Pretrained":
        """Keep diffusers' own dropout off.

        It drops labels by the global generator's numbers; `ClassLabel` draws its own.
        """
        super().train(mode)
        self.model.eval()
        return self

    def _add_adapters(self) -> None:
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError:
            raise ValueError("Pretrained: lora needs peft; pip install 'rectify[lora]'") from None
        config = LoraConfig(r=self.lora, lora_alpha=self.lora, target_modules=LORA_TARGETS)
        inject_adapter_in_model(config, self.model)
        self.register_load_state_dict_pre_hook(_accept_plain_weights)

    def forward(
        self,
        x_t: Tensor,
        time: Tensor,
        cond: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Return the network's output; where it also outputs a variance, the mean.

        A Flux with a guidance input receives 1 by default.

        Raises:
            ValueError: a UNet with classes got none: it has no label for that.
        """
        if self.tokens and cond is None:
            cond = self.empty_text.expand(len(x_t), -1, -1)
        return self.architecture(x_t, time, cond, guidance)

    def merged(self) -> nn.Module:
        """Return the plain diffusers network of the same function, with the adapters merged."""
        plain = _make_network(self.kind, None, json.loads(self.config))
        weights = dict(self.model.state_dict())
        if self.lora:
            for name, module in self.model.named_modules():
                if hasattr(module, "get_delta_weight"):
                    delta = module.get_delta_weight("default")
                    weights[f"{name}{BASE_LAYER}weight"] = module.base_layer.weight + delta
        merged = {}
        for key, value in weights.items():
            if LORA_LAYER not in key:
                merged[key.replace(BASE_LAYER, ".")] = value
        plain.load_state_dict(merged)
        return plain.eval()


def _parse_config(config: str, folder: Path | None) -> dict[str, Any]:
    """Return a network's config, from its folder or from the text itself."""
    try:
        text = (folder / "config.json").read_bytes() if folder else config
        parsed = json.loads(text)
    except OSError as error:
        raise FileNotFoundError(
            f"{folder}: no config.json in it ({error.strerror}); use a network's folder"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{folder or 'Pretrained'}: its config is not valid JSON ({error})"
        ) from None
    return parsed if isinstance(parsed, dict) else {}


def _make_network(kind: str, folder: Path | None, config: dict[str, Any]) -> nn.Module:
    """Return a network with the weights in a folder, or with random ones."""
    import diffusers

    cls = getattr(diffusers, kind)
    if folder:
        return load_part(cls, folder)
    try:
        return cls.from_config(config)
    except Exception as error:  # diffusers and torch raise different kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{kind}: not a readable {kind} ({reason})") from error


def _accept_plain_weights(net: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Accept the weights of a network without adapters, a teacher's: rename them as peft does.

    The adapters keep their initial values, which change nothing.
    """
    if any(LORA_LAYER in key for key in state if key.startswith(prefix)):
        return
    for key, value in net.state_dict().items():
        name = prefix + key
        plain = name.replace(BASE_LAYER, ".")
        if LORA_LAYER in name:
            state[name] = value
        elif BASE_LAYER in name and plain in state:
            state[name] = state.pop(plain)
