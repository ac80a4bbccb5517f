"""Finds a data set's column by the type of its values: pictures, one text, several texts. Others raise an error."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

ROWS_AT_ONCE = 1000  # whose pictures are looked at together
USUAL_FORMS = "a text, a list of texts, a list of dicts, or a dict of lists"


def one_text(value: Any, where: str) -> str:
    """A value that must be a text.

    Args:
        value: from a row.
        where: the column, for the error: "The column 'question' of 'owner/name', row 3".

    Raises:
        ValueError: for anything else, with its type.
    """
    if not isinstance(value, str):
        raise ValueError(f"{where} holds {kind_of(value)}, and should hold a text.")
    return value


def several_texts(value: Any, keys: Sequence[str], where: str) -> list[str]:
    """The texts of a value, in the forms in which data sets keep several of them.

    Args:
        value: a text, a list of texts, a list of dicts with a text under one of `keys`, or a dict with a list of texts
            (or one text) under one of `keys`, which is how `datasets` keeps nested features.
        keys: names under which texts stand, the most specific first.
        where: the column, for the error.

    Raises:
        ValueError: for any other form, with its type and keys.
    """
    found = value
    if isinstance(value, dict):
        found = next((value[key] for key in keys if key in value), None)
    if isinstance(found, str):
        return [found]
    if isinstance(found, Sequence):
        texts = [next((e[key] for key in keys if key in e), None) if isinstance(e, dict) else e for e in found]
        if all(isinstance(text, str) for text in texts):
            return texts  # type: ignore[return-value]
    raise ValueError(f"{where} holds {kind_of(value)}, and should hold {USUAL_FORMS} with the key {keys[0]!r}.")


def kind_of(value: Any) -> str:
    """The type of a value in words, with the keys of dicts and the type within a list."""
    if isinstance(value, dict):
        return f"a dict with the keys {list(value)}"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}" + (f", first {kind_of(value[0])}" if value else "")
    return "nothing" if value is None else f"{type(value).__name__} ({value!r:.40})"


def with_pictures(rows: Any, columns: Sequence[str], data_set: str) -> Any:
    """The rows of a `datasets.Dataset` with these columns as pictures that are decoded when they are read.

    Raises:
        ValueError: where a column holds something else than pictures or their encoded bytes.
    """
    from datasets import Image

    for column in columns:
        feature = rows.features[column]
        if isinstance(feature, Image) and feature.decode:
            continue
        encoded = getattr(feature, "dtype", "") in ("binary", "large_binary")
        if not (isinstance(feature, Image) or encoded or (isinstance(feature, dict) and "bytes" in feature)):
            raise ValueError(
                f"The column {column!r} of {data_set!r} holds {feature}, and should hold pictures (datasets.Image)."
            )
        rows = rows.cast_column(column, Image())
    return rows


def first_rows(rows: Any, chosen: set[int], column: str) -> dict[int, int]:
    """For each chosen row of a `datasets.Dataset` the first of them with the same picture, byte for byte.

    Only pictures of the same size in bytes are read, so it costs little where each picture has one row.
    """
    import pyarrow.compute
    from datasets import Image

    encoded = rows.select_columns([column]).cast_column(column, Image(decode=False)).with_format("arrow")
    by_size: dict[Any, list[int]] = defaultdict(list)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        pictures = encoded[start : start + ROWS_AT_ONCE][column].combine_chunks()
        lengths = pyarrow.compute.binary_length(pictures.field("bytes")).to_pylist()
        for offset, (length, path) in enumerate(zip(lengths, pictures.field("path").to_pylist(), strict=True)):
            if start + offset in chosen:
                by_size[path if length is None else length].append(start + offset)
    first: dict[Any, int] = {}
    result = {}
    for size, same_size in by_size.items():
        for row in same_size:
            digest = b""
            if len(same_size) > 1 and isinstance(size, int):
                digest = hashlib.sha256(encoded[row][column][0]["bytes"].as_buffer()).digest()
            result[row] = first.setdefault((size, digest), row)
    return result
