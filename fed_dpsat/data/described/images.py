"""Images, from folders, Parquet and ``datasets``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from fed_dpsat.data.dataset import Dataset, Examples
from fed_dpsat.errors import SettingError


def images(
    data_source: str,
    data_path: str,
    cache_dir: str,
    image_size: int | Sequence[int] = 0,
    channels: int = 3,
    test_path: str = "",
    test_share: float = 0.0,
    input_columns: str = "",
    label_column: str = "",
    user_column: str = "",
    class_names: str = "",
    columns_file: str = "",
    seed: int = 0,
    task: str = "classification",
    columns: dict[str, Any] | None = None,
    fit: bool = False,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    label_separator: str = ";",
    labels_like: str = "",
    **where: Any,
) -> Dataset:
    """Your own images, from a folder for each class, Parquet or datasets.

    The inputs are uint8 ``[N, C, H, W]`` of the declared ``channels`` (1 grey, 3 colour) and ``image_size``; another
    image is refused, or converted with ``fit`` (``fed_dpsat.data.decode``). ``mean`` and ``std`` per channel are those
    of pixels scaled to 0..1, and 0.5 if they are not declared. ``where`` are arguments of ``Place``, and
    ``labels_like`` is the task whose labels a task of your own takes.

    Raises ``SettingError`` for a declaration, and ``DataError`` with file and row for what is not as declared.
    """
    from fed_dpsat.data.described.columns import declared
    from fed_dpsat.data.described.encode_images import ImageEncoder, shape_of
    from fed_dpsat.data.described.labels import Labels
    from fed_dpsat.data.described.load import both_splits, examples, load
    from fed_dpsat.data.described.place import Place, check_types
    from fed_dpsat.data.names import split_names

    check_types(bool, fit=fit)
    shape = shape_of(image_size, channels)
    settings = {"data_source": data_source, "data_path": data_path, "test_path": test_path, "content": "image"}
    place = Place.of(where, test_share=test_share, seed=seed, **settings)
    names = split_names(input_columns) or ("image",)
    if len(names) > 1:
        raise SettingError("input_columns", input_columns, "one column of images", "name one")
    column = label_column or ("label" if data_source == "folder" else "")
    labels = Labels.of(labels_like or task, column, class_names, declared(columns, columns_file), label_separator)
    encoder = ImageEncoder(column=names[0], labels=labels, shape=shape, fit=fit)
    arrays = load(
        "images",
        place,
        wanted=encoder.wanted,
        encoder=encoder,
        decided=dataclasses.asdict(encoder),
        user_column=user_column,
        cache_dir=cache_dir,
    )
    scale = {"mean": tuple(mean) or (0.5,) * channels, "std": tuple(std) or (0.5,) * channels}

    def split(name: str) -> Examples:
        of = {"inputs": arrays[f"{name}_inputs"], "labels": arrays[f"{name}_labels"]}
        return examples(arrays, name, user_column, **of, **scale)

    return Dataset(name="images", **labels.of_dataset, **both_splits(place, split))
