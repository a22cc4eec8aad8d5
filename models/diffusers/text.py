"""Texts as conditions: prompts, encoded by a diffusers pipeline's frozen text encoders."""

import inspect
import json
import logging
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property, lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data.files import canonical, digest
from models.condition import Condition
from models.diffusers.parts import check_class, load_part, part_digest, rename_variant

log = logging.getLogger(__name__)
ENCODER_PARTS = ("tokenizer", "text_encoder")  # how the names of a pipeline's encoders begin
INDEX = "model_index.json"
# Parts that check finished images: training ignores them, and keeps them for exports.
CHECKERS = {
    "feature_extractor": "transformers",
    "safety_checker": "stable_diffusion",
}
# Without a vocabulary a tokenizer would silently drop every word.
VOCABULARIES = ("vocab.json", "tokenizer.json", "spiece.model")
# Weights that are read, and those that are not.
WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
OTHER_WEIGHTS = (".bin", ".bin.index.json", ".msgpack", ".h5", ".onnx", ".onnx_data", ".pt")
TEXT_CHUNK = 64  # texts that are encoded at once
SPECIAL_TOKENS = 3  # at most, which tokenizers add to a text


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

    @property
    def encoders(self) -> list[str]:
        """Names of its encoders."""
        return [name for name in self.parts if name.startswith("text_encoder")]


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


def find_limits(pipe: Any) -> dict[str, int]:
    """Return the number of tokens that each tokenizer of a pipeline keeps of a text, by name.

    T5's is the pipeline's `max_sequence_length`, those of CLIP are their own.
    """
    parameters = inspect.signature(type(pipe).encode_prompt).parameters
    limits = {}
    for name, part in pipe.components.items():
        if not name.startswith("tokenizer") or part is None:
            continue
        limits[name] = part.model_max_length
        if type(part).__name__.startswith("T5") and "max_sequence_length" in parameters:
            limits[name] = parameters["max_sequence_length"].default
    return limits


def find_checkers(folder: Path) -> list[str]:
    """Return the parts of a pipeline that check finished images, and are complete."""
    index = json.loads((folder / INDEX).read_bytes())
    found: list[str] = []
    for name, library in CHECKERS.items():
        listed = index.get(name) or [None, None]
        is_complete = listed[0] == library and (folder / name).is_dir()
        if name == "safety_checker":  # it reads what the feature extractor makes
            is_complete &= "feature_extractor" in found
            is_complete = is_complete and any((folder / name).glob("model*.safetensors"))
        if is_complete:
            found.append(name)
    return found


def copy_untrained(source: Path, folder: Path) -> dict[str, list[str]]:
    """Copy byte for byte what training leaves of a pipeline: tokenizers, text encoders, checkers.

    Rewritten by one version of transformers, they could not be read by others. Weights that are not
    read are left out: those in other formats, and variants beside the plain ones. A variant that is
    alone gets the plain name, under which it is loaded without further options.

    Args:
        source: the pipeline's folder.
        folder: where to write the parts.

    Returns:
        Library and class of each part, as the pipeline's index lists them.
    """
    index = json.loads((source / INDEX).read_bytes())
    checkers = find_checkers(source)
    for name in CHECKERS:
        if (index.get(name) or [None, None])[1] and name not in checkers:
            log.warning(
                "%s: its %s is left out: it is no complete %s part, with safetensors",
                source,
                name,
                CHECKERS[name],
            )
    copied = {}
    for name in [*find_text_encoders(source).parts, *checkers]:
        copy = shutil.copyfile  # without permissions: a read-only part could not be replaced
        shutil.copytree(source / name, folder / name, ignore=_unread_files, copy_function=copy)
        rename_variant(folder / name)
        (folder / name).chmod(0o755)
        copied[name] = index[name]
    return copied


def _unread_files(_: str, names: list[str]) -> set[str]:
    """Return the files of a part's folder that are not read."""
    has_plain_weights = any(WEIGHTS.fullmatch(name) for name in names)
    unread = set()
    for name in names:
        is_variant = ".safetensors" in name and not WEIGHTS.fullmatch(name)
        is_other = name.endswith(OTHER_WEIGHTS) or name.startswith(".")
        if is_other or (is_variant and has_plain_weights):
            unread.add(name)
    return unread


def _check_parts(folder: Path, found: TextEncoderParts) -> None:
    """Check that a pipeline's text encoders are complete."""
    if not found.pipeline:
        raise ValueError(
            f"{folder}: not a pipeline with texts; supported are {', '.join(TEXT_PIPELINES)}"
        )
    if found.pipeline == "StableDiffusion3Pipeline" and "text_encoder_3" not in found.parts:
        raise ValueError(f"{folder}: no text_encoder_3 in it; use a folder that has it")
    listed = json.loads((folder / INDEX).read_bytes())
    for name in found.parts:
        part = folder / name
        check_class(part, str(listed[name][1]))
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
def _load_encoders(folder: Path, changed: str, dtype: torch.dtype) -> Any:
    """Return a pipeline with its text encoders alone.

    Args:
        folder: the pipeline's.
        changed: digest of its files' times, part of the cache's key.
        dtype: of the encoders' weights.
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
    # the encoders are complete, or refused; the pipeline adds their tokenizers
    encoders = {name: _load_encoder(folder, name).to(dtype) for name in found.encoders}
    try:
        with torch.inference_mode(False):  # the first caller may be in inference mode
            return cls.from_pretrained(folder, local_files_only=True, **absent, **encoders)
    except MemoryError:
        raise
    except Exception as error:  # diffusers, transformers and safetensors raise different kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{folder}: its {', '.join(found.parts)} are not readable ({reason})"
        ) from error


def _load_encoder(folder: Path, name: str) -> torch.nn.Module:
    """Return one text encoder of a pipeline, in float32."""
    import transformers

    library, kind = json.loads((folder / INDEX).read_bytes())[name]
    if library != "transformers" or not hasattr(transformers, kind):
        raise ValueError(
            f"{folder / INDEX}: {name} is a {library}.{kind}; it must be a class of transformers"
        )
    return load_part(getattr(transformers, kind), folder / name)


@lru_cache(maxsize=4)
def _digest_encoders(folder: Path, changed: str) -> dict[str, str]:
    """Return the digests of a pipeline's tokenizers and text encoders, by name.

    Args:
        folder: the pipeline's.
        changed: digest of its files' times, part of the cache's key.
    """
    return {name: part_digest(folder / name) for name in find_text_encoders(folder).parts}


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
        self.is_checked = False  # whether long prompts were reported
        self.encoder_dtype = torch.float32  # of the encoders' weights; results are float32

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
        """The pipeline with its text encoders alone, shared by all with this folder."""
        try:
            import transformers
        except ImportError:
            raise ValueError(
                "Prompts: texts need transformers; pip install 'rectify[text]'"
            ) from None
        transformers.utils.logging.disable_progress_bar()
        folder = Path(self.encoder).resolve()
        return _load_encoders(folder, self._changed, self.encoder_dtype)

    @property
    def parts(self) -> dict[str, str]:
        """Digests of the tokenizers and text encoders by name, which a pair set records."""
        return _digest_encoders(Path(self.encoder).resolve(), self._changed)

    @property
    def _changed(self) -> str:
        """Digest of names, sizes and times of the pipeline's index, tokenizers and encoders."""
        folder = Path(self.encoder)
        if not (folder / INDEX).is_file():
            raise ValueError(f"{folder}: no {INDEX} in it; use a pipeline's folder")
        files = [folder / INDEX]
        for name in find_text_encoders(folder).parts:
            files += sorted((folder / name).glob("*"))
        found = []
        for file in files:
            status = file.stat()
            found.append([str(file), status.st_size, status.st_mtime_ns])
        return digest(canonical(found))

    def save(self, folder: Path) -> None:
        """Copy the text encoders into a folder, which can be another's `encoder`."""
        source = Path(self.encoder)
        copied = copy_untrained(source, folder)

        # An index of these alone.
        index = json.loads((source / INDEX).read_bytes())
        index.pop("_name_or_path", None)
        for name, part in index.items():
            if isinstance(part, list) and name not in copied:
                index[name] = [None, None]
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    @property
    def zero_if_empty(self) -> bool:
        """Whether an empty text is encoded as zeros: SDXL's `force_zeros_for_empty_prompt`."""
        return bool(self.pipe.config.get("force_zeros_for_empty_prompt", False))

    def encode(self, texts: list[str], device: torch.device) -> Tensor:
        """Return the encoded texts, (n, tokens, channels), float32."""
        parts = []
        for start in range(0, len(texts), TEXT_CHUNK):
            encoded = self._encode_chunk(texts[start : start + TEXT_CHUNK], device)
            parts.append(encoded.as_tensor().float())
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

    def _warn_of_long_lines(self) -> None:
        """Warn once of prompts of which a tokenizer drops the end."""
        if self.is_checked:
            return
        self.is_checked = True
        for name, limit in find_limits(self.pipe).items():
            cut = self._find_long(name, limit, self.lines)
            if cut:
                first = cut[0]
                log.warning(
                    "%s: %d of %d prompts are longer than the %d tokens of %s, which drops the "
                    "rest; the first is line %d: %.60s",
                    self.path,
                    len(cut),
                    len(self.lines),
                    limit,
                    name,
                    first + 1,
                    self.lines[first],
                )

    def _find_long(self, tokenizer: str, limit: int, texts: list[str]) -> list[int]:
        """Return which texts have more tokens than a limit."""
        tokenize = self.pipe.components[tokenizer]
        found = []
        for number, text in enumerate(texts):
            # a token is at least a byte, or the gap before a word
            if len(text.encode()) + text.count(" ") + SPECIAL_TOKENS <= limit:
                continue
            if len(tokenize(text, truncation=False)["input_ids"]) > limit:
                found.append(number)
        return found

    def encode_negative(self, text: str) -> Tensor:
        """Return an encoded negative prompt, (tokens, channels), on the CPU.

        An empty one is encoded too, as diffusers does with a negative prompt that is given.

        Raises:
            ValueError: a tokenizer would drop its end.
        """
        for name, limit in find_limits(self.pipe).items():
            if self._find_long(name, limit, [text]):
                raise ValueError(
                    f"negative_prompt: it is longer than the {limit} tokens of {name}: "
                    f"{text:.60}; shorten it"
                )
        return self.encode([text], torch.device("cpu"))[0]

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
        self._warn_of_long_lines()
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


def find_text_difference(before: Condition, now: Condition) -> str:
    """Return the first part by which two conditions encode texts differently.

    It is "" if they encode them alike, or if one of them reads no texts.
    """
    if not (isinstance(before, Prompts) and isinstance(now, Prompts)):
        return ""
    if Path(before.encoder).resolve() == Path(now.encoder).resolve():
        return ""
    for part, expected in before.parts.items():
        if now.parts.get(part) != expected:
            return part
    return ""
