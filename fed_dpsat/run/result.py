"""A run as Python has it: what its folder holds, its model, its ledger, and how a notebook shows it."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fed_dpsat.client.given import FROM_PYTHON
from fed_dpsat.errors import RunError
from fed_dpsat.run.metric import CLASSIFICATION, metric_of, metric_of_settings, task_of, value_of
from fed_dpsat.run.showing import as_html, as_text, picture
from fed_dpsat.run.statement import Statement, read_statement
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.tasks.metric import UNDEFINED, Metric, Value

if TYPE_CHECKING:
    from torch import nn

Line = dict[str, Any]
UNFINISHED = "unfinished"


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Run(Mapping[str, Any]):
    """A run in its folder: what ``simulate`` returns and ``load_run`` reads.

    It is a mapping of its ``summary``: ``run["test_accuracy"]`` is a value of ``summary.json``. A notebook shows it as
    a table with the learning curve.

    =============== ===============================================================================================
    attribute       content
    =============== ===============================================================================================
    ``path``        the folder
    ``config``      the ``RunConfig``
    ``status``      completed, interrupted or failed; unfinished: it is active, or was killed
    ``summary``     the content of ``summary.json``; empty for an unfinished run
    ``rounds``      one dict per round, from 0, the evaluation before the first round; ``table()`` as a DataFrame
    ``timing``      one dict per round: seconds by phase, throughput, memory
    ``epsilon``     the maximum over clients, from the summary, else from the ledger, which also has the charges of an
                    interrupted round; NaN without both
    ``quality``     the last evaluated model: all metrics, calibration and accuracy by class; None without one
    ``missing``     a sentence for each missing file
    =============== ===============================================================================================
    """

    path: Path
    config: RunConfig
    environment: Line
    rounds: tuple[Line, ...]
    timing: tuple[Line, ...]
    summary: Line
    quality: Line | None
    simulation: Line | None
    sharpness: Line | None
    epsilon: float
    missing: tuple[str, ...]
    module: nn.Module | None = None
    """The network that this process trained; its parameters are those before training."""

    def table(self) -> Any:
        """``rounds`` as a pandas DataFrame with the index ``round``; pandas comes with the package ``datasets``."""
        import pandas  # type: ignore[import-untyped]

        columns = list(self.rounds[0]) if self.rounds else ["round"]
        return pandas.DataFrame(list(self.rounds), columns=columns).set_index("round")

    def model(self, network: nn.Module | None = None, *, averaged: bool = False) -> nn.Module:
        """A new network with the weights of the last checkpoint, on the CPU, in evaluation mode.

        With ``averaged`` it has the average of a run with ``averaging``.

        A folder has the parameters after the last complete round and none of earlier rounds. ``network`` is the one
        that was given to ``simulate`` as an object, or one like it: a folder does not hold the code of such a run. It
        is copied. Raises ``SettingError`` for a run with objects from Python without a ``network``, another
        ``network``, a plug-in or data file that has changed since, and personal layers, which stay with clients;
        ``RunError`` without a checkpoint, and if the folder has changed since it was read.
        """
        from fed_dpsat.run.finished import trained, trained_copy

        if network is not None:
            return trained_copy(self._folder(), network, begun=False, averaged=averaged).eval()
        if self.module is not None:
            return trained_copy(self._folder(), self.module, begun=True, averaged=averaged).eval()
        again = "load it with the version that has it"
        return trained(self._folder(), again=again, averaged=averaged).loss_fn.module.eval()

    def ledger(self) -> Statement:
        """What each client has spent and has left, as ``fed-dpsat ledger`` shows it; verifies the file first.

        Raises ``LedgerError`` without a ledger and for a damaged one, ``RunError`` if the folder has changed since.
        """
        return read_statement(self._folder())

    def picture(self) -> str:
        """The main metric against rounds as SVG; empty before a round with a value."""
        return picture(self)

    def _folder(self) -> Path:
        """The path, if it still holds this run: a later one may have replaced it, or it went on."""
        from fed_dpsat.run.reading import load_run

        if str(load_run(self.path).summary) != str(self.summary):
            raise RunError(f"{self.path} has changed since this run was read; read it again with load_run")
        return self.path

    def __getitem__(self, key: str) -> Any:
        if key not in self.summary:
            near = difflib.get_close_matches(key, self.summary, n=3, cutoff=0.5)
            raise KeyError(
                f"{key!r} is not in the summary of {self.path}; did you mean {', '.join(near)}?" if near else key
            )
        return self.summary[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.summary)

    def __len__(self) -> int:
        return len(self.summary)

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        return as_html(self)

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.path.resolve().name

    @property
    def status(self) -> str:
        """completed, interrupted, failed; or unfinished, without a summary."""
        return str(self.summary.get("status", UNFINISHED))

    @property
    def task(self) -> str:
        """The task, such as classification."""
        return task_of(self.summary or self.config.settings())

    @property
    def metric(self) -> Metric:
        """The main metric; without a summary, that of the settings."""
        return main_metric(self.config, self.summary)

    @property
    def evaluated(self) -> list[Line]:
        """The rounds with an evaluation."""
        return [line for line in self.rounds if line[self.metric.key] is not None]

    @property
    def objects(self) -> list[str]:
        """Names of the arguments that are Python objects, which the settings do not describe."""
        return list(self.environment.get("objects", []))

    @property
    def score(self) -> Value | None:
        """The main metric of the last evaluated model."""
        return value_of(self.evaluated[-1][self.metric.key]) if self.evaluated else None

    @property
    def defined(self) -> list[Line]:
        """The rounds with an evaluation on which the main metric has a value."""
        return [line for line in self.evaluated if line[self.metric.key] != UNDEFINED]

    @property
    def others(self) -> dict[str, Value | None]:
        """The values of the other metrics of the last evaluated model by name, if the run states them."""
        stated = (self.quality or {}).get("metrics", {})
        return {name: value_of(value) for name, value in stated.items() if name != self.metric.name}

    @property
    def num_test(self) -> int | None:
        """The number of test examples, if the run states it."""
        return (self.quality or {}).get("num_examples")

    @property
    def num_draws(self) -> int | None:
        """The number of test examples if the main metric is a share of them, so that intervals by Wilson hold."""
        return self.num_test if self.task == CLASSIFICATION and self.metric.name == "accuracy" else None

    @property
    def method(self) -> str:
        """The optimizer, or "without privacy"."""
        if not self.config.private:
            return "without privacy"
        name = self.config.optimizer
        older = "optimizer" in self.objects and not name.endswith(FROM_PYTHON)  # older versions stored the wrong name
        return "an optimizer from Python" if older else name


def main_metric(config: RunConfig, summary: Line) -> Metric:
    """The main metric of a run; without a ``summary``, that of the settings."""
    return metric_of(summary) if summary else metric_of_settings(config.settings())
