"""Captions: the texts of an image, each with a weight, of which training draws one per epoch."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from data.noise import CAPTION_STREAM, generator
from data.schema import check_schema, shorten

MAX_LENGTH = 8192  # characters; more are taken for a document
BYTE_ORDER_MARK = "\ufeff"
CAPTION_SCHEMA = [{"text": str, "weight": float}]


class Caption(NamedTuple):
    """One text of an image."""

    text: str
    weight: float = 1.0  # it is drawn in proportion to it


def clean_captions(captions: Iterable[Caption], name: str) -> tuple[Caption, ...]:
    """Return captions without blanks around them and with \\n as line ends, without empty ones.

    Equal texts become one caption, with the sum of their weights.

    Args:
        captions: as they were read.
        name: of their file, and the place in it, for errors.

    Raises:
        ValueError: one is too long, no valid Unicode, or has a weight that is not positive and
            finite.
    """
    weights: dict[str, float] = {}
    for text, weight in captions:
        text = text.removeprefix(BYTE_ORDER_MARK).replace("\r\n", "\n").replace("\r", "\n").strip()
        if len(text) > MAX_LENGTH:
            raise ValueError(
                f"{name}: a caption of {len(text):,} characters, more than {MAX_LENGTH:,} "
                f"({shorten(text)}); shorten it"
            )
        if not 0 < weight < float("inf"):
            raise ValueError(
                f"{name}: the weight of {shorten(text)} is {weight}; it must be positive"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{name}: {shorten(text)} has half of a character ({text[error.start]!r}, a "
                "surrogate); correct it"
            ) from None
        if text:
            weights[text] = weights.get(text, 0.0) + weight
    return tuple(Caption(text, float(weight)) for text, weight in weights.items())


def checksum_captions(images: Iterable[Sequence[Caption]]) -> str:
    """Return the sha256 of the captions of images, in order."""
    to_json = json.JSONEncoder(sort_keys=True).encode  # json.dumps would make one every time
    found = hashlib.sha256()
    for captions in images:
        found.update(to_json(captions_to_json(captions)).encode())
        found.update(b"\n")
    return found.hexdigest()


def captions_to_json(captions: Sequence[Caption]) -> list[dict[str, Any]]:
    """Return captions as they are stored in a sample's .json."""
    return [caption._asdict() for caption in captions]


def captions_from_json(data: bytes, name: str) -> tuple[Caption, ...]:
    """Return the captions in a sample's .json that `rectify pack` or `encode` wrote.

    Args:
        data: of the .json.
        name: of the sample, for errors.
    """
    try:
        facts = json.loads(data)
    except ValueError as error:
        raise ValueError(f"{name}: its .json is not valid ({error}); make the set again") from None
    check_schema(facts, {"captions": CAPTION_SCHEMA}, f"{name}: .json")
    return tuple(Caption(**entry) for entry in facts["captions"])


def draw_caption(captions: Sequence[Caption], seed: int, index: int, epoch: int) -> str:
    """Return one of an image's captions: a pure function of (seed, index, epoch).

    It is "" without captions.

    Args:
        captions: of the image.
        seed: of the run.
        index: of the image in its set.
        epoch: how often the image has been read before.
    """
    if not captions:
        return ""
    if len(captions) == 1:
        return captions[0].text
    bounds = np.cumsum([caption.weight for caption in captions])
    u = generator(seed, index, epoch, stream=CAPTION_STREAM).random()
    chosen = np.searchsorted(bounds, u * bounds[-1], side="right")
    return captions[min(int(chosen), len(captions) - 1)].text
