"""Texts as conditions: prompts by the number of their line, encoded by the frozen text encoder of a diffusers pipeline."""

import hashlib
import logging
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.condition import Condition

TOKENIZER, ENCODER = "tokenizer", "text_encoder"  # folders of a pipeline
KINDS = ("CLIPTokenizer", "CLIPTokenizerFast", "CLIPTextModel")


class Prompts(Condition):
    """The network is told a text: that of line i of a file, where the data say i (a pair its prompt, a set its class).

    Encoded as Stable Diffusion's texts are (2112.10752): the last hidden states of a CLIP text encoder, padded to the
    tokenizer's length.

    Args:
        encoder: a pipeline's folder, with its `tokenizer` and `text_encoder`.
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
            raise ValueError(f"{self.encoder}: is told texts; give them, one a line of a file, as --prompts")
        try:
            lines = Path(self.path).read_text("utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}: not UTF-8 ({error})") from None
        if not lines:
            raise ValueError(f"{self.path}: holds no prompt; write one on each line")
        return lines

    @property
    def digest(self) -> str:
        """A sha256 of the prompts, which pairs drawn with them record."""
        return hashlib.sha256("\n".join(self.lines).encode()).hexdigest()

    @cached_property
    def parts(self) -> tuple[Any, Any]:
        """The tokenizer, and the encoder, in float32."""
        try:
            import transformers
        except ImportError:
            raise ValueError("Prompts: texts need transformers; pip install 'rectify[text]'") from None
        logging.getLogger("transformers").setLevel(logging.ERROR)
        transformers.utils.logging.disable_progress_bar()
        folder = Path(self.encoder)
        try:
            tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / TOKENIZER)
            model = transformers.CLIPTextModel.from_pretrained(folder / ENCODER, use_safetensors=True)
        except Exception as error:  # transformers and safetensors raise many kinds
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"{folder}: no readable {TOKENIZER} and {ENCODER} of CLIP in it ({why})") from error
        return tokenizer, model.float().eval().requires_grad_(False)

    @property
    def shape(self) -> tuple[int, int]:
        """What the network is told of one text: (tokens, channels)."""
        tokenizer, model = self.parts
        return tokenizer.model_max_length, model.config.hidden_size

    @torch.no_grad()
    def encode(self, texts: list[str], device: torch.device) -> Tensor:
        """Return what the network is told of texts, (n, tokens, channels), float32."""
        tokenizer, model = self.parts
        length = tokenizer.model_max_length
        tokens = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
        with torch.autocast(device.type, enabled=False):
            return model.to(device)(tokens.to(device))[0]

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
        texts = ["" if number < 0 else self.lines[number] for number in numbers.tolist()]
        return self.encode(texts, raw.device)[place]


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
