"""A ledger as a statement of account: one line per client, totals, and whether the file is whole."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fed_dpsat.config import RunConfig
from fed_dpsat.errors import SettingError
from fed_dpsat.plans import affordable, make_plans
from fed_dpsat.privacy import LedgerError, PrivacyLedger
from fed_dpsat.privacy.event import UNITS


@dataclass(frozen=True, kw_only=True)
class ClientLine:
    """One client: ``epsilon`` is PLD's; ``state`` is active, retired or not asked yet."""

    client: int
    rounds: int
    steps: int
    noise_multipliers: tuple[float, ...]
    epsilon: float
    epsilon_rdp: float
    delta: float
    budget: float
    state: str


@dataclass(frozen=True, kw_only=True)
class Statement:
    """All lines, the maxima over clients, what they protect, and the head of the hash chain."""

    unit: str
    clients: tuple[ClientLine, ...]
    epsilon: float
    epsilon_rdp: float
    delta: float
    charges: int
    sha256: str

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self)


def read_statement(run: Path, delta: float | None = None) -> Statement:
    """The statement of a run folder; raises ``LedgerError`` unless its ledger is whole and its chain unbroken.

    ``delta`` defaults to the run's. Where the run published the head of its chain in ``summary.json``, a file that
    was rewritten from there on is found too.
    """
    config = RunConfig.load(run / "config.toml")
    delta = config.delta if delta is None else delta
    if not 0 < delta < 1:
        raise SettingError("delta", delta, "in (0, 1)", "leave it out for that of the run")
    plans = make_plans(config)
    with PrivacyLedger(run / "ledger.sqlite", readonly=True) as ledger:
        ledger.verify()
        _check_head(run, ledger)
        if ledger.unit not in (None, config.privacy_unit):
            raise LedgerError(
                f"{run / 'ledger.sqlite'} protects {UNITS.get(str(ledger.unit), ledger.unit)}, but the run's "
                f"privacy_unit={config.privacy_unit!r}; it is another run's ledger"
            )
        spent = {name: ledger.epsilon_by_client(delta, name) for name in ("pld", "rdp")}
        rounds = ledger.rounds_by_client()
        lines = []
        for client, plan in enumerate(plans):
            history = ledger.history(client)
            retired = not affordable(history, plan, config.delta, config.accountant)
            lines.append(
                ClientLine(
                    client=client,
                    rounds=rounds.get(client, 0),
                    steps=sum(event.steps for event in history),
                    noise_multipliers=tuple(sorted({event.noise_multiplier for event in history})),
                    epsilon=spent["pld"].get(client, 0.0),
                    epsilon_rdp=spent["rdp"].get(client, 0.0),
                    delta=delta,
                    budget=plan.budget,
                    state="retired" if retired else "active" if history else "not asked",
                )
            )
        return Statement(
            unit=UNITS[config.privacy_unit],
            clients=tuple(lines),
            epsilon=ledger.epsilon(delta, "pld"),
            epsilon_rdp=ledger.epsilon(delta, "rdp"),
            delta=delta,
            charges=ledger.head.charges,
            sha256=ledger.head.sha256,
        )


def _check_head(run: Path, ledger: PrivacyLedger) -> None:
    summary = run / "summary.json"
    published = json.loads(summary.read_text()).get("ledger_head") if summary.exists() else None
    if published and published != ledger.head._asdict():
        raise LedgerError(
            f"{run / 'ledger.sqlite'} has {ledger.head.charges} charges ending in {ledger.head.sha256[:16]}, but "
            f"the run ended with {published['charges']} ending in {published['sha256'][:16]}; it was changed afterwards"
        )
