"""The files of a data set, each with its split and a reader."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from fed_dpsat.data.described.chunks import Chunk
from fed_dpsat.data.described.place import REMEDY, Place
from fed_dpsat.data.described.readers import IMAGES, READERS, SUFFIXES, Wanted, read_dataset, read_folder
from fed_dpsat.errors import DataError, SettingError

Part = tuple[str | None, list[Path], Callable[[Wanted], Iterator[Chunk]]]
"""The split, or None if each row has its own; files; and what reads the wanted columns of them."""


def parts_of(place: Place) -> list[Part]:
    """All parts of the data set. Raises ``DataError`` for a path that does not exist and a split without a file."""
    split = None if place.test_share or place.split_column else "train"
    if place.data_source == "hub":
        return _of_datasets(place, split, _loaded_hub(place), place.hub_repo)
    find = {"folder": _folder, "disk": _disk}.get(place.data_source, _files)
    found = find(place, split, _path(place, "data_path"))
    if place.test_path:
        found += find(place, "test", _path(place, "test_path"))
    seen: set[Path] = set()
    for file in (file for _, files, _ in found for file in files):
        if file in seen:
            raise DataError(f"{file} is in data_path and in test_path; name apart what is private and what is public")
        seen.add(file)
    for name, begin in (("train", place.train_split), ("test", place.test_split)):
        if not place.by_name or any(split == name for split, _, _ in found):
            continue
        raise DataError(f"data_path={place.data_path!r}: the name of no file or folder begins with {begin!r}; {REMEDY}")
    return found


def _path(place: Place, setting: str) -> Path:
    path = Path(value := getattr(place, setting)).expanduser().absolute()
    if not value or not path.exists():
        raise DataError(f"{setting}={value!r} does not exist; set {setting} to a file or folder")
    return path


def _below(root: Path) -> list[Path]:
    """The files below ``root``, without hidden ones and those in hidden folders; or ``root``, if it is a file."""
    if root.is_file():
        return [root]
    inside = (file.relative_to(root) for file in root.rglob("*") if file.is_file())
    return sorted(root / file for file in inside if not any(part.startswith(".") for part in file.parts))


def _named(place: Place, split: str | None, root: Path, file: Path) -> str | None:
    """The split of ``file``; raises ``DataError`` for a file of the test split that another rule would mix in."""
    if file == root:
        return split
    names = (file.name, file.relative_to(root).parts[0])
    found = next((of for name in names if (of := place.split_of(name))), None)
    if found == "test" and place.test_share:
        raise DataError(
            f"{file} has the name of a test split, which test_share={place.test_share:g} would mix; unset it"
        )
    return found if place.by_name else split


def _files(place: Place, split: str | None, root: Path) -> list[Part]:
    suffixes = SUFFIXES[place.data_source]
    files = [file for file in _below(root) if file == root or file.name.lower().endswith(suffixes)]
    if not files:
        raise DataError(f"{root}: no name of a file ends with {', '.join(suffixes)}; check data_source and data_path")
    if place.by_name and files == [root]:
        raise DataError(f"data_path={place.data_path!r} is one file; {REMEDY}")
    parts: list[Part] = []
    for file in files:
        read = READERS[place.data_source]
        if place.data_source == "csv":
            read = partial(read, delimiter="\t" if ".tsv" in file.suffixes else place.delimiter)
        if (of := _named(place, split, root, file)) or not place.by_name:
            parts.append((of, [file], partial(read, file)))
    return parts


def _folder(place: Place, split: str | None, root: Path) -> list[Part]:
    """Files of a folder: by class below the folder of a split, or below ``root``."""
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; check data_source, data_path and test_path")
    bases: dict[tuple[str | None, Path], list[Path]] = {}
    for file in _below(root):
        if place.content == "image" and file.suffix.lower() not in IMAGES:
            raise DataError(f"{file} is not one of {', '.join(IMAGES)}; convert it, or remove it from the folder")
        of = _named(place, split, root, file)
        counts = place.content == "image" or file.name.endswith(place.suffix)
        if counts and (of or not place.by_name):
            in_split = place.by_name and file.parent != root
            base = root / file.relative_to(root).parts[0] if in_split else root
            bases.setdefault((of, base), []).append(file)
    if not bases:
        ends = ", ".join(IMAGES) if place.content == "image" else f"{place.suffix} (suffix in dataset_args)"
        raise DataError(f"{root}: no name of a file of the splits ends with {ends}; {REMEDY}")
    return [(of, files, partial(_read_folder, place, base, files)) for (of, base), files in bases.items()]


def _read_folder(place: Place, base: Path, files: list[Path], wanted: Wanted) -> Iterator[Chunk]:
    if "label" in wanted and (loose := next((file for file in files if file.parent == base), None)):
        raise DataError(f"{loose} is in no folder of a class; move it into the folder of its class, or remove it")
    return read_folder(base, files, place.content, place.per_line)


def _disk(place: Place, split: str | None, root: Path) -> list[Part]:
    import datasets  # type: ignore[import-untyped]

    try:
        loaded = datasets.load_from_disk(str(root))
    except Exception as error:  # FileNotFoundError, or an error of Arrow or JSON
        raise DataError(f"{root}: no folder of datasets' save_to_disk ({error}); check data_path") from error
    parts = _of_datasets(place, split, loaded, str(root))
    return [(of, _below(root) if not place.by_name or of == "train" else [], read) for of, _, read in parts]


def _loaded_hub(place: Place) -> Any:
    import datasets

    if not place.hub_repo or place.test_path:
        name = "test_path" if place.test_path else "hub_repo"
        bound = "empty with data_source='hub'" if place.test_path else "the name of a data set on the Hub"
        raise SettingError(name, getattr(place, name), bound, "set hub_repo = 'owner/name' in dataset_args")
    try:
        return datasets.load_dataset(place.hub_repo, name=place.hub_config or None, keep_in_memory=False)
    except Exception as error:  # the Hub's client raises its own, httpx's and OSError
        raise DataError(
            f"data_source='hub': cannot load {place.hub_repo} ({error}); check the network, or fetch it elsewhere: "
            f"hf download {place.hub_repo} --repo-type dataset --local-dir DIR, then set data_source and data_path"
        ) from error


def _of_datasets(place: Place, split: str | None, loaded: Any, where: str) -> list[Part]:
    if not isinstance(loaded, dict):
        if place.by_name:
            raise DataError(f"{where} has no splits; {REMEDY}")
        return [(split, _cache_files(loaded), partial(read_dataset, where, loaded))]
    wanted = {"train": place.train_split, "test": place.test_split}
    if place.test_share and place.test_split in loaded:
        raise DataError(f"{where} has a split {place.test_split!r} of its own; unset test_share={place.test_share:g}")
    if not place.by_name:
        wanted = {"test" if split == "test" else "train": wanted["test" if split == "test" else "train"]}
    parts: list[Part] = []
    for of, name in wanted.items():
        if name not in loaded:
            _no_split(where, name, list(loaded))
        read = partial(read_dataset, f"{where} ({name})", loaded[name])
        parts.append((of if place.by_name else split, _cache_files(loaded[name]), read))
    return parts


def _cache_files(dataset: Any) -> list[Path]:
    return [Path(entry["filename"]) for entry in dataset.cache_files]


def _no_split(where: str, name: str, there: list[str]) -> NoReturn:
    raise DataError(f"{where}: no split {name!r}, only {', '.join(there)}; set train_split, test_split in dataset_args")
