"""Texts as conditions: prompts by the number of their line, encoded by the frozen text encoders of a diffusers pipeline."""

import hashlib
import inspect
import json
import logging
from collections.abc import Callable
from functools import cached_property, lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.condition import Condition

PARTS = ("tokenizer", "text_encoder")  # what the names of a pipeline's parts that encode texts begin with
INDEX = "model_index.json"

Said = tuple[Tensor, Tensor | None]  # of texts: the states of their tokens, and what is said of each as a whole


def _masked(pipe: Any, texts: list[str], device: torch.device) -> Said:
    """Return the states of texts with which of them are read (1) or pad a text (0) as one channel more."""
    states, mask, *_ = pipe.encode_prompt(texts, False, device=device)
    return torch.cat([states, mask[..., None]], dim=-1), None


# what pipelines say of texts; without guidance, which is the denoiser's
ENCODE: dict[str, Callable[[Any, list[str], torch.device], Said]] = {
    "StableDiffusionPipeline": lambda pipe, texts, device: (pipe.encode_prompt(texts, device, 1, False)[0], None),
    "StableDiffusionXLPipeline": lambda pipe, texts, device: pipe.encode_prompt(texts, None, device, 1, False)[::2],
    "StableDiffusion3Pipeline": lambda pipe, texts, device: pipe.encode_prompt(texts, None, None, device, 1, False)[::2],
    "FluxPipeline": lambda pipe, texts, device: pipe.encode_prompt(texts, None, device)[:2],
    "PixArtAlphaPipeline": _masked,
    "PixArtSigmaPipeline": _masked,
}
VOCABULARIES = ("vocab.json", "tokenizer.json", "spiece.model")  # a tokenizer without one knows no word, and says nothing of it
ONCE = 64  # texts that are encoded at once


def kind(folder: Path) -> tuple[str, list[str]]:
    """Return the class of a pipeline that is told texts, and its parts that encode them; ("", []) of any other.

    Raises:
        ValueError: it is no pipeline's folder.
    """
    try:
        told = json.loads((folder / INDEX).read_bytes())
        name, parts = told["_class_name"], [key for key, part in told.items() if key.startswith(PARTS) and part[1]]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{folder / INDEX}: not a readable index of a pipeline ({error!r})") from None
    return (name, parts) if isinstance(name, str) and name in ENCODE else ("", [])


def _sentencepiece(folder: Path) -> None:
    try:
        for name in ("sentencepiece", "google.protobuf"):
            import_module(name)
    except ImportError:  # transformers would ask for tiktoken
        raise ValueError(f"{folder}: a tokenizer of sentencepiece; pip install 'rectify[text]'") from None


@lru_cache(maxsize=2)
def _read(folder: Path, changed: int) -> Any:
    """Return a pipeline without all that does not encode texts, in float32; `changed` is when its index was."""
    import diffusers

    diffusers.utils.logging.disable_progress_bar()
    name, parts = kind(folder)
    if not name:
        raise ValueError(f"{folder}: is no pipeline that is told texts as is known here ({', '.join(ENCODE)})")
    if name == "StableDiffusion3Pipeline" and "text_encoder_3" not in parts:
        raise ValueError(f"{folder}: has no text_encoder_3; give the folder that has it")
    for part in parts:
        if not (folder / part).is_dir():  # it would be looked for on the internet
            raise ValueError(f"{folder}: no {part} in it; give a pipeline's folder, which has one")
        if part.startswith("tokenizer") and not any((folder / part / file).is_file() for file in VOCABULARIES):
            raise ValueError(f"{folder / part}: has no vocabulary ({', '.join(VOCABULARIES)}); is the folder whole?")
        if (folder / part / "spiece.model").is_file() and not (folder / part / "tokenizer.json").is_file():
            _sentencepiece(folder / part)
    cls = getattr(diffusers, name)
    takes = inspect.signature(cls).parameters.items()
    absent = {key: None for key, value in takes if value.default in (value.empty, None) and key not in parts}
    for library in ("transformers", "diffusers.pipelines"):  # they tell of every text that is cut
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        if "requires_safety_checker" in dict(takes):
            absent["requires_safety_checker"] = False  # type: ignore[assignment]
        with torch.inference_mode(False):  # whoever asks first
            return cls.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, **absent)
    except MemoryError:
        raise
    except Exception as error:  # diffusers, transformers and safetensors each raise kinds of their own
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{folder}: its {', '.join(parts)} are not readable ({why})") from error


class Prompts(Condition):
    """The network is told a text: that of line i of a file, where the data say i (a pair its prompt, a set its class).

    Encoded as the pipeline itself encodes it, by all its encoders, padded to their length: Stable Diffusion 1 and 2 (2112.10752),
    SDXL (2307.01952), Stable Diffusion 3 (2403.03206), Flux, PixArt (2310.00426, 2403.04692). Where the network is also told
    something of the whole text, that is one token more; where it is told which tokens count, that is one channel more.

    Args:
        encoder: the pipeline's folder, or one that `save` wrote.
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

    @property
    def pipe(self) -> Any:
        """The pipeline without all that does not encode texts, in float32; one for all that ask for the same folder."""
        try:
            import transformers
        except ImportError:
            raise ValueError("Prompts: texts need transformers; pip install 'rectify[text]'") from None
        transformers.utils.logging.disable_progress_bar()
        try:
            changed = (Path(self.encoder) / INDEX).stat().st_mtime_ns
        except OSError as error:
            raise ValueError(f"{self.encoder}: no {INDEX} in it ({error.strerror}); give a pipeline's folder") from None
        return _read(Path(self.encoder).resolve(), changed)

    def save(self, folder: Path) -> None:
        """Write what encodes texts into a folder, as a pipeline has it: another's `encoder`."""
        self.pipe.save_pretrained(folder)

    @property
    def zeros(self) -> bool:
        """Whether the network is told zeros of no text, not the empty text: SDXL's `force_zeros_for_empty_prompt`."""
        return bool(self.pipe.config.get("force_zeros_for_empty_prompt", False))

    def encode(self, texts: list[str], device: torch.device) -> Tensor:
        """Return what the network is told of texts, (n, tokens, channels), float32."""
        parts = [self._said(texts[start : start + ONCE], device) for start in range(0, len(texts), ONCE)]
        return torch.cat([states if whole is None else _below(states, whole) for states, whole in parts])

    @torch.no_grad()
    def _said(self, texts: list[str], device: torch.device) -> Said:
        pipe = self.pipe
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.to(device)
        try:
            with torch.autocast(device.type, enabled=False):
                return ENCODE[type(pipe).__name__](pipe, texts, device)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # parts that do not fit together fail in many ways
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"{self.encoder}: its text encoders do not fit its tokenizers, or the texts ({why})") from error

    @cached_property
    def _nothing(self) -> tuple[Tensor, int]:
        states, whole = self._said([""], torch.device("cpu"))
        told = states if whole is None else _below(states, whole)
        return torch.zeros_like(told[0]) if self.zeros else told[0], 0 if whole is None else whole.shape[-1]

    @property
    def empty(self) -> Tensor:
        """What the network is told of no text, (tokens, channels), on the CPU."""
        return self._nothing[0]

    @property
    def pooled(self) -> int:
        """How many channels of the last token say something of the whole text; 0 where there is no such token."""
        return self._nothing[1]

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
        return (told.where((numbers >= 0)[:, None, None], 0.0) if self.zeros else told)[place]


def _below(states: Tensor, whole: Tensor) -> Tensor:
    """Return states of tokens (n, tokens, channels) with what is said of each text, (n, pooled), as one token more."""
    return torch.cat([states, torch.nn.functional.pad(whole, (0, states.shape[-1] - whole.shape[-1]))[:, None]], dim=1)


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
