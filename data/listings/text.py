"""Reading text and JSON of users' files: UTF-8 alone, with the position of what is not."""

import json
from typing import Any

from data.captions import BYTE_ORDER_MARK


def read_text(data: bytes, where: str) -> str:
    """Return the text of a user's file, without a byte order mark.

    Args:
        data: bytes of the file, or of a line in it.
        where: the file, and the line in it, for errors.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        return data.decode().removeprefix(BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: is not UTF-8 at byte {error.start} ({data[error.start]:#04x}); convert it, "
            "for example with iconv -t UTF-8"
        ) from None


def parse_json(data: bytes, where: str) -> Any:
    """Return the value in JSON of a user's file.

    Args:
        data: bytes of the file, or of a line in it.
        where: the file, and the line in it, for errors.

    Raises:
        ValueError: it is not UTF-8, or no JSON.
    """
    text = read_text(data, where)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: is not valid JSON ({error})") from None
