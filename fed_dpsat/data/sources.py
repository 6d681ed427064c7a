"""Sources of image data sets: a folder of Parquet files, a torchvision root, or the network.

=============== ==================================================== =================
``data_source`` ``data_path``                                        network
=============== ==================================================== =================
parquet         folder with train-*.parquet and test-*.parquet in    never
                it or below it, as ``hf download`` writes them
torchvision     root of ``torchvision.datasets``                     never
download        the same; missing files are downloaded into it       if files are missing
hub             not used; the Hub has its own cache (``HF_HOME``)    yes
=============== ==================================================== =================

Every source gives the same uint8 arrays and uses the same cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from fed_dpsat.data._torchvision import read_split
from fed_dpsat.data.cache import Arrays, cached, fingerprint
from fed_dpsat.data.dataset import Dataset, Examples
from fed_dpsat.data.decode import decode_images
from fed_dpsat.errors import DataError

SPLITS = ("train", "test")
Split = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class ImageSource:
    """One image data set and its names on the Hub and in torchvision."""

    name: str
    class_names: tuple[str, ...]
    shape: tuple[int, int, int]  # (C, H, W)
    mean: tuple[float, ...]  # per channel, of pixels scaled to 0..1
    std: tuple[float, ...]
    hub_repo: str
    hub_config: str | None = None  # None: the repository has one configuration
    image_column: str = "image"
    label_column: str = "label"
    torchvision_class: str
    torchvision_files: tuple[str, ...]  # below the root; all are needed


def load(source: ImageSource, data_source: str, data_path: str, cache_dir: str) -> Dataset:
    """The data set ``source`` from ``data_source``, decoded into ``cache_dir`` at the first call.

    Raises ``DataError`` for an unknown ``data_source`` and for data that is missing or damaged.
    """
    if data_source not in SOURCES:
        raise DataError(
            f"data_source={data_source!r} is not one of {', '.join(SOURCES)}; "
            f"--set data_source=download fetches {source.name}"
        )
    if not data_path and data_source != "hub":
        raise DataError(f"data_path='' is empty, but data_source={data_source!r} needs a folder; --set data_path=DIR")
    root = Path(data_path).expanduser().absolute()
    files, read = SOURCES[data_source](source, root)
    key = fingerprint({**dataclasses.asdict(source), "data_source": data_source}, files)
    folder = Path(cache_dir).expanduser().absolute() / f"{source.name}-{key}"
    arrays = cached(folder, partial(_read_all, read))
    splits = {
        split: Examples(
            inputs=arrays[f"{split}_inputs"], labels=arrays[f"{split}_labels"], mean=source.mean, std=source.std
        )
        for split in SPLITS
    }
    return Dataset(name=source.name, train=splits["train"], test=splits["test"], class_names=source.class_names)


def _read_all(read: Callable[[str], Split]) -> Arrays:
    arrays = {}
    for split in SPLITS:
        arrays[f"{split}_inputs"], arrays[f"{split}_labels"] = read(split)
    return arrays


def _parquet(source: ImageSource, root: Path) -> tuple[list[Path], Callable[[str], Split]]:
    files = {split: _parquet_files(source, root, split) for split in SPLITS}

    def read(split: str) -> Split:
        import pyarrow as pa  # type: ignore[import-untyped]
        import pyarrow.parquet as pq  # type: ignore[import-untyped]

        tables = []
        for file in files[split]:
            try:
                tables.append((str(file), pq.read_table(file, partitioning=None)))
            except (pa.ArrowException, OSError) as error:
                raise DataError(
                    f"{file}: not a readable Parquet file ({error}); fetch it again: {_hf_download(source, root)}"
                ) from error
        return _decode(source, tables)

    return [file for split in SPLITS for file in files[split]], read


def _parquet_files(source: ImageSource, root: Path, split: str) -> list[Path]:
    pattern = f"{split}-*.parquet"
    found = sorted(
        file for file in root.rglob(pattern) if not any(part.startswith(".") for part in file.relative_to(root).parts)
    )
    of_config = [file for file in found if source.hub_config in file.relative_to(root).parts]
    files = of_config or found
    if not files:
        raise DataError(
            f"data_path={str(root)!r}: no {pattern} of {source.name} in it or below it; "
            f"{_hf_download(source, root)}, or --set data_source=download"
        )
    if len(folders := sorted({str(file.parent) for file in files})) > 1:
        raise DataError(
            f"data_path={str(root)!r}: {pattern} is in more than one folder "
            f"({', '.join(folders)}); --set data_path to that of {source.name}"
        )
    return files


def _hf_download(source: ImageSource, root: Path) -> str:
    return f"hf download {source.hub_repo} --repo-type dataset --local-dir {root}"


def _hub(source: ImageSource, root: Path) -> tuple[list[Path], Callable[[str], Split]]:
    import datasets  # type: ignore[import-untyped]

    try:
        loaded = datasets.load_dataset(source.hub_repo, name=source.hub_config, keep_in_memory=False)
        splits = {split: loaded[split] for split in SPLITS}
    except Exception as error:  # the Hub's client raises its own, httpx's and OSError
        raise DataError(
            f"data_source='hub': cannot load {source.hub_repo} ({error}); check the network, or "
            f"fetch it elsewhere: {_hf_download(source, Path('DIR'))}, then "
            f"--set data_source=parquet --set data_path=DIR"
        ) from error
    files = [Path(entry["filename"]) for split in SPLITS for entry in splits[split].cache_files]
    return files, lambda split: _decode(source, [(f"{source.hub_repo} ({split})", splits[split].data.table)])


def _decode(source: ImageSource, tables: list[tuple[str, object]]) -> Split:
    return decode_images(
        tables,
        image_column=source.image_column,
        label_column=source.label_column,
        shape=source.shape,
        num_classes=len(source.class_names),
    )


def _torchvision(
    source: ImageSource,
    root: Path,
    *,
    download: bool = False,
) -> tuple[list[Path], Callable[[str], Split]]:
    files = [root / file for file in source.torchvision_files]
    missing = [file for file in files if not file.is_file()]
    if missing and not download:
        raise DataError(
            f"data_path={str(root)!r}: no {missing[0].relative_to(root)}, which torchvision's "
            f"{source.torchvision_class} needs; --set data_source=download fetches it"
        )
    if missing:
        for split in SPLITS:
            read_split(source.torchvision_class, root, train=split == "train", download=True)

    def read(split: str) -> Split:
        inputs, labels = read_split(source.torchvision_class, root, train=split == "train", download=False)
        if inputs.dtype != np.uint8 or inputs.shape[1:] != source.shape:
            raise DataError(
                f"data_path={str(root)!r}: {source.torchvision_class} holds {inputs.dtype} "
                f"{inputs.shape[1:]}, not uint8 {source.shape}; delete it and "
                f"--set data_source=download"
            )
        return inputs, labels

    return files, read


SOURCES: Mapping[str, Callable[[ImageSource, Path], tuple[list[Path], Callable[[str], Split]]]] = {
    "parquet": _parquet,
    "torchvision": _torchvision,
    "download": partial(_torchvision, download=True),
    "hub": _hub,
}
