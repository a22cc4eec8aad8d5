"""Text encoders of transformers: a folder of a BERT, CLIP or T5 gives the embeddings of texts."""

import importlib.util
import inspect
import json
import logging
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data.text_features import TextFeatures
from models.diffusers.parts import (
    WEIGHTS,
    find_variant,
    load_network,
    part_digest,
    read_config,
    silenced,
)

log = logging.getLogger(__name__)
PACKAGE = "package:"  # how the name of an installed package begins, in place of a folder
DEFAULT_TOKENS = 128  # of a text at most, special tokens included, unless the encoder reads fewer
TEXT_BATCH = 64  # texts that are encoded at once
SPECIAL_TOKENS = 3  # at most, which tokenizers add to a text
# The class that reads a folder's text encoder, by the `model_type` of its config.
ENCODERS = {
    "albert": "AlbertModel",
    "bert": "BertModel",
    "camembert": "CamembertModel",
    "clip": "CLIPTextModelWithProjection",
    "clip_text_model": "CLIPTextModel",  # or with its projection, by the config's architecture
    "deberta": "DebertaModel",
    "deberta-v2": "DebertaV2Model",
    "distilbert": "DistilBertModel",
    "electra": "ElectraModel",
    "modernbert": "ModernBertModel",
    "mpnet": "MPNetModel",
    "mt5": "MT5EncoderModel",
    "roberta": "RobertaModel",
    "t5": "T5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "xlm-roberta": "XLMRobertaModel",
}
WITH_PROJECTION = "CLIPTextModelWithProjection"
# How the names of weights begin that folders have beside those of their text encoder.
UNREAD_WEIGHTS = (
    *("pooler.", "cls.", "lm_head.", "vocab_", "predictions.", "discriminator_predictions."),
    *("bert.pooler.", "roberta.pooler.", "mpnet.pooler."),
    *("vision_model.", "visual_projection.", "logit_scale", "decoder.", "head.", "qa_outputs."),
)
TOKENIZER = "tokenizer"  # folder of a tokenizer that is not in its encoder's folder
VOCABULARIES = (
    *("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model"),
    *("sentencepiece.bpe.model", "tokenizer.model"),
)
TOKENIZER_FILES = (
    *VOCABULARIES,
    *("merges.txt", "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json"),
)
# Files of sentence encoders (Reimers and Gurevych 2019, arXiv 1908.10084).
SENTENCE_MODULES = "modules.json"
SENTENCE_POOLING = "1_Pooling/config.json"
SENTENCE_CONFIG = "sentence_bert_config.json"
POOLING_MODES = {
    "pooling_mode_cls_token": "first",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
}

Output = Literal["tokens", "pooled", "both"]


class Pooling(NamedTuple):
    """How the embeddings of a text's tokens become one embedding."""

    mode: str  # first, mean or max of the tokens, or the encoder's output of this name
    is_normalized: bool = False  # whether its norm becomes 1

    def describe(self) -> str:
        """Return it as a plain text."""
        return f"{self.mode}, normalized" if self.is_normalized else self.mode


class TextEmbedding(NamedTuple):
    """The embeddings of one text."""

    tokens: Tensor | None  # (length, D) float32
    pooled: Tensor | None  # (E,) float32


def find_encoder_folder(path: str) -> Path:
    """Return the folder of a text encoder: a path, or `package:NAME` of an installed package.

    The package's code is not run.

    Raises:
        ValueError: the package is not installed, or has no encoder's folder.
    """
    if not path.startswith(PACKAGE):
        return Path(path)
    name = path.removeprefix(PACKAGE).replace("-", "_")
    spec = None
    if name.isidentifier():
        spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"{path}: no such package is installed; pip install {name.replace('_', '-')}"
        )
    root = Path(spec.submodule_search_locations[0])
    found = [file.parent for file in (root / "config.json", *root.glob("*/config.json"))]
    folders = [folder for folder in found if (folder / "config.json").is_file()]
    if len(folders) != 1:
        raise ValueError(
            f"{path}: {root} has {len(folders)} folders with a config.json; give the folder of the "
            "text encoder"
        )
    return folders[0]


def find_encoder_class(folder: Path) -> str:
    """Return the name of the class of transformers that reads a folder's text encoder.

    Raises:
        ValueError: the folder has no text encoder.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give that of a text encoder")
    path = folder / "config.json"
    if not path.is_file():
        parts = [str(part) for part in sorted(folder.glob("text_encoder*")) if part.is_dir()]
        way_out = f"give one of {', '.join(parts)}" if parts else "give that of a text encoder"
        raise ValueError(f"{folder}: no config.json in it; {way_out}")
    config = read_config(path)
    kind = config.get("model_type")
    if "_class_name" in config:
        kind = config["_class_name"]
    if not isinstance(kind, str) or kind not in ENCODERS or config.get("is_decoder"):
        decoder = ", a decoder" if config.get("is_decoder") else ""
        raise ValueError(
            f"{path}: is of a {kind}{decoder}, which is no text encoder; supported are "
            f"{', '.join(ENCODERS)}"
        )
    if kind == "clip_text_model" and WITH_PROJECTION in (config.get("architectures") or ()):
        return WITH_PROJECTION
    return ENCODERS[kind]


def find_tokenizer(folder: Path) -> Path:
    """Return the folder of an encoder's tokenizer.

    It is the encoder's, `tokenizer` in it, or beside it the folder that a pipeline has for it:
    `tokenizer_2` for `text_encoder_2`.

    Raises:
        ValueError: there is none.
    """
    resolved = folder.resolve()
    beside = resolved.name.replace("text_encoder", TOKENIZER)
    candidates = [folder, folder / TOKENIZER]
    if beside.startswith(TOKENIZER):
        candidates.append(resolved.with_name(beside))
    for candidate in candidates:
        if any((candidate / name).is_file() for name in VOCABULARIES):
            return candidate
    raise ValueError(
        f"{folder}: no tokenizer in it ({', '.join(VOCABULARIES)}) nor in {TOKENIZER} inside or "
        "beside it; use the complete folder of a text encoder"
    )


def find_pooling(folder: Path, encoder: str) -> Pooling | None:
    """Return how an encoder pools a text's tokens; None if it does not.

    Args:
        folder: the encoder's.
        encoder: name of its class.

    Raises:
        ValueError: it pools them in a way that is not supported.
    """
    if encoder == WITH_PROJECTION:
        return Pooling("text_embeds")
    if encoder == "CLIPTextModel":
        return Pooling("pooler_output")
    if not (folder / SENTENCE_POOLING).is_file():
        return None

    # Exactly one mode, of those that are computed alike by every version.
    config = read_config(folder / SENTENCE_POOLING)
    modes = [key for key, value in config.items() if key.startswith("pooling_mode_") and value]
    if len(modes) != 1 or modes[0] not in POOLING_MODES:
        raise ValueError(
            f"{folder / SENTENCE_POOLING}: its pooling is {', '.join(modes) or 'not given'}; it "
            f"must be one of {', '.join(POOLING_MODES)}; read the tokens only, or pool them by "
            "their mean"
        )
    return Pooling(POOLING_MODES[modes[0]], _is_normalized(folder / SENTENCE_MODULES))


def _is_normalized(path: Path) -> bool:
    """Whether a sentence encoder's list of modules normalizes the pooled embedding.

    Raises:
        ValueError: the list has a module that is not supported.
    """
    if not path.is_file():
        return False
    try:
        modules = [str(entry["type"]).rpartition(".")[2] for entry in json.loads(path.read_bytes())]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path}: not a readable list of modules ({error!r})") from None
    for module in modules:
        if module not in ("Transformer", "Pooling", "Normalize"):
            raise ValueError(
                f"{path}: its module {module} is not supported; read the tokens only, or pool them "
                "by their mean"
            )
    return "Normalize" in modules


class TextEncoder:
    """A frozen text encoder of transformers, in float32.

    It is read from a folder alone: no code of the folder is run, nothing is downloaded, and weights
    must be complete safetensors. Texts of one number of tokens are encoded together, so that none
    is padded: an embedding depends on its text, and on the other texts by rounding alone.

    Args:
        path: folder of the encoder, or `package:NAME` of an installed package that has one. The
            tokenizer is in it, or in `tokenizer` inside or beside it.
        output: embeddings of the tokens, of the whole text (pooled), or both. By default all that
            the encoder has: T5 and a plain BERT have no pooled embedding.
        pooling: auto: as the encoder does it: CLIP by its end token and projection, sentence
            encoders by their configuration. mean: the mean of the tokens.
        max_tokens: of a text, special tokens included; the rest of a text is cut. By default 128,
            or as many as the encoder reads.

    Raises:
        ValueError: the folder has no text encoder, or cannot give what is requested.
    """

    def __init__(
        self,
        path: str,
        output: Output | None = None,
        pooling: Literal["auto", "mean"] = "auto",
        max_tokens: int | None = None,
    ):
        self.path = path
        self.output = output
        self.pooling = pooling
        self.max_tokens = max_tokens
        self.device = torch.device("cpu")
        self.folder = find_encoder_folder(path)
        self._class = find_encoder_class(self.folder)
        self._tokenizer_folder = find_tokenizer(self.folder)
        find_variant(self.folder, WEIGHTS["transformers"])  # the weights are there
        self._pooling = self._find_pooling()

    def _find_pooling(self) -> Pooling | None:
        """Return how the tokens are pooled; None if they are not."""
        if self.output == "tokens":
            return None
        if self.pooling == "mean":
            return Pooling("mean")
        found = find_pooling(self.folder, self._class)
        if found is None and self.output is not None:
            raise ValueError(
                f"{self.path}: output is {self.output}, but this {self._class} has no pooled "
                "embedding; set pooling to mean, or output to tokens"
            )
        return found

    def __repr__(self) -> str:
        return self.path

    def __getstate__(self) -> dict[str, Any]:
        """Return what a worker needs: it loads network and tokenizer again."""
        state = dict(self.__dict__)
        for name in ("network", "tokenizer", "length"):
            state.pop(name, None)
        return state

    def to(self, device: torch.device) -> "TextEncoder":
        """Move the network to a device; return the encoder."""
        self.device = device
        if "network" in self.__dict__:
            self.network.to(device)
        return self

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer."""
        transformers = _import_transformers(self.path)
        # A tokenizer with threads could hang in the forked workers of a DataLoader.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        try:
            return transformers.AutoTokenizer.from_pretrained(
                self._tokenizer_folder, local_files_only=True, trust_remote_code=False
            )
        except MemoryError:
            raise
        except Exception as error:  # transformers, tokenizers and sentencepiece raise many kinds
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"{self._tokenizer_folder}: not a readable tokenizer ({reason})"
            ) from error

    @cached_property
    def length(self) -> int:
        """Number of tokens of a text at most."""
        limit = min(self.tokenizer.model_max_length, *self._limits())
        if self.max_tokens is None:
            return min(limit, DEFAULT_TOKENS)
        smallest = self.tokenizer.num_special_tokens_to_add() + 1
        if not smallest <= self.max_tokens <= limit:
            raise ValueError(
                f"max_tokens is {self.max_tokens}; it must lie in [{smallest}, {limit}] for "
                f"{self.path}"
            )
        return self.max_tokens

    def _limits(self) -> list[int]:
        """Return the numbers of tokens that the folder's configs allow."""
        limits = [2**31]
        config = read_config(self.folder / "config.json")
        config = config.get("text_config") or config
        positions = config.get("max_position_embeddings")
        if positions is not None:
            if self._class in ("RobertaModel", "XLMRobertaModel", "CamembertModel", "MPNetModel"):
                positions -= config.get("pad_token_id", 1) + 1  # which have no position
            limits.append(positions)
        if (self.folder / SENTENCE_CONFIG).is_file():
            longest = read_config(self.folder / SENTENCE_CONFIG).get("max_seq_length")
            if longest is not None:
                limits.append(longest)
        return limits

    @cached_property
    def network(self) -> Any:
        """The encoder, on its device."""
        transformers = _import_transformers(self.path)
        cls = getattr(transformers, self._class)
        arguments: dict[str, Any] = {"ignore_mismatched_sizes": True}  # they are refused by name
        if "add_pooling_layer" in inspect.signature(cls.__init__).parameters:
            arguments["add_pooling_layer"] = False  # of BERT's, which is for training only
        with silenced("transformers"):  # it lists all weights that are not read
            network = load_network(cls, self.folder, unread=UNREAD_WEIGHTS, arguments=arguments)
        size = network.get_input_embeddings().num_embeddings
        if len(self.tokenizer) > size:
            raise ValueError(
                f"{self._tokenizer_folder}: has {len(self.tokenizer)} tokens, but {self.folder} "
                f"has embeddings of {size}; use the encoder's tokenizer"
            )
        return network.eval().requires_grad_(False).to(self.device)

    def identity(self) -> dict[str, object]:
        """Return what identifies the encoder and how it is read, as plain values.

        The folder's path, and notes of other programs in it, do not count.
        """
        return {
            "class": self._class,
            "weights": self._weights,
            "tokenizer": part_digest(self._tokenizer_folder, TOKENIZER_FILES, weights=False),
            "tokens": None if self.output == "pooled" else "last hidden state",
            "pooled": self._pooling.describe() if self._pooling else None,
            "max_tokens": self.length,
        }

    @cached_property
    def _weights(self) -> str:
        """Digest of the encoder's config and weights."""
        return part_digest(self.folder, ("config.json",))

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each text, cut to the encoder's number of them."""
        if not texts:
            return []
        return self.tokenizer(list(texts), truncation=True, max_length=self.length)["input_ids"]

    def find_long(self, texts: Iterable[str]) -> list[int]:
        """Return which texts are cut."""
        found = []
        for number, text in enumerate(texts):
            # A token is at least a byte, or the gap before a word.
            if len(text.encode()) + text.count(" ") + SPECIAL_TOKENS <= self.length:
                continue
            tokens = self.tokenizer(text, truncation=True, max_length=self.length + 1)
            if len(tokens["input_ids"]) > self.length:
                found.append(number)
        return found

    def features(self, texts: Sequence[str]) -> TextFeatures:
        """Return the embeddings of texts, padded to the encoder's number of tokens."""
        # Each distinct text is encoded once.
        distinct = list(dict.fromkeys(texts))
        embeddings = self.embed(distinct)
        positions = {text: number for number, text in enumerate(distinct)}
        chosen = [positions[text] for text in texts]

        # Pad the tokens.
        states = [found.tokens for found in embeddings if found.tokens is not None]
        whole = [found.pooled for found in embeddings if found.pooled is not None]
        tokens = None
        mask = None
        pooled = None
        if states:
            lengths = torch.tensor([len(state) for state in states])
            padded = [F.pad(state, (0, 0, 0, self.length - len(state))) for state in states]
            tokens = torch.stack(padded)[chosen]
            mask = (torch.arange(self.length) < lengths[:, None])[chosen].to(tokens.device)
        if whole:
            pooled = torch.stack(whole)[chosen]
        return TextFeatures(tokens, mask, pooled)

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> list[TextEmbedding]:
        """Return the embeddings of each text, without padding.

        Raises:
            ValueError: a text has no tokens, or an embedding is not finite.
        """
        tokens = self.tokenize(texts)
        by_length: dict[int, list[int]] = {}
        for number, ids in enumerate(tokens):
            if not ids:
                raise ValueError(
                    f"{self._tokenizer_folder}: gives {texts[number]!r} no tokens; use a tokenizer "
                    "that marks the end of a text"
                )
            by_length.setdefault(len(ids), []).append(number)

        # Texts of one length, in the order of the lengths.
        found: list[TextEmbedding | None] = [None] * len(tokens)
        for _, numbers in sorted(by_length.items()):
            for start in range(0, len(numbers), TEXT_BATCH):
                part = numbers[start : start + TEXT_BATCH]
                batch = self._embed_batch(torch.tensor([tokens[number] for number in part]))
                for number, embedding in zip(part, batch):
                    self._check_finite(embedding, texts[number])
                    found[number] = embedding
        return [embedding for embedding in found if embedding is not None]

    def _embed_batch(self, ids: Tensor) -> list[TextEmbedding]:
        """Return the embeddings of texts with as many tokens, (B, length)."""
        network = self.network
        ids = ids.to(self.device)
        with torch.autocast(self.device.type, enabled=False):
            output = network(input_ids=ids, attention_mask=torch.ones_like(ids))
        states = output.last_hidden_state
        tokens: list[Any] = [None] * len(ids)
        pooled: list[Any] = [None] * len(ids)
        if self.output != "pooled":
            tokens = list(states)
        if self._pooling is not None:
            pooled = list(_pool(output, states, self._pooling))
        return [TextEmbedding(*pair) for pair in zip(tokens, pooled)]

    def _check_finite(self, embedding: TextEmbedding, text: str) -> None:
        """Check that the embeddings of a text are finite."""
        for value in embedding:
            if value is not None and not value.isfinite().all():
                raise ValueError(
                    f"{self.path}: its embedding of {text[:60]!r} is not finite; repair the "
                    "encoder, or choose another"
                )


def _pool(output: Any, states: Tensor, pooling: Pooling) -> Tensor:
    """Return the pooled embeddings, (B, E), of what an encoder returned."""
    if pooling.mode == "first":
        pooled = states[:, 0]
    elif pooling.mode == "mean":
        pooled = states.mean(1)
    elif pooling.mode == "max":
        pooled = states.amax(1)
    else:
        pooled = output[pooling.mode]
    return F.normalize(pooled, dim=-1) if pooling.is_normalized else pooled


def _import_transformers(path: str) -> Any:
    try:
        import transformers
    except ImportError:
        raise ValueError(
            f"{path}: text encoders need transformers; pip install 'rectify[text]'"
        ) from None
    transformers.utils.logging.disable_progress_bar()
    return transformers
