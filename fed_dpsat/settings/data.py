"""The group of settings of the data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from fed_dpsat.settings.paths import of_arguments, of_file, of_file_unless, of_plugin
from fed_dpsat.settings.values import refuse, setting

VERTICAL = ("vertical-even", "vertical-size")

BYTES = "bytes"
"""The ``tokenizer`` that is no path."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """Data: the place that examples come from, and their division among clients."""

    dataset: str = setting("digits", "data set, a short name or package.module:attribute", path=of_plugin)
    dataset_args: str = setting("", "arguments of the data set that no setting fills: site = 'north'")
    data_source: str = setting(
        "embedded", "place it comes from: embedded, parquet, torchvision, download, hub, csv, jsonl, folder, disk"
    )
    data_path: str = setting("", "folder or file of the data set, for the sources that have one", path=of_file)
    test_path: str = setting("", "folder or file of the test split, if it is not in data_path", path=of_file)
    test_share: float = setting(
        0.0,
        "share of the rows of your own files that is the test split, drawn from the seed; the test split is evaluated "
        "without noise, so these rows are not private",
        least=0,
        most=0.99,
    )
    input_columns: str = setting("", "columns of your own files that a model sees, by commas")
    label_column: str = setting("", "column of the labels in your own files; several by commas for several labels")
    user_column: str = setting(
        "",
        "columns of your own files that a natural partition can use, by commas; the first names the person of an "
        "example for privacy_unit=user",
    )
    class_names: str = setting("", "all classes in your own files, by commas")
    columns_file: str = setting("", "TOML file that declares the columns of a table", path=of_file)
    tokenizer: str = setting(
        BYTES,
        "tokenizer of your own texts: bytes, a folder of transformers, or tokenizer.json",
        path=of_file_unless(BYTES),
    )
    max_length: int = setting(256, "largest number of tokens of a text; the rest is cut off", least=1)
    features: str = setting(
        "",
        "public, frozen extractor whose features replace the inputs, a short name or package.module:attribute; each "
        "example is seen once, and cache_dir keeps the result; empty takes the inputs as they are",
        path=of_plugin,
    )
    features_args: str = setting(
        "", "arguments of the extractor that no setting fills: scales = 2, angles = 8", path=of_arguments
    )
    features_norm: str = setting(
        "",
        "normalisation of the features of an example by itself: group (GroupNorm without weights), unit (by the L2 "
        "norm); empty leaves them",
        choices=("", "group", "unit"),
    )
    features_groups: int = setting(27, "number of groups of channels of features_norm=group", least=1)
    features_sha256: str = setting(
        "", "SHA-256 of the extractor with its weights; a run writes its own, and refuses another extractor"
    )
    cache_dir: str = setting(
        "~/.cache/fed_dpsat",
        "folder for decoded data, shared by runs and workers",
        may_change=True,
        path=of_file,
    )
    validation_share: float = setting(
        0.0,
        "share of the training examples that replaces the test split in evaluation, to choose settings on; no client "
        "holds it; drawn from the seed",
        least=0,
        most=1,
    )
    num_clients: int = setting(10, "number of clients in the federation", least=1)
    partition: str = setting("iid", "way examples are dealt to clients", path=of_plugin)
    partition_by: str = setting(
        "",
        "column of the data set: natural gives a client one value of it; others use it in place of the class",
    )
    partition_args: str = setting(
        "", "arguments of the partition that no setting fills: group_size = 3", path=of_arguments
    )
    dirichlet_alpha: float = setting(
        0.3, "concentration of the dirichlet and inner-dirichlet partitions; small is skewed", above=0
    )
    classes_per_client: int = setting(
        2, "number of classes per client in the shards and pathological partitions", least=1
    )
    size_skew: float = setting(1.0, "inequality of client sizes in the size-skew partition", above=0)


def check(config: Data) -> None:
    """Raise ``SettingError`` for a partition whose clients share rows, and for settings of an absent extractor."""
    for spec in dataclasses.fields(Data):
        if spec.name.startswith("features_") and not config.features and getattr(config, spec.name) != spec.default:
            refuse(config, spec.name, "possible without features", "set features=scattering, or leave it out")
    if config.features_groups != 27 and config.features_norm != "group":
        bound = f"possible with features_norm={config.features_norm!r}"
        refuse(config, "features_groups", bound, "set features_norm=group")
    if config.partition in VERTICAL:
        refuse(
            config,
            "partition",
            "a division of examples",
            "it gives each client a part of every example, so the epsilons of all clients add up, and a run reports "
            "their maximum; `fed-dpsat list` has the others",
        )
