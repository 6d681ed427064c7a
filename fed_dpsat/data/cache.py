"""Decoded arrays on disk, memory-mapped so that all processes of a machine share one copy.

A cache is a folder ``cache_dir/<name>-<fingerprint>/`` of ``.npy`` files and a ``meta.json``. The fingerprint covers
everything that the result depends on: paths, sizes and times of the source files, the columns, shape and classes, and
the version of Pillow. A process writes the folder under another name and renames it at the end; the second process of a
race drops its copy. If the sizes of the files differ from ``meta.json``, the cache is built again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fed_dpsat.errors import DataError

FORMAT = 1  # part of the fingerprint: raise it with each change of the layout
Arrays = Mapping[str, np.ndarray]


def fingerprint(decoding: Mapping[str, object], files: Sequence[Path]) -> str:
    """16 hex digits that change with ``decoding`` (JSON types) and with the absolute path, size or times of a file.

    Both times count: an archive or a copy can set the time of modification of another file of equal size.
    """
    stats = [(str(file.absolute()), s.st_size, s.st_mtime_ns, s.st_ctime_ns) for file in files for s in [file.stat()]]
    decided = [FORMAT, version("pillow"), dict(decoding), stats]
    return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()[:16]


def cached(folder: Path, decode: Callable[[], Arrays]) -> dict[str, Tensor]:
    """The arrays of ``decode``, memory-mapped from ``folder``; the first call writes the folder.

    Raises ``DataError`` if ``folder`` cannot be written, and the errors of ``decode``, without leaving a folder.
    """
    return cached_parts(folder, lambda: [decode()])


def cached_parts(folder: Path, parts: Callable[[], Iterable[Arrays]]) -> dict[str, Tensor]:
    """``cached`` for arrays that come in parts: those of one name are joined along their first axis.

    A part is on disk before the next one is asked for, so memory holds one part. The parts of a name have one dtype and
    the same shape but for the first axis.
    """
    arrays = _open(folder)
    if arrays is None:
        _store(folder, parts)
        arrays = _open(folder)
    if arrays is None:
        raise DataError(f"{folder} changed during the write; delete it and start again")
    return arrays


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{str(folder.parent)!r}, the folder of decoded data, cannot be written ({error}); choose another one: "
            "cache_dir of a run, folder in the policy of a device"
        ) from error


def _open(folder: Path) -> dict[str, Tensor] | None:
    """The arrays of a complete cache, else None."""
    try:
        sizes: dict[str, int] = json.loads((folder / "meta.json").read_text())["sizes"]
        if any((folder / name).stat().st_size != size for name, size in sizes.items()):
            return None
        # Copy-on-write, because torch warns about read-only arrays. Processes share pages until they write, and a
        # write never reaches the file.
        return {Path(name).stem: torch.from_numpy(np.load(folder / name, mmap_mode="c")) for name in sizes}
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):  # no JSON of ours, no .npy
        return None


def _store(folder: Path, parts: Callable[[], Iterable[Arrays]]) -> None:
    with contextlib.ExitStack() as stack:
        with _writing(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            temporary = stack.enter_context(tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-"))
            whole = Path(temporary) / "whole"
            whole.mkdir()
        files: dict[str, _Growing] = {}
        for part in parts():
            with _writing(folder):
                for name, array in part.items():
                    if name not in files:
                        files[name] = stack.enter_context(_Growing(whole / f"{name}.npy", array))
                    files[name].append(array)
        with _writing(folder):
            _finish(folder, whole, [file.finish() for file in files.values()])


def _finish(folder: Path, whole: Path, files: Sequence[Path]) -> None:
    (whole / "meta.json").write_text(json.dumps({"sizes": {file.name: file.stat().st_size for file in files}}))
    if _open(folder) is None:
        with contextlib.suppress(FileNotFoundError):  # usually no folder is there
            folder.rename(whole.parent / "broken")
    try:
        whole.rename(folder)
    except OSError:
        if _open(folder) is None:
            raise  # not a lost race: the folder is still missing or incomplete


class _Growing(contextlib.AbstractContextManager["_Growing"]):
    """One ``.npy`` file that grows along its first axis; NumPy leaves room for that in the header."""

    def __init__(self, path: Path, first: np.ndarray) -> None:
        self.path, self.rows, self.form = path, 0, (first.dtype, first.shape[1:])
        self.file = path.open("wb")
        self._header()

    def append(self, array: np.ndarray) -> None:
        if (array.dtype, array.shape[1:]) != self.form:
            raise ValueError(f"{self.path.name}: a part of {array.dtype} {array.shape} follows {self.form}")
        self.file.write(np.ascontiguousarray(array).data)
        self.rows += len(array)

    def finish(self) -> Path:
        """Write the number of rows, and close the file."""
        self.file.seek(0)
        self._header()
        self.file.close()
        return self.path

    def _header(self) -> None:
        dtype, rest = self.form
        descr = np.lib.format.dtype_to_descr(dtype)
        header = {"descr": descr, "fortran_order": False, "shape": (self.rows, *rest)}
        np.lib.format.write_array_header_1_0(self.file, header)

    def __exit__(self, *error: object) -> None:
        self.file.close()
