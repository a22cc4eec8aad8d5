"""Texts as conditions: prompts by the number of their line, encoded by the frozen text encoder of a diffusers pipeline."""

import hashlib
import json
import logging
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.condition import Condition

ONE, TWO = ("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")  # folders of a pipeline; SDXL has both
INDEX, ZEROS = "model_index.json", "force_zeros_for_empty_prompt"
KINDS = ("CLIPTokenizer", "CLIPTokenizerFast", "CLIPTextModel", "CLIPTextModelWithProjection")


class Prompts(Condition):
    """The network is told a text: that of line i of a file, where the data say i (a pair its prompt, a set its class).

    Encoded as Stable Diffusion's texts are (2112.10752): the last hidden states of a CLIP text encoder, padded to the
    tokenizer's length; or as those of SDXL (2307.01952): the states before the last of two encoders side by side, and below
    them, as one token more, what the second says of the whole text.

    Args:
        encoder: a pipeline's folder, with `tokenizer` and `text_encoder` in it, and `tokenizer_2` and `text_encoder_2` of SDXL.
        path: text file, one prompt a line, UTF-8; none where nothing is asked.
        dropout: probability, in [0, 1], of telling a sample the empty text in training (classifier-free guidance, 2207.12598).
    """

    def __init__(self, encoder: str, path: str | None = None, dropout: float = 0.0):
        if not 0 <= dropout <= 1:
            raise ValueError(f"Prompts: dropout is {dropout}, it must lie in [0, 1]")
        self.encoder, self.path, self.dropout = encoder, path, dropout

    def of(self, path: Path) -> "Prompts":
        """Return the condition of another file's prompts."""
        return Prompts(self.encoder, str(path), self.dropout)

    @cached_property
    def lines(self) -> list[str]:
        """The prompts."""
        if self.path is None:
            raise ValueError(
                f"{self.encoder}: is told texts; give them, one a line of a file, as --prompts, or model.condition.path in a fit"
            )
        try:
            lines = Path(self.path).read_text("utf-8-sig").removesuffix("\n").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}: not UTF-8 ({error})") from None
        if lines == [""]:
            raise ValueError(f"{self.path}: holds no prompt; write one on each line")
        return lines

    @property
    def digest(self) -> str:
        """A sha256 of the prompts, which pairs drawn with them record."""
        return hashlib.sha256("\n".join(self.lines).encode()).hexdigest()

    @cached_property
    def parts(self) -> list[tuple[Any, Any]]:
        """The tokenizers, each with its encoder, in float32."""
        try:
            import transformers
        except ImportError:
            raise ValueError("Prompts: texts need transformers; pip install 'rectify[text]'") from None
        logging.getLogger("transformers").setLevel(logging.ERROR)
        transformers.utils.logging.disable_progress_bar()
        folder, parts = Path(self.encoder), list[tuple[Any, Any]]()
        for (words, states), kind in zip((ONE, TWO), (transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection)):
            if (words, states) == TWO and not (folder / states).is_dir():
                break
            for part in (folder / words, folder / states):
                if not part.is_dir():  # transformers would look for it on the internet
                    raise ValueError(f"{folder}: no {part.name} in it; give a pipeline's folder, which has one")
            try:
                tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / words, local_files_only=True)
                model = kind.from_pretrained(folder / states, use_safetensors=True, local_files_only=True)
            except Exception as error:  # transformers and safetensors raise many kinds
                why = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise ValueError(f"{folder}: no readable {words} and {states} of CLIP in it ({why})") from error
            _fit(folder, tokenizer, model.config, parts[0][0].model_max_length if parts else tokenizer.model_max_length)
            parts.append((tokenizer, model.float().eval().requires_grad_(False)))
        return parts

    def save(self, folder: Path) -> None:
        """Write what encodes texts into a folder, as a pipeline has it: another encoder's `encoder`."""
        for (words, states), (tokenizer, model) in zip((ONE, TWO), self.parts):
            tokenizer.save_pretrained(folder / words)
            model.save_pretrained(folder / states)
        (folder / INDEX).write_text(json.dumps({ZEROS: self.zeros}))

    @cached_property
    def zeros(self) -> bool:
        """Whether the network is told zeros of no text, not the empty text: a pipeline's `force_zeros_for_empty_prompt`."""
        return len(self.parts) == 2 and bool(json.loads((Path(self.encoder) / INDEX).read_bytes()).get(ZEROS, True))

    @property
    def shape(self) -> tuple[int, int]:
        """What the network is told of one text: (tokens, channels)."""
        tokens = self.parts[0][0].model_max_length + len(self.parts) - 1
        return tokens, sum(model.config.hidden_size for _, model in self.parts)

    @torch.no_grad()
    def encode(self, texts: list[str], device: torch.device) -> Tensor:
        """Return what the network is told of texts, (n, tokens, channels), float32."""
        states, whole = [], None
        for tokenizer, model in self.parts:
            length = tokenizer.model_max_length
            tokens = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
            with torch.autocast(device.type, enabled=False):
                found = model.to(device)(tokens.to(device), output_hidden_states=True)
            states.append(found[0] if len(self.parts) == 1 else found.hidden_states[-2])
            whole = found[0]
        told = torch.cat(states, dim=-1)
        if len(self.parts) == 1:
            return told
        assert whole is not None
        return torch.cat([told, torch.nn.functional.pad(whole, (0, told.shape[-1] - whole.shape[-1]))[:, None]], dim=1)

    def nothing(self, device: torch.device) -> Tensor:
        """Return what the network is told of no text, (tokens, channels)."""
        return torch.zeros(self.shape, device=device) if self.zeros else self.encode([""], device)[0]

    def asked(self, indices: range) -> Tensor:
        return torch.tensor(indices) % len(self.lines)

    def __call__(self, raw: Tensor | None, chance: Callable[[], Tensor] | None = None) -> Tensor:
        """Return the encoded texts of numbers of lines (B,), as (B, tokens, channels)."""
        if raw is None:
            raise ValueError("Prompts: the data say no prompts; use pairs collected with them, or a set with classes")
        if chance is not None and self.dropout:
            raw = raw.where(chance() >= self.dropout, -1)
        numbers, place = raw.unique(return_inverse=True)
        if (largest := int(numbers.max())) >= len(self.lines):
            raise ValueError(f"{self.path}: has {len(self.lines)} lines, the data ask for line {largest + 1}")
        told = self.encode(["" if number < 0 else self.lines[number] for number in numbers.tolist()], raw.device)
        return told.where((numbers >= 0)[:, None, None], self.nothing(raw.device))[place] if self.zeros else told[place]


def _fit(folder: Path, tokenizer: Any, config: Any, length: int) -> None:
    """Refuse a tokenizer and an encoder that do not fit together, or whose texts diffusers encodes otherwise than this does."""
    if not length == tokenizer.model_max_length <= config.max_position_embeddings:
        told = f"texts of {tokenizer.model_max_length} tokens, another of {length}, an encoder {config.max_position_embeddings}"
        raise ValueError(f"{folder}: a tokenizer makes {told}; they must agree (model_max_length, max_position_embeddings)")
    if not 2 < len(tokenizer) <= config.vocab_size:
        raise ValueError(f"{folder}: a tokenizer knows {len(tokenizer)} words, its encoder {config.vocab_size}")
    if getattr(config, "use_attention_mask", False):
        raise ValueError(f"{folder}: its text encoder masks what pads a text (use_attention_mask), which Prompts does not")


def prompted(condition: Condition, prompts: Path | None, teacher: Path) -> Condition:
    """Return a teacher's condition, of prompts if some are given.

    Raises:
        ValueError: it is told no texts.
    """
    if prompts is None:
        return condition
    if not isinstance(condition, Prompts):
        raise ValueError(f"prompts: {teacher} is told no texts; leave them out")
    return condition.of(prompts)
