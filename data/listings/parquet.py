"""Lists of images in parquet: paths, or the images themselves, which are read when needed."""

import io
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from data.files import errors_named
from data.listings.entries import Record
from data.listings.lists import Chooser, StoredImage
from data.pixels import open_image

BATCH = 4096  # rows that are converted at once
BYTES = "bytes"  # entries of the images of Hugging Face
PATH = "path"


def open_parquet(
    file: Path,
) -> tuple[list[str], tuple[str, ...], Callable[[Chooser], Iterator[Record]]]:
    """Return the columns of a parquet file, those that hold images themselves, and its rows.

    Raises:
        ValueError: it is no parquet file.
    """
    with errors_named(file), pq.ParquetFile(file) as parquet:
        schema = parquet.schema_arrow
    stored = tuple(field.name for field in schema if stored_leaf(field))
    return list(schema.names), stored, partial(parquet_rows, file, stored)


def stored_leaf(field: pa.Field) -> str | None:
    """Return the name of the bytes of a column that can hold images; None if it cannot."""
    if is_binary(field.type):
        return str(field.name)
    if pa.types.is_struct(field.type):
        entries = {entry.name: entry.type for entry in field.type}
        if BYTES in entries and is_binary(entries[BYTES]):
            return f"{field.name}.{BYTES}"
    return None


def is_binary(kind: pa.DataType) -> bool:
    """Whether a type is bytes."""
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def parquet_rows(file: Path, stored: tuple[str, ...], is_read: Chooser) -> Iterator[Record]:
    """Yield the rows of a parquet file, numbered from 0 as in pandas.

    Args:
        file: the file.
        stored: columns that hold images; their values become a `StoredImage`.
        is_read: which columns are read.
    """
    with errors_named(file), pq.ParquetFile(file) as parquet:
        # Choose the columns. Of an image that is stored with its path, the path is one.
        schema = parquet.schema_arrow
        images = [name for name in schema.names if name in stored and is_read(name)]
        columns = [name for name in schema.names if name not in stored and is_read(name)]
        for name in images:
            kind = schema.field(name).type
            if pa.types.is_struct(kind) and PATH in [entry.name for entry in kind]:
                columns.append(f"{name}.{PATH}")

        # Read the row groups.
        number = 0
        for group in range(parquet.num_row_groups):
            missing = {}
            for name in images:
                missing[name] = find_missing(parquet, group, schema.field(name))
            for row, values in enumerate(read_values(parquet, group, columns)):
                for name in images:
                    nested = values.get(name)
                    path = nested.get(PATH) if isinstance(nested, dict) else None
                    values[name] = path
                    if not missing[name][row]:
                        suffix = PurePath(path or "").suffix
                        opener = partial(open_stored, str(file), name, group, row, suffix)
                        values[name] = StoredImage(opener, f"{file.name}: row {number}")
                yield Record(f"{file}: row {number}", file.name, values)
                number += 1


def read_values(
    parquet: pq.ParquetFile, group: int, columns: list[str]
) -> Iterator[dict[str, Any]]:
    """Yield the values of the rows of a row group, by column.

    Args:
        parquet: the file.
        group: number of the row group.
        columns: which are read.
    """
    if not columns:
        for _ in range(parquet.metadata.row_group(group).num_rows):
            yield {}
        return
    for batch in parquet.iter_batches(BATCH, row_groups=[group], columns=columns):
        lists = [column.to_pylist() for column in batch.columns]
        for row in zip(*lists):
            yield dict(zip(batch.schema.names, row))


def find_missing(parquet: pq.ParquetFile, group: int, field: pa.Field) -> np.ndarray:
    """Return which rows of a row group have no bytes of an image, (rows,) bool.

    The bytes are read only if the file does not state that all rows have them.

    Args:
        parquet: the file.
        group: number of the row group.
        field: the column of the images.
    """
    facts = parquet.metadata.row_group(group)
    leaf = stored_leaf(field)
    for i in range(facts.num_columns):
        chunk = facts.column(i)
        if chunk.path_in_schema == leaf:
            statistics = chunk.statistics
            if statistics and statistics.has_null_count and statistics.null_count == 0:
                return np.zeros(facts.num_rows, dtype=bool)
    found = parquet.read_row_group(group, columns=[leaf]).column(field.name)
    if pa.types.is_struct(found.type):
        found = pc.struct_field(found, BYTES)
    return np.asarray(found.is_null())


@lru_cache(maxsize=1)
def read_group(file: str, column: str, group: int) -> pa.ChunkedArray:
    """Return a column of one row group. The latest one is kept: images are read in order."""
    with pq.ParquetFile(file) as parquet:
        return parquet.read_row_group(group, columns=[column]).column(0)


def open_stored(file: str, column: str, group: int, row: int, suffix: str) -> Image.Image:
    """Open an image that a parquet file holds."""
    value = read_group(file, column, group)[row].as_py()
    if isinstance(value, dict):
        value = value[BYTES]
    return open_image(io.BytesIO(value), suffix)
