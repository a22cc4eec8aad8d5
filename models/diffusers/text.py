"""Texts as conditions: prompts, encoded by a diffusers pipeline's frozen text encoders."""

import inspect
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property, lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data.files import digest
from models.condition import Condition

ENCODER_PARTS = ("tokenizer", "text_encoder")  # how the names of a pipeline's encoders begin
INDEX = "model_index.json"
# Without a vocabulary a tokenizer would silently drop every word.
VOCABULARIES = ("vocab.json", "tokenizer.json", "spiece.model")
TEXT_CHUNK = 64  # texts that are encoded at once


class EncodedTexts(NamedTuple):
    """What a pipeline makes of texts."""

    states: Tensor  # of the tokens, (n, tokens, channels)
    pooled: Tensor | None = None  # of the whole texts, (n, pooled channels)

    def as_tensor(self) -> Tensor:
        """Return the states, with the pooled embeddings as one more token."""
        if self.pooled is None:
            return self.states
        missing = self.states.shape[-1] - self.pooled.shape[-1]
        return torch.cat([self.states, F.pad(self.pooled, (0, missing))[:, None]], dim=1)


class TextPipeline(ABC):
    """How one kind of diffusers pipeline encodes texts, without guidance."""

    @staticmethod
    @abstractmethod
    def encode(pipe: Any, texts: list[str], device: torch.device) -> EncodedTexts:
        """Return the encoded texts."""


class StableDiffusion(TextPipeline):
    """Stable Diffusion 1 and 2 (Rombach et al. 2021, arXiv 2112.10752)."""

    @staticmethod
    def encode(pipe: Any, texts: list[str], device: torch.device) -> EncodedTexts:
        return EncodedTexts(pipe.encode_prompt(texts, device, 1, False)[0])


class StableDiffusionXL(TextPipeline):
    """SDXL (Podell et al. 2023, arXiv 2307.01952)."""

    @staticmethod
    def encode(pipe: Any, texts: list[str], device: torch.device) -> EncodedTexts:
        states, _, pooled, _ = pipe.encode_prompt(texts, None, device, 1, False)
        return EncodedTexts(states, pooled)


class StableDiffusion3(TextPipeline):
    """Stable Diffusion 3 (Esser et al. 2024, arXiv 2403.03206)."""

    @staticmethod
    def encode(pipe: Any, texts: list[str], device: torch.device) -> EncodedTexts:
        states, _, pooled, _ = pipe.encode_prompt(texts, None, None, device, 1, False)
        return EncodedTexts(states, pooled)


class Flux(TextPipeline):
    """Flux."""

    @staticmethod
    def encode(pipe: Any, texts: list[str], device: torch.device) -> EncodedTexts:
        states, pooled, _ = pipe.encode_prompt(texts, None, device)
        return EncodedTexts(states, pooled)


class PixArt(TextPipeline):
    """PixArt-alpha (Chen et al. 2023, arXiv 2310.00426) and -sigma (2024, arXiv 2403.04692)."""

    @staticmethod
    def encode(pipe: Any, texts: list[str], device: torch.device) -> EncodedTexts:
        # The mask, 1 for a text's tokens and 0 for padding, is one more channel.
        states, mask, *_ = pipe.encode_prompt(texts, False, device=device)
        return EncodedTexts(torch.cat([states, mask[..., None]], dim=-1))


TEXT_PIPELINES: dict[str, type[TextPipeline]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "FluxPipeline": Flux,
    "PixArtAlphaPipeline": PixArt,
    "PixArtSigmaPipeline": PixArt,
}


class TextEncoderParts(NamedTuple):
    """The text encoders of a pipeline."""

    pipeline: str  # its class, "" if it has no texts
    parts: list[str]  # names of its tokenizers and encoders


def find_text_encoders(folder: Path) -> TextEncoderParts:
    """Return the text encoders that a pipeline's index lists.

    Raises:
        ValueError: not a pipeline's folder.
    """
    parts = []
    try:
        index = json.loads((folder / INDEX).read_bytes())
        name = index["_class_name"]
        for key, part in index.items():
            if key.startswith(ENCODER_PARTS) and part[1]:
                parts.append(key)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{folder / INDEX}: not a readable index of a pipeline ({error!r})"
        ) from None
    if isinstance(name, str) and name in TEXT_PIPELINES:
        return TextEncoderParts(name, parts)
    return TextEncoderParts("", [])


def _check_parts(folder: Path, found: TextEncoderParts) -> None:
    """Check that a pipeline's text encoders are complete."""
    if not found.pipeline:
        raise ValueError(
            f"{folder}: not a pipeline with texts; supported are {', '.join(TEXT_PIPELINES)}"
        )
    if found.pipeline == "StableDiffusion3Pipeline" and "text_encoder_3" not in found.parts:
        raise ValueError(f"{folder}: no text_encoder_3 in it; use a folder that has it")
    for name in found.parts:
        part = folder / name
        if not part.is_dir():  # diffusers would look for it on the internet
            raise ValueError(f"{folder}: no {name} in it; use a complete pipeline's folder")
        vocabularies = [file for file in VOCABULARIES if (part / file).is_file()]
        if name.startswith("tokenizer") and not vocabularies:
            raise ValueError(
                f"{part}: no vocabulary in it ({', '.join(VOCABULARIES)}); "
                "use a complete pipeline's folder"
            )
        if "spiece.model" in vocabularies and "tokenizer.json" not in vocabularies:
            _check_sentencepiece(part)


def _check_sentencepiece(folder: Path) -> None:
    """Check that sentencepiece is installed: otherwise transformers asks for tiktoken."""
    try:
        for name in ("sentencepiece", "google.protobuf"):
            import_module(name)
    except ImportError:
        raise ValueError(
            f"{folder}: this tokenizer needs sentencepiece; pip install 'rectify[text]'"
        ) from None


@lru_cache(maxsize=2)
def _load_encoders(folder: Path, changed: int) -> Any:
    """Return a pipeline with its text encoders alone, in float32.

    Args:
        folder: the pipeline's.
        changed: time of change of its index, part of the cache's key.
    """
    import diffusers

    diffusers.utils.logging.disable_progress_bar()
    found = find_text_encoders(folder)
    _check_parts(folder, found)
    # every other part is absent
    cls = getattr(diffusers, found.pipeline)
    parameters = inspect.signature(cls).parameters
    absent: dict[str, Any] = {}
    for key, parameter in parameters.items():
        if parameter.default in (parameter.empty, None) and key not in found.parts:
            absent[key] = None
    if "requires_safety_checker" in parameters:
        absent["requires_safety_checker"] = False
    for library in ("transformers", "diffusers.pipelines"):  # they warn of every truncated text
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        with torch.inference_mode(False):  # the first caller may be in inference mode
            return cls.from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, **absent
            )
    except MemoryError:
        raise
    except Exception as error:  # diffusers, transformers and safetensors raise different kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{folder}: its {', '.join(found.parts)} are not readable ({reason})"
        ) from error


class Prompts(Condition):
    """Texts: the raw condition i is line i of a file of prompts (a pair's prompt, a set's class).

    A text is encoded as its pipeline does it, by all the pipeline's encoders, padded to their
    length. Where the network also takes a pooled embedding, it is one more token; where it takes a
    mask of the tokens, it is one more channel.

    Args:
        encoder: the pipeline's folder, or one that `save` wrote.
        path: text file in UTF-8, one prompt per line; None where no prompt is needed.
        dropout: probability, in [0, 1], of replacing a sample's text by the empty text in training,
            for classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598).
    """

    def __init__(self, encoder: str, path: str | None = None, dropout: float = 0.0):
        if not 0 <= dropout <= 1:
            raise ValueError(f"Prompts: dropout is {dropout}; it must lie in [0, 1]")
        self.encoder = encoder
        self.path = path
        self.dropout = dropout

    def with_file(self, path: Path) -> "Prompts":
        """Return the condition for another file's prompts."""
        return Prompts(self.encoder, str(path), self.dropout)

    @cached_property
    def lines(self) -> list[str]:
        """The prompts."""
        if self.path is None:
            raise ValueError(
                f"{self.encoder}: this network needs texts; pass a file with one prompt per line "
                "as --prompts, or as model.condition.path in a fit"
            )
        try:
            text = Path(self.path).read_text("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}: not UTF-8 ({error})") from None
        lines = text.removesuffix("\n").split("\n")
        if lines == [""]:
            raise ValueError(f"{self.path}: it has no prompt; write one per line")
        return lines

    @property
    def digest(self) -> str:
        """A sha256 of the prompts, which a pair set records."""
        return digest("\n".join(self.lines).encode())

    @property
    def pipe(self) -> Any:
        """The pipeline with its text encoders alone, in float32, shared by all with this folder."""
        try:
            import transformers
        except ImportError:
            raise ValueError(
                "Prompts: texts need transformers; pip install 'rectify[text]'"
            ) from None
        transformers.utils.logging.disable_progress_bar()
        try:
            changed = (Path(self.encoder) / INDEX).stat().st_mtime_ns
        except OSError as error:
            raise ValueError(
                f"{self.encoder}: no {INDEX} in it ({error.strerror}); use a pipeline's folder"
            ) from None
        return _load_encoders(Path(self.encoder).resolve(), changed)

    def save(self, folder: Path) -> None:
        """Write the text encoders into a folder, which can be another's `encoder`."""
        self.pipe.save_pretrained(folder)

    @property
    def zero_if_empty(self) -> bool:
        """Whether an empty text is encoded as zeros: SDXL's `force_zeros_for_empty_prompt`."""
        return bool(self.pipe.config.get("force_zeros_for_empty_prompt", False))

    def encode(self, texts: list[str], device: torch.device) -> Tensor:
        """Return the encoded texts, (n, tokens, channels), float32."""
        parts = []
        for start in range(0, len(texts), TEXT_CHUNK):
            encoded = self._encode_chunk(texts[start : start + TEXT_CHUNK], device)
            parts.append(encoded.as_tensor())
        return torch.cat(parts)

    @torch.no_grad()
    def _encode_chunk(self, texts: list[str], device: torch.device) -> EncodedTexts:
        pipe = self.pipe
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.to(device)
        try:
            with torch.autocast(device.type, enabled=False):
                return TEXT_PIPELINES[type(pipe).__name__].encode(pipe, texts, device)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # encoders that do not fit together fail in many ways
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"{self.encoder}: its text encoders do not fit its tokenizers, or the texts "
                f"({reason})"
            ) from error

    @cached_property
    def _empty(self) -> EncodedTexts:
        return self._encode_chunk([""], torch.device("cpu"))

    @property
    def empty(self) -> Tensor:
        """The encoded empty text, (tokens, channels), on the CPU."""
        encoded = self._empty.as_tensor()[0]
        return torch.zeros_like(encoded) if self.zero_if_empty else encoded

    @property
    def pooled(self) -> int:
        """Channels of the last token that embed the whole text; 0 if there is no such token."""
        return 0 if self._empty.pooled is None else self._empty.pooled.shape[-1]

    def requested(self, indices: range) -> Tensor:
        return torch.tensor(indices) % len(self.lines)

    def __call__(self, raw: Tensor | None, chance: Callable[[], Tensor] | None = None) -> Tensor:
        """Return the encoded texts, (B, tokens, channels), of line numbers (B,)."""
        if raw is None:
            raise ValueError(
                "Prompts: the data has no prompts; use pairs collected with prompts, or a set with "
                "classes"
            )
        if chance is not None and self.dropout:
            raw = raw.where(chance() >= self.dropout, -1)  # -1: the empty text
        # Every text is encoded once.
        numbers, positions = raw.unique(return_inverse=True)
        largest = int(numbers.max())
        if largest >= len(self.lines):
            raise ValueError(
                f"{self.path}: it has {len(self.lines)} lines, the data needs line {largest + 1}"
            )
        texts = ["" if number < 0 else self.lines[number] for number in numbers.tolist()]
        encoded = self.encode(texts, raw.device)
        if self.zero_if_empty:
            encoded = encoded.where((numbers >= 0)[:, None, None], 0.0)
        return encoded[positions]


def with_prompts(condition: Condition, prompts: Path | None, teacher: Path) -> Condition:
    """Return a teacher's condition, for the prompts of a file if one is given.

    Raises:
        ValueError: the teacher is not conditioned on texts.
    """
    if prompts is None:
        return condition
    if not isinstance(condition, Prompts):
        raise ValueError(f"prompts: {teacher} is not conditioned on texts; omit --prompts")
    return condition.with_file(prompts)
