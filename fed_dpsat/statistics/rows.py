"""The rows that statistics are of: values as the file has them, each with its client."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fed_dpsat import plugins
from fed_dpsat.client.totals import Floats
from fed_dpsat.data.described.columns import ranges, specs_of
from fed_dpsat.data.federated import Federated, seeded
from fed_dpsat.data.names import split_names
from fed_dpsat.errors import SettingError
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.settings.data import Data


@dataclass(frozen=True, kw_only=True)
class Rows:
    """``n`` rows of ``num_clients`` clients.

    ======== =========================================================================
    field    is
    ======== =========================================================================
    client   the client of each row ``[n]``, int64
    values   by column, ``[n]``; NaN for no value, ``log(1 + x)`` of a column with log
    labels   the class of each row, int64 ``[n]``, or whether it has each class, ``[n, C]``; None without
    ======== =========================================================================
    """

    client: NDArray[np.int64]
    num_clients: int
    values: Mapping[str, Floats]
    labels: NDArray[np.integer[Any]] | None = None
    class_names: tuple[str, ...] = ()

    @property
    def sizes(self) -> Floats:
        """The number of rows of each client, ``[num_clients]``."""
        return self.sums(np.ones((len(self.client), 1)))[:, 0]

    def sums(self, vectors: NDArray[np.generic]) -> Floats:
        """``[num_clients, d]``, the sum of ``vectors[n, d]`` over the rows of each client."""
        columns = [np.bincount(self.client, column, minlength=self.num_clients) for column in vectors.T]
        return np.stack(columns, axis=1) if columns else np.empty((self.num_clients, 0))

    def counts(self, places: NDArray[np.int64], width: int, there: NDArray[np.bool_]) -> Floats:
        """``[num_clients, width]``: how many rows of each client, of those ``there``, have each of ``places[n]``."""
        at = self.client[there] * width + places[there]
        found = np.bincount(at, minlength=self.num_clients * width)
        return found.reshape(self.num_clients, width).astype(np.float64)


@dataclass(frozen=True, kw_only=True)
class Declared:
    """A column that a statistic is of: its range, of ``log(1 + x)`` if it has ``log``, and its declaration."""

    name: str
    low: float
    high: float
    log: bool
    spec: Mapping[str, object]

    def constants(self, mean: float, std: float) -> dict[str, object]:
        """The declaration with ``mean`` and ``std`` in place of the range."""
        kept = {key: value for key, value in self.spec.items() if key not in ("low", "high")}
        return {"mean": mean, "std": std, **kept}


def declared_columns(config: RunConfig) -> list[Declared]:
    """The columns of ``statistics_columns``, or all with a range that the model sees or that are numeric labels.

    Raises ``SettingError`` for a column that is not declared, or has no range, and if no column is left.
    """
    if config.dataset != "table":
        bound = "possible without columns with a declared range"
        raise SettingError("dataset", config.dataset, bound, "use table, or statistics=labels")
    given = plugins.parse_arguments("dataset", config.dataset_args)
    specs = specs_of(given.get("columns"), config.columns_file)
    known, named = ranges(specs), split_names(config.statistics_columns)
    labels = split_names(config.label_column)
    seen = {*(split_names(config.input_columns) or specs), *(labels if config.task == "regression" else ())}
    for name in named:
        if name not in specs:
            remedy = f"declare {name} in columns_file, or in columns of dataset_args"
            raise SettingError(
                "statistics_columns", config.statistics_columns, f"all declared: {name!r} is not", remedy
            )
        if name not in known:
            bound = f"of numbers with a declared range: {name!r} has none"
            remedy = f"declare {name} = {{low = 0, high = 100}} from public knowledge: values are clipped to it"
            raise SettingError("statistics_columns", config.statistics_columns, bound, remedy)
    chosen = named or tuple(name for name in specs if name in known and name in seen)
    if not chosen:
        remedy = "declare low and high of a column: values are clipped to them"
        raise SettingError("statistics", config.statistics, "possible without a column that has a range", remedy)
    return [
        Declared(name=n, low=known[n][0], high=known[n][1], log=bool(specs[n].get("log")), spec=specs[n])
        for n in chosen
    ]


def rows_of(config: RunConfig, columns: list[Declared]) -> Rows:
    """The rows of all clients, with the values of ``columns`` and their labels, dealt as a run deals them."""
    labels = split_names(config.label_column)
    inputs = [column.name for column in columns if column.name not in labels]
    dataset = None
    if columns:
        quoted = ", ".join('"' + name.replace('"', '""') + '"' for name in inputs)
        settings = {**config.settings(), **({"input_columns": quoted} if inputs else {})}
        given = plugins.parse_arguments("dataset", config.dataset_args) | {"encoding": "one-hot", "raw": True}
        with seeded(config, "partition"):
            dataset = plugins.call("dataset", "table", plugins.load("dataset", "table"), settings, given)
    of_features: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(Data) if f.name.startswith("features")}
    found = Federated.build(dataclasses.replace(config, **of_features), dataset=dataset)
    train, parts = found.dataset.train, found.whole
    order = np.concatenate(parts)
    values = {}
    if inputs:
        assert isinstance(train.inputs, Tensor)
        table = train.inputs[torch.from_numpy(order)].numpy().astype(np.float64)
        for place, name in enumerate(inputs):
            values[name] = np.where(table[:, 2 * place + 1] > 0, np.nan, table[:, 2 * place])
    of_classes = None
    if isinstance(train.labels, Tensor):
        own = train.labels[torch.from_numpy(order)].numpy()
        if own.dtype == np.float32:
            numbers = own.reshape(len(order), -1).astype(np.float64)
            values |= {n: numbers[:, i] for i, n in enumerate(labels) if n in {column.name for column in columns}}
        else:
            of_classes = own
    return Rows(
        client=np.repeat(np.arange(len(parts)), [len(part) for part in parts]),
        num_clients=len(parts),
        values=values,
        labels=of_classes,
        class_names=found.dataset.class_names,
    )
