"""The inputs of a run beside its settings: files of the user, and the contents of data and frozen layers.

=========================== ==================================================================== =========
input                       identified by                                                        stored
=========================== ==================================================================== =========
a plug-in                   its file and the user's files that it imports (``sources``)          copies
``client_table``            the file                                                             a copy
``columns_file``            the file                                                             a copy
``statistics_from``         its ``statistics.json``                                              a copy
``tokenizer``               its files
``start_from``              the file
data set                    classes, labels and examples; above 256 MiB, evenly spaced rows
partition                   the examples of each client
frozen layers               their values, and buffers
optimizer from Python       its fields, if it is a dataclass
=========================== ==================================================================== =========

Loggers are no inputs: they change nothing, and a resumed run may have other loggers.
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
from fed_dpsat.settings.data import BYTES
from fed_dpsat.step.optimizers.chain import split_chain

PLUGINS = (
    "dataset",
    "partition",
    "features",
    "model",
    "task",
    "optimizer",
    "base_optimizer",
    "clipping",
    "noise_mechanism",
    "strategy",
    "attack",
)
CONTENTS = {
    "dataset": "the examples",
    "partition": "the clients' examples",
    "model": "its frozen layers",
}


@dataclass(frozen=True, kw_only=True)
class Input:
    """One input and its digest; a file has a ``path``, and a file that the run stores has a ``copy``."""

    setting: str
    name: str
    sha256: str
    path: str = ""
    copy: str = ""


def inputs_of(experiment: Experiment) -> list[Input]:
    """All inputs of the run, each file once."""
    return [*_files(experiment), *_contents(experiment)]


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file; empty if it cannot be read."""
    try:
        stat = Path(path).stat()
        return _digest(str(path), stat.st_size, stat.st_mtime_ns)
    except OSError:
        return ""


@functools.lru_cache(maxsize=256)  # a sweep reads the same files for each run
def _digest(path: str, size: int, changed: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def changed(recorded: Iterable[Input]) -> Input | None:
    """The first of the ``recorded`` files that exists with another content."""
    return next((one for one in recorded if one.path and file_digest(one.path) not in ("", one.sha256)), None)


def difference(recorded: Sequence[Input], now: Sequence[Input]) -> Input | None:
    """The first input that is not in both lists: changed, missing or new; paths do not matter."""
    before, after = (Counter((one.name, one.sha256) for one in inputs) for inputs in (recorded, now))
    return next((one for one in (*recorded, *now) if before[one.name, one.sha256] != after[one.name, one.sha256]), None)


def refused(one: Input, where: Path, *, setting: str, value: object, again: str) -> SettingError:
    """The error for an input that differs from the input of the run in ``where``."""
    what = one.path or one.name
    remedy = f"restore {where / one.copy}" if one.copy else "restore it" if one.path else f"give the same {one.setting}"
    return SettingError(
        setting, value, f"possible: {what} ({one.setting}) has changed since {where} began", f"{remedy}, or {again}"
    )


def _files(experiment: Experiment) -> Iterator[Input]:
    config, seen = experiment.config, set[Path]()
    for setting in PLUGINS:
        for plugin in plugin_names(config, setting):
            for name, path in plugin_sources(plugin).items():
                if path not in seen:
                    seen.add(path)
                    digest = file_digest(path)
                    copy = f"inputs/{digest[:8]}-{name.replace('/', '.')}"
                    yield Input(setting=setting, name=name, sha256=digest, path=str(path), copy=copy)
    for setting in ("client_table", "columns_file"):
        if table := str(getattr(config, setting)):
            digest = file_digest(table)
            copy = f"inputs/{digest[:8]}-{Path(table).name}"
            yield Input(setting=setting, name=setting, sha256=digest, path=table, copy=copy)
    if config.statistics_from:
        released = f"{config.statistics_from}/statistics.json"
        digest = file_digest(released)
        copy = f"inputs/{digest[:8]}-statistics.json"
        yield Input(setting="statistics_from", name="statistics_from", sha256=digest, path=released, copy=copy)
    if config.tokenizer != BYTES:
        from fed_dpsat.data.described.tokenizer import tokenizer_files

        for file in tokenizer_files(config.tokenizer):
            yield Input(setting="tokenizer", name=file.name, sha256=file_digest(file), path=str(file))
    if config.start_from:
        weights = str(weights_file(config.start_from))
        yield Input(setting="start_from", name="start_from", sha256=experiment.start.sha256, path=weights)


def plugin_names(config: RunConfig, setting: str) -> list[str]:
    """The plug-ins that ``setting`` names; empty without one, and for an object from Python."""
    value = str(getattr(config, setting))
    names = split_chain(value) if setting == "base_optimizer" else [value]
    return [] if not value or value.endswith(FROM_PYTHON) else names


def _contents(experiment: Experiment) -> Iterator[Input]:
    for setting, digest in experiment.contents.items():
        yield Input(setting=setting, name=CONTENTS[setting], sha256=digest)
    fields = repr(experiment.optimizer)
    given = experiment.config.optimizer.endswith(FROM_PYTHON) and dataclasses.is_dataclass(experiment.optimizer)
    if given and " at 0x" not in fields:  # an address differs between processes
        yield Input(setting="optimizer", name="its fields", sha256=hashlib.sha256(fields.encode()).hexdigest())
