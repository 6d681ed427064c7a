"""What a run depends on beside its settings: files of one's own, and what its data and frozen layers hold.

=========================== ==================================================================== =========
input                       told apart by                                                        kept
=========================== ==================================================================== =========
a plug-in                   its file and those of one's own that it imports (``sources``)        copies
``client_table``            the file                                                             a copy
``start_from``              the file
data set                    classes, labels and examples; of more than 256 MiB evenly many rows
partition                   the examples of each client
layers that nobody trains   their values, and buffers
optimizer from Python       its fields, if it is a dataclass
=========================== ==================================================================== =========

Loggers are not among them: they change nothing, and may be others in a run that is resumed.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fed_dpsat.client.build import Experiment
from fed_dpsat.client.given import FROM_PYTHON
from fed_dpsat.errors import SettingError
from fed_dpsat.models.pretrained import weights_file
from fed_dpsat.run.sources import plugin_sources
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.step.optimizers.chain import split_chain

PLUGINS = ("dataset", "partition", "model", "optimizer", "base_optimizer", "clipping", "strategy", "attack")
CONTENTS = {
    "dataset": "the examples",
    "partition": "the clients' examples",
    "model": "its layers that are not trained",
}


@dataclass(frozen=True, kw_only=True)
class Input:
    """One input: what it ``is`` and its digest; a file has a ``path``, and one that is to be kept its ``copy``."""

    setting: str
    name: str
    sha256: str
    path: str = ""
    copy: str = ""


def inputs_of(experiment: Experiment) -> list[Input]:
    """All inputs of the run, each file once."""
    return [*_files(experiment), *_contents(experiment)]


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file; empty if there is none that can be read."""
    try:
        stat = Path(path).stat()
        return _digest(str(path), stat.st_size, stat.st_mtime_ns)
    except OSError:
        return ""


@functools.lru_cache(maxsize=256)  # a sweep asks for the same files again and again
def _digest(path: str, size: int, changed: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def changed(recorded: Iterable[Input]) -> Input | None:
    """The first of the ``recorded`` files that is there with another content."""
    return next((one for one in recorded if one.path and file_digest(one.path) not in ("", one.sha256)), None)


def difference(recorded: Sequence[Input], now: Sequence[Input]) -> Input | None:
    """The first input that is not in both, wherever files lie: one that was changed, has gone, or is new."""
    before, after = (Counter((one.name, one.sha256) for one in inputs) for inputs in (recorded, now))
    return next((one for one in (*recorded, *now) if before[one.name, one.sha256] != after[one.name, one.sha256]), None)


def refused(one: Input, where: Path, *, setting: str, value: object, again: str) -> SettingError:
    """The error for an input that is another one than that of the run in ``where``."""
    what = one.path or one.name
    mend = f"put back {where / one.copy}" if one.copy else "put it back" if one.path else f"give the same {one.setting}"
    return SettingError(
        setting, value, f"possible: {what} ({one.setting}) is not what {where} began with", f"{mend}, or {again}"
    )


def _files(experiment: Experiment) -> Iterator[Input]:
    config, seen = experiment.config, set[Path]()
    for setting in PLUGINS:
        for plugin in _names(config, setting):
            for name, path in plugin_sources(plugin).items():
                if path not in seen:
                    seen.add(path)
                    digest = file_digest(path)
                    copy = f"inputs/{digest[:8]}-{name.replace('/', '.')}"
                    yield Input(setting=setting, name=name, sha256=digest, path=str(path), copy=copy)
    if config.client_table:
        digest = file_digest(config.client_table)
        copy = f"inputs/{digest[:8]}-{Path(config.client_table).name}"
        yield Input(setting="client_table", name="client_table", sha256=digest, path=config.client_table, copy=copy)
    if config.start_from:
        weights = str(weights_file(config.start_from))
        yield Input(setting="start_from", name="start_from", sha256=experiment.start.sha256, path=weights)


def _names(config: RunConfig, setting: str) -> list[str]:
    """The plug-ins that ``setting`` names; an object from Python is none."""
    value = str(getattr(config, setting))
    names = split_chain(value) if setting == "base_optimizer" else [value]
    return [] if value.endswith(FROM_PYTHON) else names


def _contents(experiment: Experiment) -> Iterator[Input]:
    for setting, digest in experiment.contents.items():
        yield Input(setting=setting, name=CONTENTS[setting], sha256=digest)
    fields = repr(experiment.optimizer)
    given = experiment.config.optimizer.endswith(FROM_PYTHON) and dataclasses.is_dataclass(experiment.optimizer)
    if given and " at 0x" not in fields:  # an address is another in each process
        yield Input(setting="optimizer", name="its fields", sha256=hashlib.sha256(fields.encode()).hexdigest())
