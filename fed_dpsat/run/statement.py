"""The statement of a ledger: one line per client, totals, and the check of the file."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fed_dpsat.accounting import LedgerError, PrivacyLedger, large_delta
from fed_dpsat.accounting.accountant import has_rdp
from fed_dpsat.accounting.event import UNITS
from fed_dpsat.accounting.ledger import Head
from fed_dpsat.accounting.plans import affordable, make_plans
from fed_dpsat.errors import SettingError
from fed_dpsat.run.folder import RunFolder
from fed_dpsat.settings.config import RunConfig


@dataclass(frozen=True, kw_only=True)
class ClientLine:
    """One client: ``epsilon`` is by PLD; ``state`` is "active", "retired" or "not asked".

    ``epsilon_rdp`` is None if RDP has no bound: for Laplace noise with sampling.
    """

    client: int
    rounds: int
    steps: int
    noise_multipliers: tuple[float, ...]
    epsilon: float
    epsilon_rdp: float | None
    delta: float
    budget: float
    state: str


@dataclass(frozen=True, kw_only=True)
class Statement:
    """All lines, the maxima over clients, the privacy unit, the noise, and the head of the hash chain."""

    unit: str
    noise_distribution: str
    clients: tuple[ClientLine, ...]
    epsilon: float
    epsilon_rdp: float | None
    delta: float
    charges: int
    sha256: str
    delta_warning: str

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self)


def read_statement(run: Path, delta: float | None = None) -> Statement:
    """The statement of a run folder; raises ``LedgerError`` for a damaged ledger or a broken chain.

    ``delta`` defaults to the delta of the run. The chain must contain the heads in the checkpoint and ``summary.json``,
    which detects a rewritten file and an older copy.
    """
    folder = RunFolder(run, resume=True)
    config = folder.config()
    delta = config.delta if delta is None else delta
    if not 0 < delta < 1:
        raise SettingError("delta", delta, "in (0, 1)", "leave it out for the delta of the run")
    plans = make_plans(config)
    with trusted_ledger(folder) as ledger:
        if (found := ledger.privacy_unit) not in (None, config.privacy_unit):
            raise LedgerError(
                f"{run / 'ledger.sqlite'} protects {UNITS.get(str(found), found)}, but the run has "
                f"privacy_unit={config.privacy_unit!r}; it is the ledger of another run: restore the right one"
            )
        histories = ledger.histories()
        bounded = all(has_rdp(history) for history in histories.values())
        spent = {name: ledger.epsilon_by_client(delta, name) for name in ("pld", "rdp")[: 1 + bounded]}
        rounds = ledger.rounds_by_client()
        lines = []
        for client, plan in enumerate(plans):
            history = histories.get(client, ())
            retired = not affordable(history, plan, config.delta, config.accountant)
            lines.append(
                ClientLine(
                    client=client,
                    rounds=rounds.get(client, 0),
                    steps=sum(event.steps for event in history),
                    noise_multipliers=tuple(sorted({event.noise_multiplier for event in history})),
                    epsilon=spent["pld"].get(client, 0.0),
                    epsilon_rdp=spent["rdp"].get(client, 0.0) if bounded else None,
                    delta=delta,
                    budget=plan.budget,
                    state="retired" if retired else "active" if history else "not asked",
                )
            )
        return Statement(
            unit=UNITS[config.privacy_unit],
            noise_distribution=config.noise_distribution,
            clients=tuple(lines),
            epsilon=ledger.epsilon(delta, "pld"),
            epsilon_rdp=ledger.epsilon(delta, "rdp") if bounded else None,
            delta=delta,
            charges=ledger.head.charges,
            sha256=ledger.head.sha256,
            delta_warning=_delta_warning(folder, config, delta),
        )


def _delta_warning(folder: RunFolder, config: RunConfig, delta: float) -> str:
    """The warning from the sizes in ``simulation.json``; for a deployment, the warning that the run stored."""
    if config.privacy_unit == "client":
        return large_delta(delta, "client", config.num_clients)
    if sizes := folder.sizes():
        return large_delta(delta, config.privacy_unit, min(sizes))
    return str(folder.summary().get("delta_warning", "")) if delta == config.delta else ""


@contextmanager
def trusted_ledger(folder: RunFolder) -> Iterator[PrivacyLedger]:
    """The ledger of the run, for reading; raises ``LedgerError`` if it is damaged or lacks a stored head."""
    with PrivacyLedger(folder.ledger_path, readonly=True) as ledger:
        ledger.verify()
        _check_heads(folder, ledger)
        yield ledger


def _check_heads(folder: RunFolder, ledger: PrivacyLedger) -> None:
    """Raise ``LedgerError`` unless the chain has the head of the checkpoint and ends in that of a completed run."""
    if (checkpoint := folder.load_checkpoint()) is not None:
        ledger.check_extends(Head(*checkpoint.server["ledger_head"]), f"at round {checkpoint.round}")
    summary = folder.summary()
    published = summary.get("ledger_head")
    if not published:
        return
    if summary["status"] != "completed":  # a resume may have added charges since then
        ledger.check_extends(Head(**published), f"when the run was {summary['status']}")
    elif published != ledger.head._asdict():
        raise LedgerError(
            f"{folder.ledger_path} has {ledger.head.charges} charges ending in {ledger.head.sha256[:16]}, but "
            f"the run ended with {published['charges']} ending in {published['sha256'][:16]}: it was changed later; "
            "restore it from a backup"
        )
