"""Decode images in Arrow tables, the format of the Hugging Face Hub, into arrays."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from fed_dpsat.errors import DataError

MODES = {1: "L", 3: "RGB"}  # Pillow's mode by number of channels
ROWS_AT_A_TIME = 1_000  # bounds the undecoded bytes that are held as Python objects


def decode_images(
    tables: Sequence[tuple[str, Any]],
    *,
    image_column: str,
    label_column: str,
    shape: tuple[int, int, int],
    num_classes: int,
) -> tuple[np.ndarray, np.ndarray]:
    """``(inputs[N, C, H, W] uint8, labels[N] int64)`` of pairs (name of the source, ``pyarrow.Table``), in order.

    The image column is ``struct<bytes, path>`` with a PNG or JPEG file in ``bytes``; the label column is an integer.

    Raises ``DataError`` with file and row for a missing or wrong column, bytes that do not decode, an image that is not
    of ``shape = (C, H, W)``, a label outside ``[0, num_classes)``, and for tables without rows.
    """
    import pyarrow.compute as pc  # type: ignore[import-untyped]

    inputs = np.empty((sum(table.num_rows for _, table in tables), *shape), dtype=np.uint8)
    labels = np.empty(len(inputs), dtype=np.int64)
    if not len(inputs):
        raise DataError(f"{', '.join(where for where, _ in tables)}: no rows; fetch the data set again")
    start = 0
    for where, table in tables:
        end = start + table.num_rows
        _check_columns(where, table, image_column, label_column)
        labels[start:end] = _labels(where, table[label_column], num_classes)
        row = 0
        for batch in table.select([image_column]).to_batches(max_chunksize=ROWS_AT_A_TIME):
            for image in pc.struct_field(batch.column(0), "bytes").to_pylist():
                inputs[start + row] = decode_image(f"{where}, row {row}", image, shape)
                row += 1
        start = end
    return inputs, labels


def _check_columns(where: str, table: Any, image_column: str, label_column: str) -> None:
    import pyarrow as pa

    for column in (image_column, label_column):
        if column not in table.column_names:
            raise DataError(
                f"{where}: no column {column!r}, only {', '.join(table.column_names)}; is this another data set?"
            )
    image, label = table.schema.field(image_column).type, table.schema.field(label_column).type
    if not pa.types.is_struct(image) or image.get_field_index("bytes") < 0:
        raise DataError(
            f"{where}: column {image_column!r} is {image}, not struct<bytes, path>; store the encoded images in it"
        )
    if not pa.types.is_integer(label):
        raise DataError(f"{where}: column {label_column!r} is {label}, not an integer; store class numbers")


def _labels(where: str, column: Any, num_classes: int) -> np.ndarray:
    labels = column.to_pylist()
    for row, label in enumerate(labels):
        if label is None or not 0 <= label < num_classes:
            raise DataError(
                f"{where}, row {row}: label {label} is not in [0, {num_classes}); "
                f"correct it or choose the data set it belongs to"
            )
    return np.asarray(labels, dtype=np.int64)


def decode_image(where: str, encoded: bytes | None, shape: tuple[int, int, int], *, fit: bool = False) -> np.ndarray:
    """uint8 ``[C, H, W]`` of a PNG or JPEG file in memory; raises ``DataError`` with ``where``.

    With ``fit`` an image of another size or another number of channels becomes one of ``shape = (C, H, W)``: turned as
    its EXIF tag says, then made grey or colour (without transparency), then resized by Pillow's bilinear filter.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    channels, height, width = shape
    if encoded is None:
        raise DataError(f"{where}: no image bytes; embed the files, a path alone is not read")
    try:
        image: Image.Image = Image.open(io.BytesIO(encoded), formats=("PNG", "JPEG"))
        image.load()
        if fit:
            image = ImageOps.exif_transpose(image).convert(MODES[channels])
            image = image.resize((width, height), Image.Resampling.BILINEAR)
    except UnidentifiedImageError as error:
        raise DataError(f"{where}: not a readable image (neither PNG nor JPEG); fetch the file again") from error
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error and more for broken files
        raise DataError(f"{where}: not a readable image ({error}); fetch the file again") from error
    if image.size != (width, height) or image.mode != MODES[channels]:
        raise DataError(
            f"{where}: a {image.width}x{image.height} {image.mode} image, not {width}x{height} "
            f"{MODES[channels]}; is this another data set?"
        )
    pixels = np.asarray(image)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
