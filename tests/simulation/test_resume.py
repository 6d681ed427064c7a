"""A run whose driver was killed goes on to the bits, the account and the lines of one that was not."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys

import pytest
import torch
from flwr.serverapp.strategy import FedAdam, FedAvg

from fed_dpsat import simulation
from fed_dpsat.accounting import LedgerError, PrivacyLedger
from fed_dpsat.errors import RunError, SettingError
from fed_dpsat.flower.nodes import FederationError
from fed_dpsat.run.folder import RunFolder
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.simulation import resume, simulate

pytestmark = pytest.mark.usefixtures("untried")  # the trial has tests of its own: tests/client/test_trial.py

CONFIG = RunConfig(
    **{"noise_multiplier": 2.0, "delta": 1e-4, "seed": 1, "num_clients": 5, "clients_per_round": 3, "num_rounds": 4},
    **{"local_steps": 2, "momentum": 0.5, "dropout_rate": 0.2, "max_rounds_per_client": 3},
)


def rows(folder):
    with sqlite3.connect(folder / "ledger.sqlite") as file:
        return [file.execute(f"SELECT * FROM {table} ORDER BY seq").fetchall() for table in ("charges", "outcomes")]


def what_came_of(folder):
    model = torch.load(folder / "checkpoint" / "model.pt", weights_only=True)["params"]
    return {k: v.numpy().tobytes() for k, v in model.items()}, rows(folder), (folder / "rounds.jsonl").read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    simulate(CONFIG, folder)
    return what_came_of(folder)


def killed(config, folder, owner, name, call, *, after, **objects):
    """``simulate`` in a child that is killed at the given call of ``owner.name``, before or after it does its work."""
    child = os.fork()
    if child == 0:
        original, calls = getattr(owner, name), []

        def wrapped(*args, **kwargs):
            calls.append(None)
            if len(calls) == call and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            value = original(*args, **kwargs)
            if len(calls) == call and after:
                os.kill(os.getpid(), signal.SIGKILL)
            return value

        setattr(owner, name, wrapped)
        simulation.try_federation = lambda *args: None  # calls are counted in the run alone
        try:
            simulate(config, folder, **objects)
        finally:
            os._exit(7)  # it was to be killed before
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def client_round():
    from fed_dpsat.client.build import Experiment

    return Experiment, "client_round"


POINTS = {
    "when there are settings": (RunFolder, "open", 1, True),
    "before anything": (RunFolder, "save_checkpoint", 1, False),
    "before the first round": (RunFolder, "save_checkpoint", 1, True),
    "before a charge": (PrivacyLedger, "charge_many", 2, False),
    "after a charge": (PrivacyLedger, "charge_many", 2, True),
    "in the middle of training": (*client_round(), 4, True),
    "before it is settled": (PrivacyLedger, "settle_many", 3, False),
    "after it is settled": (PrivacyLedger, "settle_many", 3, True),
    "after the line, before the checkpoint": (RunFolder, "append_round", 3, True),
    "while a checkpoint is written": (torch, "save", 3, True),
    "after a checkpoint": (RunFolder, "save_checkpoint", 4, True),
    "after the last checkpoint": (RunFolder, "save_checkpoint", 5, True),
    "after the end": (RunFolder, "close", 1, True),
}


@pytest.mark.by_default(
    "while a checkpoint is written",
    "before it is settled",
    "after the line, before the checkpoint",
    "after a charge",
    "in the middle of training",
)
@pytest.mark.parametrize("point", POINTS)
def test_a_driver_killed_anywhere_and_resumed_ends_as_if_it_had_not_been(uninterrupted, tmp_path, point):
    owner, name, call, after = POINTS[point]
    killed(CONFIG, tmp_path / "run", owner, name, call, after=after)
    summary = resume(tmp_path / "run")
    assert what_came_of(tmp_path / "run") == uninterrupted
    assert (tmp_path / "run" / "simulation.json").exists()
    assert (summary["status"], summary["rounds_completed"]) == ("completed", 4)
    assert (
        summary["test_accuracy"]
        == json.loads((tmp_path / "run" / "rounds.jsonl").read_text().splitlines()[-1])["test_accuracy"]
    )


def test_it_may_be_killed_again_and_again_and_a_torn_line_is_cut_off(uninterrupted, tmp_path):
    killed(CONFIG, tmp_path / "run", RunFolder, "append_round", 2, after=True)
    with (tmp_path / "run" / "rounds.jsonl").open("a") as file:
        file.write('{"round": 2, "test_acc')
    again = dataclasses.replace(CONFIG, resume=True)
    for _ in range(3):
        killed(again, tmp_path / "run", PrivacyLedger, "settle_many", 1, after=True)
    resume(tmp_path / "run")
    assert what_came_of(tmp_path / "run") == uninterrupted


def test_a_servers_momentum_goes_on(tmp_path):
    simulate(CONFIG, tmp_path / "whole", strategy=FedAdam(eta=0.05))
    killed(CONFIG, tmp_path / "run", RunFolder, "save_checkpoint", 3, after=True, strategy=FedAdam(eta=0.05))
    simulate(dataclasses.replace(CONFIG, resume=True), tmp_path / "run", strategy=FedAdam(eta=0.05))
    assert what_came_of(tmp_path / "run") == what_came_of(tmp_path / "whole")


def test_retired_clients_go_on(tmp_path):
    config = dataclasses.replace(
        CONFIG, budget_mode="retire", target_epsilon=2.6, max_rounds_per_client=0, num_rounds=8
    )
    whole = simulate(config, tmp_path / "whole")
    killed(config, tmp_path / "run", RunFolder, "save_checkpoint", 4, after=True)
    assert resume(tmp_path / "run")["retired"] == whole["retired"]
    assert whole["retired"]
    assert what_came_of(tmp_path / "run") == what_came_of(tmp_path / "whole")


@pytest.mark.slow
def test_on_workers_too(uninterrupted, tmp_path, ray_cluster):
    killed(CONFIG, tmp_path / "run", PrivacyLedger, "settle_many", 2, after=True)
    resume(tmp_path / "run", overrides={"workers": 2})
    assert what_came_of(tmp_path / "run") == uninterrupted


@pytest.mark.slow
def test_a_driver_of_workers_killed_mid_round_is_resumed(uninterrupted, tmp_path):
    script = (
        "import os, signal, sys\n"
        "from fed_dpsat.settings.config import RunConfig\n"
        "from fed_dpsat import simulation\n"
        "from fed_dpsat.flower import sums\n"
        "settings = eval(sys.argv[2])\n"
        "simulation.try_federation = lambda *_: None\n"
        "add, calls = sums.Tree.add, []\n"
        "def dying(tree, part):\n"
        "    calls.append(None)\n"
        "    if len(calls) == 8: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return add(tree, part)\n"
        "sums.Tree.add = dying\n"
        "simulation.simulate(RunConfig(**settings), sys.argv[1])\n"
    )
    settings = {**CONFIG.settings(), "workers": 2}
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "run"), repr(settings)], check=False)
    assert done.returncode == -signal.SIGKILL
    resume(tmp_path / "run", overrides={"workers": 0})
    assert what_came_of(tmp_path / "run") == uninterrupted


def test_with_noise_that_does_not_repeat_the_round_is_charged_again(tmp_path):
    everybody = {"clients_per_round": 0, "max_rounds_per_client": 0, "dropout_rate": 0.0}
    config = dataclasses.replace(CONFIG, noise_source="system", **everybody)
    killed(config, tmp_path / "run", PrivacyLedger, "settle_many", 2, after=False)
    summary = resume(tmp_path / "run")
    with PrivacyLedger(tmp_path / "run" / "ledger.sqlite", readonly=True) as ledger:
        for round in range(1, 5):
            assert ledger.attempts(round) == dict.fromkeys(range(5), int(round == 2))
        assert ledger.head.charges == 5 * 4 + 5
        assert summary["epsilon"] == ledger.epsilon(1e-4)
        assert {sum(event.steps for event in history) for history in ledger.histories().values()} == {5 * 2}


@pytest.fixture
def half(tmp_path):
    killed(CONFIG, tmp_path / "run", RunFolder, "save_checkpoint", 3, after=True)
    return tmp_path / "run"


def test_a_lost_ledger_or_an_older_copy_ends_it(half):
    copy = half.parent / "copy.sqlite"
    shutil.copy(half / "ledger.sqlite", copy)
    with PrivacyLedger(half / "ledger.sqlite") as ledger:
        charges = ledger.head.charges
    (half / "ledger.sqlite").unlink()
    with pytest.raises(LedgerError, match="no ledger at"):
        resume(half)
    killed(CONFIG, half.parent / "early", RunFolder, "save_checkpoint", 2, after=True)
    shutil.copy(half.parent / "early" / "ledger.sqlite", half / "ledger.sqlite")
    with pytest.raises(LedgerError, match=f"does not hold the {charges} charges that were in it at round 2"):
        resume(half)
    shutil.copy(copy, half / "ledger.sqlite")
    assert resume(half)["status"] == "completed"


def test_settings_that_would_make_it_another_run_are_refused(half):
    with pytest.raises(SettingError, match=r"other settings \(lr\)"):
        resume(half, overrides={"lr": 0.1})


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(SettingError, match="not the folder of a run"):
        resume(tmp_path)


def test_objects_have_to_be_given_again(tmp_path):
    killed(CONFIG, tmp_path / "run", RunFolder, "save_checkpoint", 3, after=True, strategy=FedAvg())
    with pytest.raises(SettingError, match="strategy came from Python"):
        resume(tmp_path / "run")


def test_a_strategy_that_cannot_be_kept_runs_and_says_at_once_that_it_cannot_be_resumed(tmp_path, caplog):
    strategy = FedAvg()
    strategy.memory = object()
    assert simulate(CONFIG, tmp_path / "run", strategy=strategy)["status"] == "completed"
    assert caplog.text.count("this run cannot be resumed: FedAvg.memory is a object") == 1
    with pytest.raises(FederationError, match=r"FedAvg.memory is a object"):
        simulate(dataclasses.replace(CONFIG, resume=True), tmp_path / "run", strategy=strategy)


def test_a_damaged_checkpoint_is_named(half):
    (half / "checkpoint" / "model.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(RunError, match="is not a checkpoint"):
        resume(half)
