"""A run in which no reply is ever valid ends after three rounds, whatever kind of rounds it has."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from flwr.app import Error, Message

from fed_dpsat import RunConfig, simulate
from fed_dpsat.accounting import PrivacyLedger
from fed_dpsat.client.build import Experiment
from fed_dpsat.flower import client_app as client_app_module
from fed_dpsat.flower.nodes import FederationError
from fed_dpsat.flower.wire import compat, records

ROUNDS = 8
DIVERGING = RunConfig(num_clients=4, num_rounds=ROUNDS, noise_multiplier=2.0, delta=1e-4, lr=1e20)
KINDS = {
    "ordinary": {},
    "stacked": {"stack_clients": 4},
    "a codec": {"update_codec": "bf16"},
    "each reply alone": {"strategy": "geometric-median"},
    "clients that drop out": {"dropout_rate": 0.4},
    "coins, and rounds with nobody": {"client_sampling": "poisson", "clients_per_round": 1, "num_rounds": 12},
    "buffered": {"buffer_size": 2, "delay": "lognormal", "clients_per_round": 3},
}


pytestmark = pytest.mark.usefixtures("untried")


def charged(folder):
    """The rounds that anybody was charged for."""
    with PrivacyLedger(folder / "ledger.sqlite", must_exist=True) as ledger:
        return max(ledger.rounds_by_client().values()), sum(ledger.rounds_by_client().values())


@pytest.mark.by_default("ordinary", "buffered", "coins, and rounds with nobody")
@pytest.mark.parametrize("kind", KINDS)
def test_replies_of_a_model_that_diverged_end_the_run_at_the_third_round(tmp_path, kind):
    with pytest.raises(FederationError, match=r"no reply was valid, 3 round.*beyond 1e\+14.*lower lr") as raised:
        simulate(dataclasses.replace(DIVERGING, **KINDS[kind]), tmp_path / "run")
    assert "\n" not in str(raised.value)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "failed"
    lines = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    assert sum(line["asked"] != [] and line["accepted"] == 0 for line in lines[1:]) == 2  # the third has no line
    assert charged(tmp_path / "run")[0] <= 3


def test_under_masks_a_client_keeps_what_no_reply_may_be(tmp_path):
    """A sum of moves that are cut to the largest one would hide it."""
    with pytest.raises(FederationError, match=r"every client.*beyond 1e\+14"):
        simulate(dataclasses.replace(DIVERGING, secure_aggregation=True), tmp_path / "run")
    assert charged(tmp_path / "run") == (1, 4)


class Scripted:
    """Clients of which each round has its word: a good reply, an invalid one, or an error of theirs or the network's"""

    def __init__(self, config: RunConfig, script) -> None:
        experiment = Experiment.build(config)
        self._app, self._script = client_app_module.make_client_app(lambda _: experiment), script

    def __call__(self, message, context):
        round, client = records.read_assignment(message.content).round, int(context.node_config["partition-id"])
        word = self._script(round, client)
        if word in ("gone", "crash"):
            code = compat.ErrorCode.NODE_UNAVAILABLE if word == "gone" else compat.ErrorCode.CLIENT_APP_CRASHED
            return Message(Error(code=code, reason=word), reply_to=message)
        reply = self._app(message, context)
        if word == "far":
            far = {name: p + 10.0 for name, p in records.to_params(reply.content[records.ARRAYS]).items()}
            reply.content[records.ARRAYS] = records.to_arrays(far)
        if word == "nan":
            nan = {name: p * torch.nan for name, p in records.to_params(reply.content[records.ARRAYS]).items()}
            reply.content[records.ARRAYS] = records.to_arrays(nan)
        return reply


HONEST = dataclasses.replace(DIVERGING, lr=0.1)
TO_BE_TRUSTED = dataclasses.replace(HONEST, privacy_unit="client", clip_norm=0.5)
ENDS = {
    "invalid": (HONEST, lambda r, c: "nan", 3),
    "beyond the bound of a client": (TO_BE_TRUSTED, lambda r, c: "far", 3),
    "invalid or gone": (HONEST, lambda r, c: "nan" if c else "gone", 3),
    "invalid or crashed": (HONEST, lambda r, c: "nan" if c else "crash", 3),
    "crashed or gone": (HONEST, lambda r, c: "crash" if c else "gone", 3),
    "a round with nobody is no end of the row": (HONEST, lambda r, c: "gone" if r == 2 else "nan", 4),
    "a valid reply is": (HONEST, lambda r, c: "good" if (r, c) == (2, 0) else "nan", 5),
    "all who are there crashed": (HONEST, lambda r, c: "crash", 1),
}


@pytest.mark.by_default("invalid", "crashed or gone", "a valid reply is", "a round with nobody is no end of the row")
@pytest.mark.parametrize("case", ENDS)
def test_a_row_of_rounds_without_a_valid_reply_ends_the_run(tmp_path, case):
    config, script, last = ENDS[case]
    with pytest.raises(FederationError, match=f"until round {last}"):
        simulate(config, tmp_path / "run", client_app=Scripted(config, script))
    assert charged(tmp_path / "run")[0] == last


def test_clients_that_are_gone_say_nothing_of_what_they_would_have_answered(tmp_path):
    clients = Scripted(HONEST, lambda r, c: "gone" if r < ROUNDS else "good")
    assert simulate(HONEST, tmp_path / "run", client_app=clients)["status"] == "completed"


def test_a_row_goes_on_where_a_run_is_resumed(tmp_path):
    """Two rounds before it was interrupted, one after."""

    def stop(record):
        if record["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(DIVERGING, tmp_path / "run", on_round=stop)
    with pytest.raises(FederationError, match="until round 3"):
        simulate(dataclasses.replace(DIVERGING, resume=True), tmp_path / "run")
