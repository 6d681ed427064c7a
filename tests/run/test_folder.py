from __future__ import annotations

import json
import math
import os
import shutil

import pytest
import torch

from fed_dpsat.accounting.event import PrivacyEvent
from fed_dpsat.accounting.ledger import LedgerError, PrivacyLedger
from fed_dpsat.client.protocol import PROTOCOL
from fed_dpsat.errors import RunError, SettingError
from fed_dpsat.run.folder import PACKAGES, Checkpoint, RunFolder, jsonable, prepare, versions
from fed_dpsat.settings.config import RunConfig


def test_a_folder_with_something_in_it_is_refused(tmp_path):
    (tmp_path / "precious").write_text("x")
    with pytest.raises(SettingError, match=r"not new or empty.*--out"):
        RunFolder(tmp_path)


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_done(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(SettingError, match=r"run' is not a writable folder; name another folder"):
        RunFolder(tmp_path / "file" / "run")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(SettingError, match="not a writable folder"):
        RunFolder(tmp_path / "run")


def test_what_a_run_leaves_that_was_killed_before_it_began_is_in_nobodys_way(tmp_path):
    for name in ("environment.json", "config.toml.tmp"):
        (tmp_path / name).write_text("{")
    with pytest.raises(SettingError, match=r"killed before it wrote that starts again: fed-dpsat run"):
        RunFolder(tmp_path, resume=True)
    RunFolder(tmp_path).open(RunConfig(target_epsilon=3.0))
    assert RunFolder(tmp_path, resume=True).config().target_epsilon == 3.0


EVENT = PrivacyEvent(kind="poisson_gaussian", noise_multiplier=2.0, sample_rate=0.5, steps=1)


def begun(path, *, charged=False, rounds=(0,), **settings):
    """The folder of a run that wrote ``rounds`` and, if ``charged``, charged a client."""
    folder = RunFolder(path)
    folder.open(RunConfig(target_epsilon=3.0, **settings))
    with PrivacyLedger(folder.ledger_path) as ledger:
        if charged:
            ledger.charge(0, 1, 0, EVENT)
    for number in rounds:
        folder.append_round({"round": number}, {"round": number})
    return folder


def test_a_folder_in_which_nothing_was_trained_is_used_again(tmp_path):
    begun(tmp_path / "run").save_checkpoint(Checkpoint(round=0, params={}, server={}))
    folder = RunFolder(tmp_path / "run")
    assert folder.rounds() == [{"round": 0}]  # nothing is deleted before the new run begins
    folder.open(RunConfig(target_epsilon=4.0))
    assert folder.config().target_epsilon == 4.0
    assert folder.rounds() == []
    assert not folder.checkpoint_path.exists()
    assert not folder.ledger_path.exists()


@pytest.mark.parametrize("trained", [{"charged": True}, {"rounds": (0, 1)}])
def test_a_folder_in_which_something_was_trained_is_overwritten_only_if_asked(tmp_path, trained, caplog):
    begun(tmp_path / "run", **trained)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(
        SettingError, match=r"not new or empty; .*`fed-dpsat resume .*/run`, or replace it: --overwrite"
    ):
        RunFolder(tmp_path / "run")
    folder = RunFolder(tmp_path / "run", overwrite=True)
    before = sorted((tmp_path / "run").rglob("*"))
    folder.open(RunConfig(target_epsilon=4.0))
    assert folder.config().target_epsilon == 4.0
    assert not folder.ledger_path.exists()
    assert not (tmp_path / "run" / "rounds.jsonl").exists()
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    assert ("deleted with the 1 charges in its ledger" in caplog.text) == ("charged" in trained)
    assert before != sorted((tmp_path / "run").rglob("*"))


def test_a_lost_ledger_is_not_taken_for_one_without_a_charge(tmp_path):
    begun(tmp_path / "run").ledger_path.unlink()
    with pytest.raises(SettingError, match="not new or empty"):
        prepare(tmp_path / "run")


def test_what_must_stay_is_not_overwritten(tmp_path):
    begun(tmp_path / "secret", charged=True, noise_source="system")
    with pytest.raises(SettingError, match=r"overwrite=True is not possible .*'system'.*its charges must be kept"):
        RunFolder(tmp_path / "secret", overwrite=True)
    linked = begun(tmp_path / "linked", charged=True).ledger_path
    os.link(linked, tmp_path / "shared.sqlite")
    with pytest.raises(SettingError, match=r"a ledger of its own \(.*ledger.sqlite is a link\)"):
        prepare(tmp_path / "linked", overwrite=True)
    (tmp_path / "mine").mkdir()
    for name in ("config.toml", "environment.json"):
        (tmp_path / "mine" / name).write_text("{}")
    with pytest.raises(SettingError, match="not new or empty; name another"):
        prepare(tmp_path / "mine", overwrite=True)


def test_a_folder_in_which_a_run_trains_is_not_taken_away_from_it(tmp_path):
    path = begun(tmp_path / "run").ledger_path
    with PrivacyLedger(path), pytest.raises(LedgerError, match="another process writes to it"):
        prepare(tmp_path / "run", overwrite=True)


def test_a_deletion_that_was_interrupted_leaves_a_folder_that_can_be_prepared_again(tmp_path):
    folder = begun(tmp_path / "run", charged=True)
    files = prepare(tmp_path / "run", overwrite=True)
    assert [file.name for file in files][-2:] == ["config.toml", "environment.json"]
    for file in files:
        assert file in prepare(tmp_path / "run", overwrite=True)
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    assert prepare(folder.path) == []


def test_a_full_disk_is_an_error_that_says_what_to_do_and_leaves_what_was_there(tmp_path, full_disk):
    folder = RunFolder(tmp_path / "run")
    folder.open(RunConfig(target_epsilon=3.0))
    saved = Checkpoint(round=1, params={"w": torch.ones(2)}, server={})
    folder.save_checkpoint(saved)
    path = str(tmp_path / "run")
    with full_disk(20_000):
        with pytest.raises(RunError, match=rf"cannot write {path}/checkpoint/model.pt: File too large; free space"):
            folder.save_checkpoint(Checkpoint(round=2, params={"w": torch.ones(100_000)}, server={}))
        with pytest.raises(RunError, match=rf"cannot write {path}/rounds.jsonl: File too large"):
            folder.append_round({"round": 0, "dropped": "x" * 30_000}, {"round": 0})
        with pytest.raises(RunError, match=rf"cannot write {path}/summary.json: File too large"):
            folder.close({"text": "x" * 30_000})
    assert folder.load_checkpoint().round == 1
    assert folder.rounds() == []
    assert folder.summary() == {}


def test_nothing_is_written_before_it_is_opened(tmp_path):
    RunFolder(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_is_written_can_be_read(tmp_path):
    folder = RunFolder(tmp_path / "run")
    config = RunConfig(target_epsilon=3.0)
    folder.open(config)
    assert RunFolder(tmp_path / "run", resume=True).config() == config
    for number in range(3):
        folder.append_round({"round": number, "epsilon": math.inf}, {"round": number, "seconds": 0.1})
        lines = (tmp_path / "run" / "rounds.jsonl").read_text()
        assert lines.endswith("\n")
        assert [json.loads(line)["round"] for line in lines.splitlines()] == list(range(number + 1))
    folder.save_checkpoint(Checkpoint(round=2, params={"w": torch.ones(2)}, server={"seen": [1]}))
    loaded = torch.load(folder.checkpoint_path, weights_only=True)
    assert loaded["round"] == 2
    assert torch.equal(loaded["params"]["w"], torch.ones(2))
    folder.close({"epsilon": math.inf})
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == {"epsilon": "inf"}
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["device"] == "cpu"
    assert environment["packages"]["torch"] == torch.__version__.split("+")[0] or environment["packages"]["torch"]


def test_versions_of_extras_are_written_down_if_they_are_installed(monkeypatch):
    monkeypatch.setattr("fed_dpsat.run.folder.EXTRAS", ("pytest", "a-package-that-is-nowhere"))
    assert versions().keys() == {*PACKAGES, "pytest"}


def test_what_json_cannot_hold_becomes_text():
    assert jsonable({1: [math.inf, 0.5, (math.nan,)]}) == {"1": ["inf", 0.5, ["nan"]]}


def test_rounds_are_read_back_without_a_line_that_was_cut_short(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.rounds() == []
    folder.append_round({"round": 0, "epsilon": float("inf")}, {"round": 0})
    (tmp_path / "rounds.jsonl").open("a").write('{"round": 1, "eps')
    assert folder.rounds() == [{"round": 0, "epsilon": "inf"}]


RESUMED = {"setting": "resume", "value": True, "again": "start a new run"}


def test_a_run_of_another_protocol_is_not_continued(tmp_path):
    folder = begun(tmp_path / "run")
    folder.check_version(**RESUMED)
    path = folder.path / "environment.json"
    environment = json.loads(path.read_text())
    path.write_text(json.dumps({**environment, "protocol": PROTOCOL + 1}))
    resumed = RunFolder(folder.path, resume=True)
    for refused in (lambda: folder.check_version(**RESUMED), lambda: resumed.open(resumed.config())):
        with pytest.raises(SettingError, match=r"not possible to the same bits: .*/run began with fed-dpsat"):
            refused()


def test_other_packages_that_decide_bits_are_told(tmp_path, caplog):
    folder = begun(tmp_path / "run")
    folder.check_version(**RESUMED)
    assert not caplog.records
    path = folder.path / "environment.json"
    environment = json.loads(path.read_text())
    path.write_text(json.dumps({**environment, "packages": {**environment["packages"], "torch": "1.0"}}))
    folder.check_version(**RESUMED)
    assert f"began with torch 1.0 (now {versions()['torch']}): later rounds can have other bits" in caplog.text


def test_a_new_run_keeps_the_folder_of_states_that_workers_have_seen(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.state_path.mkdir(parents=True)
    folder.open(RunConfig(target_epsilon=4.0))
    assert folder.state_path.is_dir()
