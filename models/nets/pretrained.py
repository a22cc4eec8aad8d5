"""Networks of diffusers, trained whole or by low-rank adapters."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.clock import Scaled
from models.nets import Net

TOLD = ("UNet2DConditionModel", "PixArtTransformer2DModel", "SD3Transformer2DModel", "FluxTransformer2DModel")  # a text
VARIANCE = ("DiTTransformer2DModel", "PixArtTransformer2DModel")  # may put out, below the mean, a variance that is left out
KINDS = ("UNet2DModel", "DiTTransformer2DModel", *TOLD)
# attention's layers, in all kinds; where texts have others, those of the image's tokens
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
OTHERWISE = ("class_embed_type", "encoder_hid_dim_type", "num_class_embeds", "time_cond_proj_dim")  # told
BASE, LORA = ".base_layer.", ".lora_"  # in the names that peft gives to a layer's own weights and to its adapter's


class Pretrained(Net):
    """A backbone of diffusers, told its own classes, or texts.

    Args:
        config: its folder (config.json and safetensors weights, as in a pipeline's folder), or the text of that config.json: the
            network without its weights, as a checkpoint rebuilds it.
        lora: rank of adapters on the attention's layers (LoRA, 2106.09685), which alone are trained; 0 trains all.
        tokens: of the texts that the network is told, as `Prompts` gives them; its `nothing`, (tokens, channels), is what it is
            told of none.
        pixels: height and width of the images, which SDXL's and PixArt's may be told too.
        side: height and width of the states, where the config does not say them (Flux).
    """

    nothing: Tensor

    def __init__(self, config: str, lora: int = 0, tokens: int = 0, pixels: int = 0, side: int = 0):
        super().__init__()
        folder = None if config.lstrip().startswith("{") else Path(config)
        try:
            told = json.loads((folder / "config.json").read_bytes() if folder else config)
        except OSError as error:
            raise FileNotFoundError(f"{folder}: no config.json there ({error.strerror}); give a network's folder") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{folder or 'Pretrained'}: its config is not valid JSON ({error})") from None
        kind = told.get("_class_name") if isinstance(told, dict) else None
        if kind not in KINDS:
            raise ValueError(f"{folder or 'Pretrained'}: is a {kind}, Pretrained knows {', '.join(KINDS)}")
        plain = {key: value for key, value in told.items() if key == "_class_name" or not key.startswith("_")}
        self.config, self.lora, self.tokens, self.pixels = json.dumps(plain, sort_keys=True), lora, tokens, pixels
        self.kind, self.clock, self.side, self.scaled = kind, Scaled(1000.0), side, False
        self.model = self._made(kind, folder, plain)
        self._read(folder or kind, dict(self.model.config))  # type: ignore[arg-type]
        if lora:
            self._adapt()

    def _read(self, where: Path | str, whole: dict[str, Any]) -> None:
        """Take from a whole config what states and conditions are like; refuse what is not known here, naming where it is."""
        if (self.kind in TOLD) != (self.tokens > 0):
            raise ValueError(f"{where}: is a {self.kind} and tokens is {self.tokens}; a {', '.join(TOLD)} alone are told texts")
        if self.tokens:
            self.register_buffer("nothing", torch.zeros(self.tokens, self._width(where, whole)))
        self.size, self.channels, out = self.side, whole["in_channels"], whole["out_channels"] or whole["in_channels"]
        if self.kind == "FluxTransformer2DModel":  # a token is a square of four places
            self.channels, out, self.scaled = self.channels // 4, out // 4, whole["guidance_embeds"]
        else:
            self.size = whole["sample_size"]
        if not isinstance(self.size, int):
            raise ValueError(f"{where}: its sample_size is {self.size}, Pretrained knows one number, of squares")
        if out != self.channels and not (self.kind in VARIANCE and out == 2 * self.channels):
            raise ValueError(f"{where}: puts out {out} channels for {self.channels}, wanted as many as come in")
        self.classes = whole.get("num_embeds_ada_norm" if self.kind == "DiTTransformer2DModel" else "num_class_embeds") or 0
        self.always_told = self.kind == "UNet2DModel" and self.classes > 0  # it has no label that means "not told"

    def _width(self, where: Path | str, whole: dict[str, Any]) -> int:
        """Return how many channels a text has that the network is told; find how it is told sizes and the whole text."""
        self.pooled = 0
        if self.kind == "PixArtTransformer2DModel":
            self.sizes = bool(self.model.use_additional_conditions)
            return (whole["caption_channels"] or whole["cross_attention_dim"]) + 1  # which tokens count is one channel more
        if self.kind in ("SD3Transformer2DModel", "FluxTransformer2DModel"):
            self.pooled = whole["pooled_projection_dim"]
            return whole["joint_attention_dim"]
        self.pooled = (whole["projection_class_embeddings_input_dim"] or 0) - 6 * (whole["addition_time_embed_dim"] or 0)
        self.sizes = whole["addition_embed_type"] == "text_time"
        if not self.sizes and (more := whole["addition_embed_type"]):
            raise ValueError(f"{where}: its addition_embed_type is {more}, Pretrained knows text_time (SDXL) and none")
        if others := [key for key in OTHERWISE if whole[key] is not None]:
            raise ValueError(f"{where}: is told more than a text ({others[0]}: {whole[others[0]]}), Pretrained knows texts alone")
        if not isinstance(width := whole["cross_attention_dim"], int):
            raise ValueError(f"{where}: its cross_attention_dim is {width}, Pretrained knows one number")
        return width

    @property
    def blocks(self) -> list[nn.Module]:
        """The network's blocks, one by one: what is sharded, compiled and computed again."""
        blocks = [block for part in self.model.children() if isinstance(part, nn.ModuleList) for block in part]
        return blocks[1:] if self.kind == "DiTTransformer2DModel" else blocks  # DiT asks its first block's embedding from outside

    def train(self, mode: bool = True) -> "Pretrained":
        """Leave diffusers' own dropout off: it hides labels by the global generator's numbers; `ClassLabel` draws its own."""
        super().train(mode)
        self.model.eval()
        return self

    @staticmethod
    def _made(kind: str, folder: Path | None, config: dict[str, Any]) -> nn.Module:
        import diffusers

        cls = getattr(diffusers, kind)
        try:
            return cls.from_pretrained(folder, use_safetensors=True).float() if folder else cls.from_config(config)
        except Exception as error:  # diffusers, safetensors and torch each raise kinds of their own
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"{folder or kind}: not a readable {kind} ({why})") from error

    def _adapt(self) -> None:
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError:
            raise ValueError("Pretrained: lora needs peft; pip install 'rectify[lora]'") from None
        inject_adapter_in_model(LoraConfig(r=self.lora, lora_alpha=self.lora, target_modules=TARGETS), self.model)
        self.register_load_state_dict_pre_hook(_named_as_adapted)

    def forward(self, x_t: Tensor, clock: Tensor, cond: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        """Return the network's output; of one that says its variance too, the mean.

        A Flux that reads a scale of guidance is told 1 by default.

        Raises:
            ValueError: a UNet with classes is told none: it has no label for that.
        """
        if self.kind == "UNet2DModel":
            if self.always_told and cond is None:
                raise ValueError("Pretrained: this UNet2DModel must be told a class; it has none that means 'not told'")
            return self.model(x_t, clock, class_labels=cond if self.classes else None).sample
        if self.tokens:
            text = self.nothing.expand(len(x_t), -1, -1) if cond is None else cond
            return self._flux(x_t, clock, text, scale) if self.kind == "FluxTransformer2DModel" else self._told(x_t, clock, text)
        label = torch.full_like(clock, self.classes, dtype=torch.long) if cond is None else cond
        return self.model(x_t, clock, class_labels=label).sample[:, : self.channels]

    def _told(self, x_t: Tensor, clock: Tensor, text: Tensor) -> Tensor:
        """Return the output of a network that is told texts, (B, tokens, channels), in the way of each kind."""
        asked: dict[str, Any] = {"timestep": clock, "encoder_hidden_states": text}
        if self.kind == "PixArtTransformer2DModel":
            asked |= {"encoder_hidden_states": text[..., :-1], "encoder_attention_mask": text[..., -1]}
            sizes = text.new_tensor([[self.pixels, self.pixels]]).expand(len(x_t), -1) if self.sizes else None
            ratio = text.new_ones(len(x_t), 1) if self.sizes else None
            asked["added_cond_kwargs"] = {"resolution": sizes, "aspect_ratio": ratio}
        elif self.kind == "SD3Transformer2DModel":
            asked |= {"encoder_hidden_states": text[:, :-1], "pooled_projections": text[:, -1, : self.pooled]}
        elif self.sizes:
            sizes = text.new_tensor([self.pixels, self.pixels, 0, 0, self.pixels, self.pixels]).expand(len(x_t), -1)
            more = {"text_embeds": text[:, -1, : self.pooled], "time_ids": sizes}
            asked |= {"encoder_hidden_states": text[:, :-1], "added_cond_kwargs": more}
        return self.model(x_t, **asked).sample[:, : self.channels]

    def _flux(self, x_t: Tensor, clock: Tensor, text: Tensor, scale: Tensor | None) -> Tensor:
        """Return Flux's output: its tokens are squares of 2 x 2 places, each told where it lies; its time runs from 0 to 1."""
        b, c, h, w = x_t.shape
        packed = x_t.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)
        rows, columns = torch.meshgrid(*(torch.arange(n // 2, device=x_t.device) for n in (h, w)), indexing="ij")
        told = {"encoder_hidden_states": text[:, :-1], "pooled_projections": text[:, -1, : self.pooled]}
        if self.scaled:
            told["guidance"] = torch.ones_like(clock) if scale is None else scale
        places = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).to(x_t.dtype)
        nowhere = x_t.new_zeros(text.shape[1] - 1, 3)
        y = self.model(packed, timestep=clock / 1000, img_ids=places, txt_ids=nowhere, **told).sample
        return y.reshape(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)

    def merged(self) -> nn.Module:
        """Return the plain diffusers network of the same function: adapters merged into the layers that they adapt."""
        plain = self._made(self.kind, None, json.loads(self.config))
        weights = dict(self.model.state_dict())
        for name, module in self.model.named_modules() if self.lora else ():
            if hasattr(module, "get_delta_weight"):
                weights[f"{name}{BASE}weight"] = module.base_layer.weight + module.get_delta_weight("default")
        plain.load_state_dict({key.replace(BASE, "."): value for key, value in weights.items() if LORA not in key})
        return plain.eval()


def _named_as_adapted(net: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Give the weights of a network without adapters, a teacher's, the names that they have beside adapters still at zero."""
    own = {prefix + key: value for key, value in net.state_dict().items()}
    if any(LORA in key for key in state if key.startswith(prefix)):
        return
    for key, value in own.items():
        if LORA in key:
            state[key] = value
        elif BASE in key and (plain := key.replace(BASE, ".")) in state:
            state[key] = state.pop(plain)
