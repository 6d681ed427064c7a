"""Encoded images as pixels of one shape, and their labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

from fed_dpsat.data.cache import Arrays
from fed_dpsat.data.decode import MODES, decode_image
from fed_dpsat.data.described.chunks import Chunk, Kind, is_bytes
from fed_dpsat.data.described.labels import Labels
from fed_dpsat.data.described.load import Encoder
from fed_dpsat.errors import DataError, SettingError


def shape_of(image_size: int | Sequence[int], channels: int) -> tuple[int, int, int]:
    """``(C, H, W)`` as declared; raises ``SettingError``."""
    sizes = [image_size, image_size] if isinstance(image_size, int) else image_size
    if not isinstance(sizes, Sequence) or len(sizes) != 2 or not all(type(s) is int and s > 0 for s in sizes):
        remedy = "declare it in dataset_args: image_size = 32, or image_size = [height, width]"
        raise SettingError("image_size", image_size, "the pixels of a side, or of both", remedy)
    if channels not in MODES:
        raise SettingError("channels", channels, f"one of {', '.join(map(str, MODES))}", "1 is grey and 3 is colour")
    return channels, int(sizes[0]), int(sizes[1])


@dataclass(frozen=True, kw_only=True)
class ImageEncoder(Encoder):
    """Images of ``column``, which holds the bytes of PNG or JPEG files, or a struct with these."""

    column: str
    labels: Labels
    shape: tuple[int, int, int]
    fit: bool

    @property
    def wanted(self) -> dict[str, Kind]:
        """The columns of images and labels."""
        return {self.column: "any", **self.labels.wanted}

    def encode(self, split: str, chunk: Chunk) -> Arrays:
        files = chunk.column(self.column)
        if pa.types.is_struct(files.type) and files.type.get_field_index("bytes") >= 0:
            files = pc.struct_field(files, "bytes")
        elif not is_bytes(files.type):
            raise DataError(
                f"{chunk.at(0)}: column {self.column!r} is {files.type}, not bytes or struct<bytes, path>; store the "
                "encoded images in it"
            )
        inputs = np.empty((len(chunk), *self.shape), dtype=np.uint8)
        labels = self.labels.encoded(chunk)
        for i, file in enumerate(files):
            inputs[i] = self._decoded(chunk.at(i), file.as_py())
        return {"inputs": inputs, "labels": labels}

    def _decoded(self, where: str, encoded: bytes | None) -> np.ndarray:
        try:
            return decode_image(where, encoded, self.shape, fit=self.fit)
        except DataError as error:
            if self.fit or "image, not" not in str(error):
                raise
            raise DataError(
                f"{error}; fit = true (in dataset_args, or in the policy of a device) converts and resizes all images"
            ) from None
