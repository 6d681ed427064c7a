"""The ledger against a plain dictionary, for new files and for continued ones of schema 1."""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fed_dpsat.accounting.accountant import epsilon
from fed_dpsat.accounting.before import BEFORE
from fed_dpsat.accounting.chain import LedgerError
from fed_dpsat.accounting.event import PrivacyEvent, merge
from fed_dpsat.accounting.ledger import PrivacyLedger

SCHEMA_1 = Path(__file__).parents[1] / "upgrades" / "ledgers" / "schema_1.sqlite"
ONE = PrivacyEvent(noise_multiplier=1.0, sample_rate=0.1, steps=3)
TWO = PrivacyEvent(noise_multiplier=2.0, sample_rate=0.1, steps=1)
CHARGED = {
    (0, 0): {0: ONE, 1: TWO, 2: ONE, 5: ONE},
    (1, 0): {1: ONE, 2: ONE},
    (1, 1): {1: ONE, 2: ONE, 3: TWO},
}
"""What the file of schema 1 has, by round and attempt."""
SETTLED = {
    (0, 0): {0: "released", 1: "dropped: late", 2: "released", 5: "released"},
    (1, 1): {1: "released", 2: "released"},
}
CLIENTS = st.one_of(st.integers(0, 5), st.sampled_from([300, 2**63 - 1]))


def of_round(values):
    """Round, attempt, a value of each client, and whether the call has pairs."""
    by_client = st.dictionaries(CLIENTS, st.sampled_from(values), max_size=6)
    return st.tuples(st.integers(0, 3), st.integers(0, 1), by_client, st.booleans())


def pairs(by_client):
    return [
        ([client for client in by_client if by_client[client] == value], value) for value in set(by_client.values())
    ]


class Model:
    """What the ledger says, the plain way."""

    def __init__(self, charged, settled):
        self.charged = {key: dict(events) for key, events in charged.items()}
        self.settled = {key: dict(outcomes) for key, outcomes in settled.items()}

    def write(self, table, round, attempt, given):
        """False if the call must fail and change nothing."""
        known = table.setdefault((round, attempt), {})
        charged = self.charged.get((round, attempt), {})
        fails = any(known.get(c, value) != value for c, value in given.items())
        if fails or (table is self.settled and not given.keys() <= charged.keys()):
            return False
        known |= given
        return True

    def histories(self, before=100):
        found = {}
        for (round, _), events in self.charged.items():
            for client, event in events.items():
                if round < before:
                    found.setdefault(client, []).append(event)
        return {client: merge(events) for client, events in found.items()}

    def rounds(self, before=100):
        found = {}
        for (round, _), events in self.charged.items():
            for client in events if round < before else ():
                found.setdefault(client, set()).add(round)
        return found


def same(ledger, model):
    assert ledger.head.charges == sum(map(len, model.charged.values()))
    assert ledger.histories() == model.histories()
    assert ledger.histories(before=1) == model.histories(before=1)
    spent = {client: epsilon(history, 1e-4, "rdp") for client, history in model.histories().items()}
    assert ledger.epsilon_by_client(1e-4, "rdp") == spent
    assert ledger.epsilon(1e-4, "rdp") == max(spent.values(), default=0.0)
    for before in (None, 2):
        rounds = model.rounds(*[before] if before else [])
        trained = {client: of - {BEFORE} for client, of in rounds.items()}
        assert ledger.rounds_by_client(before) == {client: len(of) for client, of in trained.items() if of}
    for client in (0, 1, 4, 300, 2**63 - 1):
        assert ledger.last_round(client) == max(model.rounds().get(client, {-1}))
        assert ledger.history(client) == model.histories().get(client, ())
    for round in range(4):
        last = {c: attempt for attempt in (0, 1) for c in model.charged.get((round, attempt), {})}
        assert ledger.attempts(round) == last
        for attempt in (0, 1):
            charged, settled = (table.get((round, attempt), {}) for table in (model.charged, model.settled))
            assert ledger.outcomes(round, attempt) == settled
            assert ledger.outcome(1, round, attempt) == (settled.get(1, "") if 1 in charged else None)


@pytest.mark.parametrize("start", ["new", "schema 1"])
@settings(max_examples=12)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("charge"), of_round([ONE, TWO])),
            st.tuples(st.just("settle"), of_round(["released", "dropped: late"])),
        ),
        max_size=8,
    )
)
def test_any_calls_give_what_a_dictionary_gives(start, calls):
    with TemporaryDirectory() as folder:
        path, model, heads = Path(folder) / "ledger.sqlite", Model({}, {}), []
        if start == "schema 1":
            shutil.copy(SCHEMA_1, path)
            model = Model(CHARGED, SETTLED)
        with PrivacyLedger(path) as ledger:
            for doing, (round, attempt, by_client, in_pairs) in calls:
                table = model.charged if doing == "charge" else model.settled
                given = pairs(by_client) if in_pairs else by_client
                write = ledger.charge_many if doing == "charge" else ledger.settle_many
                heads.append(ledger.head)
                if model.write(table, round, attempt, by_client):
                    write(round, attempt, given)
                else:
                    with pytest.raises(LedgerError):
                        write(round, attempt, given)
            same(ledger, model)
            heads.append(ledger.head)
        for readonly in (True, False):
            with PrivacyLedger(path, readonly=readonly) as ledger:
                ledger.verify()
                same(ledger, model)
                assert all(ledger.extends(head) for head in heads)
