"""The TOML file of a sweep, with a base, a grid, and settings to tune; checked completely before the first run.

::

    base = "digits_dpsat.toml"         # a configuration; or a [base] table of settings; its task and metric are those
                                       # of the sweep. Paths are relative to the file in which they are

    [grid]                             # every combination is a cell
    target_epsilon = [1, 3, 8]         # an axis: a setting and its values
    seed = [0, 1, 2]                   # each cell runs with each seed

    [grid.method]                      # an axis of named bundles of settings
    dp-sgd = { optimizer = "dp-sgd" }
    dp-sat = { optimizer = "dp-sat" }

    [tune]                             # searched for each cell, on a validation split of the training examples
    validation_share = 0.1
    seeds = [100, 101]                 # none of the seeds of the grid
    lr = [1, 2, 4]                     # for every cell

    [tune.dp-sat]                      # only for the cells of this bundle (or value)
    rho = [0, 0.03, 0.1]
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from fed_dpsat.errors import SettingError
from fed_dpsat.lab.sweep.spec import DEFAULTS, KNOWN, Axis, Spec, SweepError
from fed_dpsat.left import successor
from fed_dpsat.run.metric import metrics_of, task_of
from fed_dpsat.settings.flat import SPECS, parse_overrides
from fed_dpsat.settings.paths import beside
from fed_dpsat.settings.values import Scalar

NOT_IN_BASE = {
    "out": "name the folder with --out",
    "resume": "run the same sweep again to resume it",
    "validation_share": "set it in [tune]",
}
NOT_IN_GRID = {**NOT_IN_BASE, "workers": "use --workers"}
NOT_IN_GRID |= dict.fromkeys(("ray_address", "device", "gpus_per_worker"), "set it in the base")
NOT_IN_GRID |= dict.fromkeys(("task", "metric"), "set it in the base, because a table has one metric")
TUNE_OWN = ("validation_share", "seeds")
COLUMNS = (
    *("stage", "split", "n", "failed", "chosen", "at_edge", "accuracy", "loss", "epsilon", "rounds", "seconds"),
    *("status", "error", "folder"),
)
"""Columns of the tables, which cannot be names of axes; nor can the metrics of the task."""


def read_spec(path: Path, overrides: Iterable[str] = (), only: Iterable[str] = ()) -> Spec:
    """The sweep in a TOML file; ``overrides`` (``key=value``) replace values of its base.

    Each of ``only`` (``AXIS=LABEL,LABEL``) keeps these labels of an axis. Raises ``InputError`` for any mistake.
    """
    raw = _read(path)
    _known("table", raw, ("base", "grid", "tune"), str(path))
    base = {**_base(raw.get("base", {}), path), **parse_overrides(overrides)}
    for key, instead in NOT_IN_BASE.items():
        if key in base and base[key] != DEFAULTS[key]:
            raise SweepError(f"{path}: base sets {key}; {instead}")
    grid = raw.get("grid", {})
    if not isinstance(grid, dict) or not grid:
        raise SweepError(f"{path}: [grid] is empty; give at least one axis, for instance seed = [0, 1, 2]")
    columns = {*COLUMNS, *(metric.name for metric in metrics_of(task_of(base)))}
    axes = {name: _axis(name, values, columns, path.parent) for name, values in grid.items() if name != "seed"}
    seeds = _seeds("grid.seed", grid.get("seed", [base.get("seed", DEFAULTS["seed"])]))
    tune = _tune(raw.get("tune", {}), axes, path.parent)
    spec = Spec(base=base, axes=_only(axes, only), seeds=seeds, **tune)
    if both := set(spec.seeds) & set(spec.tune_seeds):
        raise SweepError(f"seed {min(both)} is in grid.seed and in tune.seeds; use other seeds for the tuning")
    spec.check()
    return spec


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise SettingError("sweep", str(path), "a readable file", error.strerror or "check the path") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingError("sweep", str(path), "valid TOML", str(error)) from None


def _base(base: object, path: Path) -> dict[str, Any]:
    if isinstance(base, str):
        path = path.parent / base
        base = _read(path)
    if not isinstance(base, dict):
        raise SweepError(f"{path}: base is {base!r}; give the path of a configuration, or a [base] table of settings")
    _known("setting", base, KNOWN, "base")
    return _beside(base, path.parent)


def _axis(name: str, values: object, columns: Collection[str], folder: Path) -> Axis:
    where = f"grid.{name}"
    if isinstance(values, dict):
        if name in columns:
            raise SweepError(f"{where}: {name!r} is a column of the tables of results; give the axis another name")
        if name in KNOWN:
            raise SweepError(f"{where} is a table of bundles, but {name} is a setting; give the axis another name")
        for label, bundle in values.items():
            if not isinstance(bundle, dict):
                raise SweepError(f"{where}.{label} is {bundle!r}, not a table of settings: {{ lr = 2.0 }}")
            _known("setting", bundle, KNOWN, f"{where}.{label}")
            _allowed(bundle, f"{where}.{label}")
        axis: Axis = {label: _beside(bundle, folder) for label, bundle in values.items()}
    else:
        _known("setting", [name], KNOWN, "grid", "an axis of named bundles is a table, [grid.NAME]")
        _allowed([name], "grid")
        values = _list(where, values)
        axis = {_label(value): _beside({name: value}, folder) for value in values}
        if len(axis) < len(values):
            raise SweepError(f"{where} = {values} has a value twice; remove one")
    if not axis:
        raise SweepError(f"{where} is empty; give it a value, or leave it out")
    return axis


def _only(axes: Mapping[str, Axis], only: Iterable[str]) -> Mapping[str, Axis]:
    for choice in only:
        name, separator, labels = choice.partition("=")
        if not separator:
            raise SettingError("--only", choice, "of the form AXIS=LABEL,LABEL", "for example --only method=dp-sgd")
        _known("name of an axis", [name], axes, "--only")
        wanted = labels.split(",")
        _known(f"label of grid.{name}", wanted, axes[name], "--only")
        axes = {**axes, name: {label: axes[name][label] for label in axes[name] if label in wanted}}
    return axes


def _tune(table: object, axes: Mapping[str, Axis], folder: Path) -> dict[str, Any]:
    if not table:
        return {}
    if not isinstance(table, dict):
        raise SweepError(f"tune is {table!r}, not a table; see `fed-dpsat sweep --help`")
    labels = [label for axis in axes.values() for label in axis]
    common = {k: v for k, v in table.items() if not isinstance(v, dict) and k not in TUNE_OWN}
    tables = {k: v for k, v in table.items() if isinstance(v, dict)}
    _known("bundle or value of the grid", tables, labels, "tune")
    for label in tables:
        if labels.count(label) > 1:
            raise SweepError(f"tune.{label}: {label} is on several axes of the grid; give them different names")
    for where, found in (("tune", common), *((f"tune.{label}", of) for label, of in tables.items())):
        _known("setting", found, KNOWN, where)
        _allowed(found, where)
    if "seed" in [*common, *(key for of in tables.values() for key in of)]:
        raise SweepError("tune: seed is not tuned; give the seeds of the search as tune.seeds")
    if not common and not tables:
        raise SweepError(
            "[tune] names nothing to search; give a setting and its values, lr = [1, 2, 4], or leave it out"
        )
    share = table.get("validation_share", 0.1)
    if not isinstance(share, int | float) or isinstance(share, bool) or not 0 < share < 1:
        raise SettingError("tune.validation_share", share, "in (0, 1)", "0.1 is usual")
    if "seeds" not in table:
        raise SweepError("[tune] has no seeds; give seeds that are not in the grid, seeds = [100, 101]")
    return {
        "tune": _searched("tune", common, folder),
        "tune_of": {label: _searched(f"tune.{label}", of, folder) for label, of in tables.items()},
        "tune_seeds": _seeds("tune.seeds", table["seeds"]),
        "validation_share": float(share),
    }


def _searched(where: str, table: Mapping[str, object], folder: Path) -> dict[str, list[Scalar]]:
    lists = {key: _list(f"{where}.{key}", values) for key, values in table.items()}
    return {key: [_beside({key: value}, folder)[key] for value in values] for key, values in lists.items()}


def _beside(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    return beside(settings, folder, SPECS.values())


def _list(where: str, values: object) -> list[Scalar]:
    if not isinstance(values, list) or not all(isinstance(value, bool | int | float | str) for value in values):
        raise SweepError(f"{where} is {values!r}, not a list of values: [1, 2, 4]")
    if not values:
        raise SweepError(f"{where} is empty; give it a value, or leave it out")
    if len({(type(v) is bool, v) for v in values}) < len(values):
        raise SweepError(f"{where} = {values} has a value twice; remove one")
    return values


def _seeds(where: str, values: object) -> tuple[int, ...]:
    seeds = _list(where, values)
    if not all(isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0 for seed in seeds):
        raise SweepError(f"{where} = {seeds} are not all integers of at least 0; correct them")
    return tuple(int(seed) for seed in seeds)


def _known(what: str, names: Iterable[str], known: Iterable[str], where: str, otherwise: str = "") -> None:
    known = list(known)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {', '.join(near)}?" if near else otherwise or f"choose of {', '.join(known[:12])}"
            raise SweepError(f"{where}: {name!r} is not a {what}; {successor(name) or hint}")


def _allowed(names: Iterable[str], where: str) -> None:
    for name in names:
        if name in NOT_IN_GRID:
            raise SweepError(f"{where} sets {name}; {NOT_IN_GRID[name]}")


def _label(value: Scalar) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
