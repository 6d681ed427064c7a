"""Tables of numbers and categories, from CSV, JSON lines, Parquet and ``datasets``."""

from __future__ import annotations

import dataclasses
from typing import Any

from fed_dpsat.data.dataset import Dataset, Examples


def table(
    data_source: str,
    data_path: str,
    cache_dir: str,
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
    encoding: str = "one-hot",
    label_separator: str = ";",
    labels_like: str = "",
    statistics_from: str = "",
    raw: bool = False,
    **where: Any,
) -> Dataset:
    """Your own table of numbers and categories, from CSV, JSON lines, Parquet or datasets.

    ``columns`` declares each column (``fed_dpsat.data.described.columns``), ``where`` are arguments of ``Place``, and
    ``labels_like`` is the task whose labels a task of your own takes.
    A folder of ``fed-dpsat stats``, ``statistics_from``, has the constants of those that it released. With ``raw`` a
    number is as it is in the file, two features: itself and whether it is missing.
    The inputs are ``input_columns``, or all declared columns but the labels: float32 ``[N, F]`` with
    ``encoding="one-hot"``, and with ``"codes"`` "numbers", float32 ``[N, F]``, and "categories", int64 ``[N, G]``.

    Raises ``SettingError`` for a declaration, and ``DataError`` with file and row for what is not as declared.
    """
    from fed_dpsat.data.described.columns import declared, unscaled
    from fed_dpsat.data.described.encode_table import TableEncoder
    from fed_dpsat.data.described.labels import Labels
    from fed_dpsat.data.described.load import both_splits, examples, load, sha256_of
    from fed_dpsat.data.described.place import Place, check_types

    settings = {"data_source": data_source, "data_path": data_path, "test_path": test_path, "content": "table"}
    place = Place.of(where, test_share=test_share, seed=seed, **settings)
    check_types(str, label_separator=label_separator, labels_like=labels_like)
    known = declared(columns, columns_file, statistics_from)
    labels = Labels.of(labels_like or task, label_column, class_names, known, label_separator)
    encoder = TableEncoder.of(input_columns, unscaled(known) if raw else known, labels, encoding)
    inputs = [dataclasses.asdict(column) for column in encoder.columns]
    arrays = load(
        "table",
        place,
        wanted=encoder.wanted,
        encoder=encoder,
        decided={
            "columns": inputs,
            "labels": dataclasses.asdict(labels),
            "encoding": encoding,
        },
        user_column=user_column,
        cache_dir=cache_dir,
    )
    encoder.report()
    width = arrays["train_inputs"].shape[1] if "train_inputs" in arrays else 0
    scale = {"mean": (0.0,) * width, "std": (1.0,) * width}  # columns are scaled one by one

    def split(name: str) -> Examples:
        several = {n: arrays[f"{name}_{n}"] for n in ("numbers", "categories") if f"{name}_{n}" in arrays}
        of: Any = {"inputs": several or arrays[f"{name}_inputs"], "labels": arrays[f"{name}_labels"], **scale}
        return examples(arrays, name, user_column, **of)

    constants = sha256_of(inputs, encoding, dataclasses.asdict(labels)["numbers"])
    return Dataset(name="table", declared=constants, **labels.of_dataset, **both_splits(place, split))
