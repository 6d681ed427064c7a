"""A run with a larger ``num_rounds`` ends as one that had it from the start, or is refused with the reason."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch

from fed_dpsat.errors import SettingError
from fed_dpsat.run.extension import ONLY_FOR_A_SCHEDULE
from fed_dpsat.run.folder import RunFolder
from fed_dpsat.run.statement import read_statement
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.simulation import resume, simulate
from fed_dpsat.step.optimizers import DPSGD

pytestmark = pytest.mark.usefixtures("untried")

CONFIG = RunConfig(noise_multiplier=2.0, delta=1e-4, num_clients=3, clients_per_round=2, num_rounds=2, momentum=0.5)
LONGER = {"num_rounds": 4}
PLUGIN = "from fed_dpsat.step.optimizers import DPSGD\ndef make(total_steps): return DPSGD(lr=0.5)\n"


def ended(folder):
    model = torch.load(folder / "checkpoint" / "model.pt", weights_only=True)["params"]
    return (
        {k: v.numpy().tobytes() for k, v in model.items()},
        read_statement(folder).sha256,
        (folder / "rounds.jsonl").read_bytes(),
    )


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    folder = tmp_path_factory.mktemp("short") / "run"
    simulate(CONFIG, folder)
    return folder


@pytest.fixture
def run(short, tmp_path):
    return shutil.copytree(short, tmp_path / "run")


@pytest.mark.parametrize("more", [{}, {"budget_mode": "retire", "target_epsilon": 1.6}])
def test_it_has_the_bits_and_the_account_of_a_run_with_all_rounds_from_the_start(tmp_path, more):
    config = dataclasses.replace(CONFIG, **more)
    whole = simulate(dataclasses.replace(config, **LONGER), tmp_path / "whole")
    simulate(config, tmp_path / "run")
    extended = resume(tmp_path / "run", overrides=LONGER)
    assert ended(tmp_path / "run") == ended(tmp_path / "whole")
    for name in ("retired", "epsilon", "ended_early"):
        assert extended[name] == whole[name]
    assert bool(whole["retired"]) == bool(more), "with a budget for two rounds each"
    assert RunFolder(tmp_path / "run", resume=True).config().num_rounds == 4
    assert resume(tmp_path / "run") == extended


def test_an_extension_that_is_interrupted_goes_on_to_its_new_end(run, tmp_path, monkeypatch):
    monkeypatch.setattr(RunFolder, "close", lambda *_: None)  # as if it were killed: no summary of what it did

    def stop(record):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resume(run, overrides=LONGER, on_round=stop)
    monkeypatch.undo()
    assert read_statement(run).charges == 6, "the summary of the shorter run does not contradict the ledger"
    assert resume(run)["rounds_completed"] == 4


def refused(run, overrides, match):
    before = (run / "config.toml").read_text(), (run / "summary.json").read_text()
    with pytest.raises(SettingError, match=match):
        resume(run, overrides=overrides)
    assert ((run / "config.toml").read_text(), (run / "summary.json").read_text()) == before


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        ({"lr": 0.1}, r"other settings \(lr\); num_rounds can grow, and .*workers can change; start a new run"),
        ({**LONGER, "seed": 5}, r"other settings \(seed\)"),
        ({"num_rounds": 1}, "num_rounds=1 is not possible .* began with num_rounds=2: a run can only be extended"),
        ({"workers": 2}, "workers=2 is not of any effect in .*, which is complete; .*--set num_rounds=3"),
    ],
)
def test_a_changed_setting_of_a_complete_run_is_never_ignored(run, overrides, match):
    refused(run, overrides, match)
    assert resume(run, overrides={"num_rounds": 2, "workers": 0})["status"] == "completed"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"noise_multiplier": 0.0, "target_epsilon": 5.0}, "calibrated to target_epsilon=5 for these rounds; .*retire"),
        ({"lr_schedule": "cosine"}, "lr_schedule='cosine' spans all rounds"),
        ({"optimizer": "random-freeze", "momentum": 0.0}, "optimizer='random-freeze' takes total_steps"),
        ({"optimizer": "dp-sat", "base_optimizer": "plugin.py:make"}, "base_optimizer='.*:make' takes total_steps"),
    ],
)
def test_a_run_that_the_number_of_rounds_shaped_from_its_start_is_not_extended(tmp_path, monkeypatch, changes, match):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plugin.py").write_text(PLUGIN)
    simulate(dataclasses.replace(CONFIG, num_clients=2, clients_per_round=0, **changes), tmp_path / "run")
    refused(tmp_path / "run", LONGER, match)


def test_a_run_without_the_states_of_its_clients_is_not_extended(run):
    shutil.rmtree(run / "state")
    refused(run, LONGER, "the states of its clients were deleted")


def test_a_run_that_failed_before_its_first_round_needs_no_states(tmp_path):
    def fail(record):
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        simulate(CONFIG, tmp_path / "run", on_round=fail)
    assert not (tmp_path / "run" / "state").exists()
    assert resume(tmp_path / "run", overrides={"num_rounds": 3})["rounds_completed"] == 3


def test_a_run_that_ended_early_says_why_it_cannot_go_on(tmp_path):
    few = {"budget_mode": "retire", "target_epsilon": 2.0, "clients_per_round": 0, "num_rounds": 8}
    assert simulate(dataclasses.replace(CONFIG, **few), tmp_path / "run")["ended_early"]
    refused(tmp_path / "run", {"num_rounds": 9}, "the run ended early: ")


def test_objects_from_python_are_given_again_to_an_extension(tmp_path):
    simulate(CONFIG, tmp_path / "run", optimizer=DPSGD(lr=1.0))
    simulate(dataclasses.replace(CONFIG, **LONGER), tmp_path / "whole", optimizer=DPSGD(lr=1.0))
    longer = dataclasses.replace(CONFIG, resume=True, **LONGER)
    assert simulate(longer, tmp_path / "run", optimizer=DPSGD(lr=1.0))["rounds_completed"] == 4
    assert ended(tmp_path / "run") == ended(tmp_path / "whole")


def test_the_built_in_plug_ins_that_take_the_number_of_rounds_are_known():
    from inspect import signature

    from fed_dpsat import plugins

    takes = {
        name
        for kind in plugins.PACKAGES
        for name, factory in plugins.builtin(kind).items()
        if {"num_rounds", "total_steps"} & signature(factory).parameters.keys()
    }
    assert takes == ONLY_FOR_A_SCHEDULE | {"random-freeze"}, "use it for lr_schedule alone, or for more?"
