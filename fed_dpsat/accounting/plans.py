"""The plan of each client: its budget, its sample rate, and its first round.

Without a table, every client has the plan of the configuration. ``client_table`` names a CSV file with one line per
client that differs; an empty field means the value of the configuration::

    client,target_epsilon,sample_rate,first_round
    0,1.0,,
    7,4.0,0.1,20
"""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fed_dpsat.accounting import PrivacyEvent, epsilon, merge, noise_multiplier_for
from fed_dpsat.accounting.before import history_beside
from fed_dpsat.accounting.event import CLIENTS, DISTRIBUTIONS, History, correlated_kind
from fed_dpsat.errors import InputError, SettingError, warn_once
from fed_dpsat.settings.config import RunConfig


class BudgetError(InputError):
    """A round costs more than the rest of the budget of a client; the client computed nothing on its data."""


@dataclass(frozen=True, kw_only=True)
class LocalTraining:
    """The training of a client under the unit "client", before the server adds noise; no event covers one step."""

    sample_rate: float
    local_steps: int


@dataclass(frozen=True, kw_only=True)
class ClientPlan:
    """``target_epsilon`` 0 means no budget; ``event`` is the cost of one round; ``first_round`` counts from 1.

    Under the units "example" and "user", ``event`` describes the training of a round; under "client", ``training``
    does. Raises
    ``SettingError`` for an event of one unit with the training of the other.
    """

    target_epsilon: float
    first_round: int
    event: PrivacyEvent
    training: LocalTraining | None = None

    def __post_init__(self) -> None:
        check_training(self.event, self.training)

    @property
    def budget(self) -> float:
        """The largest epsilon that this client may reach."""
        return self.target_epsilon or math.inf


def check_training(event: PrivacyEvent, training: LocalTraining | None) -> None:
    """Raise ``SettingError`` unless ``training`` is present for the unit "client" and absent for the others."""
    if (training is None) != (event.privacy_unit != "client"):
        raise SettingError(
            "training",
            training,
            f"possible with an event of the unit {event.privacy_unit!r}",
            "give LocalTraining only under the unit 'client'; an event of another unit states its own steps",
        )


@dataclass(frozen=True, kw_only=True)
class _Row:
    target_epsilon: float
    sample_rate: float
    first_round: int


COLUMNS: Mapping[str, Callable[[str], Any]] = {"target_epsilon": float, "sample_rate": float, "first_round": int}


def make_plans(config: RunConfig) -> list[ClientPlan]:
    """The plan of each client; calibration runs once per distinct budget, rate and number of rounds.

    Raises ``InputError`` for an invalid table, or a budget below the cost of one round.
    """
    rows, paid = read_table(config), history_beside(config)
    of_row = {row: _plan(config, row, _noise_multiplier(config, row, paid)) for row in dict.fromkeys(rows)}
    for row, plan in of_row.items():
        cost = epsilon([*paid, plan.event], config.delta, config.accountant)
        if cost > plan.budget:
            raise SettingError(
                "target_epsilon",
                plan.target_epsilon,
                f"enough for one round of client {rows.index(row)}, which costs {cost:.4g}"
                f"{' with statistics and evaluations' if paid else ''}",
                "raise the budget or the noise, or lower local_steps or sample_rate",
            )
    return [of_row[row] for row in rows]


def plan_of(config: RunConfig) -> ClientPlan:
    """The plan of a client at the noise of ``config``, without a table and a budget."""
    row = _Row(target_epsilon=0.0, sample_rate=config.sample_rate, first_round=1)
    return _plan(config, row, config.noise_multiplier)


def read_table(config: RunConfig) -> list[_Row]:
    """One row per client: the values of the configuration, or those of ``client_table``."""
    default = _Row(target_epsilon=config.target_epsilon, sample_rate=config.sample_rate, first_round=1)
    rows = [default] * config.num_clients
    if not config.client_table:
        return rows
    seen: set[int] = set()
    for line, fields in _lines(Path(config.client_table)):
        where = f"client_table={config.client_table!r}, line {line}"
        try:
            client = int(fields.pop("client"))
            values = {key: COLUMNS[key](text) for key, text in fields.items() if text}
        except ValueError as error:
            raise InputError(f"{where}: {error}") from None
        if not 0 <= client < config.num_clients or client in seen:
            raise InputError(f"{where}: client {client} occurs twice or is not in 0 to {config.num_clients - 1}")
        seen.add(client)
        if not config.private and values.pop("target_epsilon", 0.0):
            warn_once(f"private=false: the budgets in client_table={config.client_table!r} have no effect")
        rows[client] = row = dataclasses.replace(default, **values)
        if not (0 <= row.target_epsilon < math.inf and 0 < row.sample_rate <= 1):
            raise InputError(f"{where}: target_epsilon must be in [0, inf) and sample_rate in (0, 1]")
        if not 1 <= row.first_round <= config.num_rounds:
            raise InputError(f"{where}: first_round={row.first_round} is not in 1 to num_rounds={config.num_rounds}")
    return rows


def affordable(history: Iterable[PrivacyEvent], plan: ClientPlan, delta: float, accountant: str) -> bool:
    """Whether one more round of ``plan`` fits the budget of a client with ``history``; all inputs are public."""
    return math.isinf(plan.budget) or epsilon([*history, plan.event], delta, accountant) <= plan.budget


def spend(history: History, event: PrivacyEvent, budget: float, delta: float, accountant: str) -> History:
    """``history`` plus ``event``; raises ``BudgetError`` if they cost more than ``budget`` (0 means no budget).

    A client counts its own cost and does not rely on the server.
    """
    spent = merge([*history, event])
    if budget and (cost := epsilon(spent, delta, accountant)) > budget:
        raise BudgetError(
            f"budget={budget:g} is below {cost:.4g}, the epsilon after this round at delta {delta:g}; "
            "refused, nothing was computed"
        )
    return spent


def _noise_multiplier(config: RunConfig, row: _Row, paid: History) -> float:
    """The configured noise, or the smallest noise at which the whole schedule of the client fits its budget.

    The budget is also of what it has ``paid`` beside training.
    """
    if not config.private or config.budget_mode == "retire" or not row.target_epsilon:
        return config.noise_multiplier
    rounds = min(config.rounds_per_client, config.num_rounds - row.first_round + 1)
    of_round = _plan(config, row, 1.0).event
    steps = rounds * of_round.steps
    return noise_multiplier_for(
        row.target_epsilon, config.delta, of_round.sample_rate, steps, config.accountant, of_round.kind, paid
    )


def _plan(config: RunConfig, row: _Row, noise_multiplier: float) -> ClientPlan:
    """The only place that makes the event of a round: steps on examples or persons, or one mechanism on clients.

    Only coins of clients amplify a mechanism on clients. With cyclic ones, the banded noise of the rounds from one turn
    of a client's group to the next is one mechanism (arXiv 2306.08153, Theorem 4), charged at that turn.
    """
    rate, steps = row.sample_rate, config.steps_per_round
    if config.privacy_unit != "client":
        kind, training = DISTRIBUTIONS[config.privacy_unit][config.noise_distribution], None
        event = PrivacyEvent(noise_multiplier=noise_multiplier, sample_rate=rate, steps=steps, kind=kind)
    else:
        of_round, kind = config.amplifying_rate, CLIENTS
        if config.noise_mechanism != "independent" and config.client_sampling == "fixed":
            kind = correlated_kind(
                config.noise_mechanism,
                steps=config.num_rounds,
                participations=config.rounds_per_client,
                separation=config.separation,
            )
        event = PrivacyEvent(noise_multiplier=noise_multiplier, sample_rate=of_round, steps=1, kind=kind)
        training = LocalTraining(sample_rate=rate, local_steps=steps)
    return ClientPlan(target_epsilon=row.target_epsilon, first_round=row.first_round, event=event, training=training)


def _lines(path: Path) -> Iterable[tuple[int, dict[str, str]]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError("client_table", str(path), "a readable CSV file", str(error)) from None
    reader = csv.DictReader(text.splitlines())
    unknown = set(reader.fieldnames or ()) - {"client", *COLUMNS}
    if "client" not in (reader.fieldnames or ()) or unknown:
        raise InputError(
            f"client_table={str(path)!r}: columns are {reader.fieldnames}, not client and any of "
            f"{', '.join(COLUMNS)}; rename them"
        )
    for fields in reader:
        if None in fields or None in fields.values():
            raise InputError(f"client_table={str(path)!r}, line {reader.line_num}: not as many fields as columns")
        yield reader.line_num, {key: value.strip() for key, value in fields.items()}
