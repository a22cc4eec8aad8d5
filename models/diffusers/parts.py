"""Parts of pipelines: folders of diffusers and transformers, read completely or not at all."""

import inspect
import json
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from data.files import canonical, digest, errors_named, file_digest

log = logging.getLogger(__name__)
# How the names of files of weights begin, by library.
WEIGHTS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
# Where a part's own config names its class.
CLASS_KEYS = (
    ("config.json", "_class_name"),
    ("config.json", "architectures"),
    ("scheduler_config.json", "_class_name"),
    ("tokenizer_config.json", "tokenizer_class"),
)
# What diffusers makes of a Transformer2DModel, the former class of these networks, by `norm_type`.
FORMER_NETWORK = "Transformer2DModel"
SUCCESSORS = {
    "ada_norm_single": "PixArtTransformer2DModel",
    "ada_norm_zero": "DiTTransformer2DModel",
}
# Classes of any tokenizer; the others have a fast twin, which computes the same.
ANY_TOKENIZER = ("PreTrainedTokenizer", "TokenizersBackend")
# Weights of buffers that older versions stored, and newer ones compute.
COMPUTED_BUFFERS = ("position_ids", "inv_freq")
# Files that are not read, and keys of configs that change nothing.
UNREAD_FILES = re.compile(
    r"\..*|.*\.(?:md|bin|pt|ckpt|msgpack|h5|onnx|onnx_data|gguf|safetensors|index\.json|index\.\w+\.json)"
)
UNREAD_KEYS = ("transformers_version", "torch_dtype", "dtype", "architectures")


def read_config(path: Path) -> dict[str, Any]:
    """Return a JSON file's object.

    Raises:
        ValueError: there is no such file, or it is not an object.
    """
    with errors_named(path):
        config = json.loads(path.read_bytes())
        if not isinstance(config, dict):
            raise ValueError("not a JSON object")
    return config


def update_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return a network's config; of a former class, the config of its successor."""
    import diffusers

    successor = SUCCESSORS.get(str(config.get("norm_type")))
    if config.get("_class_name") != FORMER_NETWORK or successor is None:
        return config
    keys = inspect.signature(getattr(diffusers, successor).__init__).parameters
    former_keys = inspect.signature(diffusers.Transformer2DModel.__init__).parameters
    updated = {}
    for key, value in config.items():
        if key in keys or key not in former_keys:
            updated[key] = value
    return {**updated, "_class_name": successor}


def check_class(part: Path, listed: str) -> None:
    """Check that a part's own config names the class that its pipeline's index lists.

    Args:
        part: the part's folder; a config that is missing is reported by whoever reads it.
        listed: name of the class.

    Raises:
        ValueError: it names another.
    """
    for file, key in CLASS_KEYS:
        if not (part / file).is_file():
            continue
        config = read_config(part / file)
        found = config.get(key)
        if found == FORMER_NETWORK and listed != found:
            found = update_config(config)[key]
        if isinstance(found, list):
            found = found[0] if found else None
        if not found or str(found).removesuffix("Fast") in ANY_TOKENIZER:
            continue
        if str(found).removesuffix("Fast") != listed.removesuffix("Fast"):
            raise ValueError(
                f"{part / file}: {key} is {found}, but the part is to be a {listed}; use the "
                "folder of a complete pipeline, or make the two names equal"
            )


def find_variant(part: Path, stem: str) -> str | None:
    """Return the variant of weights (for example fp16) if a folder has no others, else None.

    Args:
        part: the folder.
        stem: how the names of its files of weights begin.

    Raises:
        ValueError: it has no safetensors, or several variants alone.
    """
    if not part.is_dir():
        raise ValueError(f"{part}: no such folder; use the folder of a complete pipeline")
    names = sorted(file.name for file in part.iterdir())
    plain = {f"{stem}.safetensors", f"{stem}.safetensors.index.json"}
    if plain & set(names):
        return None
    variants = set()
    pattern = re.compile(rf"{stem}\.(\w+)\.safetensors|{stem}\.safetensors\.index\.(\w+)\.json")
    for name in names:
        match = pattern.fullmatch(name)
        if match:
            variants.add(match[1] or match[2])
    if len(variants) > 1:
        raise ValueError(
            f"{part}: it has only the variants {', '.join(sorted(variants))} of its weights; "
            f"leave one of them in it, or rename it to {stem}.safetensors"
        )
    if variants:
        variant = variants.pop()
        log.info("%s: its weights are read from the variant %s", part, variant)
        return variant
    pickled = [name for name in names if name.endswith((".bin", ".pt", ".ckpt", ".msgpack"))]
    if pickled:
        raise ValueError(
            f"{part}: its weights are in {pickled[0]} alone, which could run code; convert the "
            "pipeline with DiffusionPipeline.from_pretrained(FOLDER, use_safetensors=False)"
            ".save_pretrained(NEW_FOLDER) (a text encoder: AutoModel of transformers), or download "
            "its safetensors"
        )
    raise ValueError(f"{part}: no {stem}.safetensors in it; use the folder of a complete pipeline")


def load_part(cls: Any, part: Path, extra: Collection[str] = ()) -> Any:
    """Return a network with the weights of a folder, in float32 and without gaps.

    Args:
        cls: its class, of diffusers or transformers.
        part: the folder.
        extra: keys of the config that the class need not know.

    Raises:
        ValueError: the folder is of another class, its weights are not readable, or some are
            missing: they would be random.
    """
    check_class(part, cls.__name__)
    return load_network(cls, part, extra)


def load_network(
    cls: Any,
    part: Path,
    extra: Collection[str] = (),
    unread: tuple[str, ...] = (),
    arguments: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    """Return a network with the weights of a folder, which may be those of a larger network.

    Args:
        cls: its class, of diffusers or transformers.
        part: the folder.
        extra: keys of the config that the class need not know.
        unread: how the names of weights begin that the class need not read.
        arguments: of the class's `from_pretrained`.

    Raises:
        ValueError: its weights are not readable, or some are missing: they would be random.
    """
    library = cls.__module__.partition(".")[0]
    variant = find_variant(part, WEIGHTS[library])
    if library == "diffusers":
        check_keys(cls, part / "config.json", extra)
    try:
        # The caller may be in inference mode. Keys of the config are checked already.
        with torch.inference_mode(False), silenced("diffusers.configuration_utils"):
            model, info = cls.from_pretrained(
                part,
                variant=variant,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                **arguments,
            )
    except MemoryError:
        raise
    except Exception as error:  # diffusers, transformers and torch raise different kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{part}: not a readable {cls.__name__} ({reason})") from error
    check_complete(part, info, unread)
    with torch.inference_mode(False):
        return model.float()


@contextmanager
def silenced(name: str) -> Iterator[None]:
    """Leave out the warnings of a logger."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def check_keys(cls: Any, path: Path, extra: Collection[str] = ()) -> None:
    """Check that a class of diffusers reads every key of a config, which it would drop.

    Args:
        cls: the class.
        path: of the config.
        extra: keys that it need not know.

    Raises:
        ValueError: a key is unknown, and neither null nor false.
    """
    keys = {*inspect.signature(cls.__init__).parameters, *extra}
    for key, value in update_config(read_config(path)).items():
        if key not in keys and not key.startswith("_") and value not in (None, False):
            raise ValueError(
                f"{path}: {key} is {value}, which a {cls.__name__} of this version of diffusers "
                "does not know; remove the key if it changes nothing"
            )


def check_complete(part: Path, info: dict[str, Any], ignored: tuple[str, ...] = ()) -> None:
    """Check the report of a library on the weights that it has read from a folder.

    Args:
        part: the folder.
        info: the report.
        ignored: how the names of weights begin that need not be read.

    Raises:
        ValueError: some are missing, or have another shape.
    """
    missing = set(info["missing_keys"])
    for key in info["mismatched_keys"]:
        missing.add(key if isinstance(key, str) else key[0])
    if missing:
        first = min(missing)
        raise ValueError(
            f"{part}: its weights lack {first} ({len(missing)} in all), which would be random; "
            "use a complete folder"
        )
    unread = []
    for key in sorted(info["unexpected_keys"]):
        if not key.endswith(COMPUTED_BUFFERS) and not key.startswith(ignored):
            unread.append(key)
    if unread:
        log.warning(
            "%s: %d of its weights are not used by its config, first %s",
            part,
            len(unread),
            unread[0],
        )


def part_digest(part: Path, names: Collection[str] | None = None, weights: bool = True) -> str:
    """Return the sha256 of all that is read of a part's folder: its configs and its weights.

    What a library notes in configs (its version, where a part came from) does not count.

    Args:
        part: the folder.
        names: of the files that count, beside the weights. None: all that are read.
        weights: whether the weights count.
    """
    sums = {}
    for file in sorted(part.iterdir()):
        if file.is_dir() or UNREAD_FILES.fullmatch(file.name):
            continue
        if names is not None and file.name not in names:
            continue
        sums[file.name] = file_digest(file)
        if file.name in ("config.json", "scheduler_config.json", "tokenizer_config.json"):
            sums[file.name] = digest(canonical(_without_notes(read_config(file))))
    for file in _weight_files(part) if weights else ():
        sums[plain_name(file.name)] = file_digest(file)
    return digest(canonical(sums))


def plain_name(file: str) -> str:
    """Return the name of a file of weights without its variant."""
    file = re.sub(r"\.safetensors\.index\.\w+\.json$", ".safetensors.index.json", file)
    pattern = r"^(\w+?)(\.\w+)?(-\d+-of-\d+)?(\.\w+)?\.safetensors$"
    return re.sub(pattern, r"\1\3.safetensors", file)


def rename_variant(part: Path) -> None:
    """Give a variant's weights the plain names, under which they are loaded without an option."""
    for file in sorted(part.glob("*.safetensors*")):
        plain = file.with_name(plain_name(file.name))
        if plain == file:
            continue
        if file.suffix == ".json":
            index = read_config(file)
            for key, shard in index["weight_map"].items():
                index["weight_map"][key] = plain_name(shard)
            file.write_text(json.dumps(index, indent=2) + "\n")
        file.rename(plain)


def _without_notes(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config without what changes nothing."""
    kept = {}
    for key, value in config.items():
        if not key.startswith("_") and key not in UNREAD_KEYS:
            kept[key] = value
    return kept


def _weight_files(part: Path) -> list[Path]:
    """Return the files of weights that `load_part` reads; none for a part without weights."""
    found = []
    for stem in WEIGHTS.values():
        names = [file.name for file in part.glob(f"{stem}*.safetensors*")]
        if not names:
            continue
        variant = find_variant(part, stem)
        middle = f".{variant}" if variant else ""
        pattern = re.compile(rf"{stem}{re.escape(middle)}(-\d+-of-\d+)?\.safetensors")
        if variant:  # shards are NAME.fp16-00001-of-00002.safetensors or NAME-00001-of-00002.fp16
            pattern = re.compile(rf"{stem}(-\d+-of-\d+)?\.{variant}(-\d+-of-\d+)?\.safetensors")
        for name in sorted(names):
            if pattern.fullmatch(name):
                found.append(part / name)
    return found
