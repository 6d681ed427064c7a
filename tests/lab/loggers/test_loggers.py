from __future__ import annotations

import dataclasses
import json
import sys

import pytest
from typer.testing import CliRunner

from fed_dpsat.cli import app
from fed_dpsat.errors import RunError
from fed_dpsat.plugins import PluginError
from fed_dpsat.run.folder import RunFolder
from fed_dpsat.run.loggers import Loggers
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.simulation import resume, simulate

CONFIG = RunConfig(noise_multiplier=1.0)


def test_none_is_the_default_and_spaces_do_not_matter(spy):
    assert not Loggers.of(CONFIG)
    assert not Loggers.of(dataclasses.replace(CONFIG, loggers=" , "))
    assert Loggers.of(dataclasses.replace(CONFIG, loggers=f" {spy}:spy ,"))


@pytest.mark.parametrize(
    ("loggers", "words"),
    [
        ("tensorbord", "did you mean tensorboard"),
        ("nothing:here", "cannot import"),
        ("pathlib:Path", "without begin()"),
    ],
)
def test_a_name_that_is_no_logger(loggers, words, tmp_path):
    config = dataclasses.replace(CONFIG, loggers=loggers)
    with pytest.raises(PluginError) as error:
        simulate(config, tmp_path / "run")
    assert words in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "wandb"])
def test_a_missing_package_ends_in_words_before_anything_is_written(name, tmp_path, monkeypatch):
    for module in ("tensorboard", "torch.utils.tensorboard", "mlflow", "wandb"):
        monkeypatch.setitem(sys.modules, module, None)
    arguments = ["run", "--out", str(tmp_path / "run"), "--set", "noise_multiplier=2", "--set", f"loggers={name}"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert f"pip install 'fed-dpsat[{name}]'" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "at"), [("BreaksAtRound", "round 0"), ("BreaksAtEnd", "the end")])
def test_one_that_raises_is_warned_of_once_and_the_run_and_the_others_go_on(name, at, run, spy, caplog, tmp_path):
    beside = tmp_path / "beside.py"
    beside.write_text((tmp_path / "spy_file.py").read_text())
    folder = run(f"{spy}:{name}, {beside}:spy", dropout_rate=0.0)
    assert json.loads((folder / "summary.json").read_text())["status"] == "completed"
    assert len((folder / "rounds.jsonl").read_text().splitlines()) == 4
    (warning,) = caplog.messages
    assert f"{name} failed at {at} (OSError: " in warning
    assert [call[0] for call in sys.modules["fed_dpsat_plugin_beside"].calls] == ["begin", *["round"] * 4, "end"]
    assert sys.modules["fed_dpsat_plugin_beside"].calls[1][1]["round"] == 0
    told = [call[0] for call in spy.calls()]
    assert told == ["begin", "round"] if name == "BreaksAtRound" else ["begin", *["round"] * 4, "end"]


def test_one_that_cannot_begin_ends_the_run_before_a_client_is_asked(run, spy, tmp_path):
    with pytest.raises(RunError, match=r"cannot start .OSError: no such server.; repair it, or continue without"):
        run(f"{spy}:BreaksAtBegin")
    folder = tmp_path / "run"
    assert not (folder / "rounds.jsonl").exists()
    assert resume(folder, overrides={"loggers": ""})["rounds_completed"] == 3


def test_a_resumed_run_goes_on_after_its_last_checkpoint(run, spy, monkeypatch, tmp_path):
    save, folder = RunFolder.save_checkpoint, tmp_path / "run"

    def killed(self, checkpoint):
        if checkpoint.round == 2:
            raise KeyboardInterrupt
        save(self, checkpoint)

    monkeypatch.setattr(RunFolder, "save_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        run(f"{spy}:spy")
    first = list(spy.calls())
    assert first[-1][1]["status"] == "interrupted"
    monkeypatch.setattr(RunFolder, "save_checkpoint", save)
    resume(folder)
    second = spy.calls()  # of the file, imported again
    assert second[0][3] == 2
    told = [call[1]["round"] for call in first + second if call[0] == "round"]
    assert told == [0, 1, 2, 2, 3]  # the one that was cut off is told again: none is missing
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert [call[1]["test_loss"] for call in second if call[0] == "round"] == [line["test_loss"] for line in lines[2:]]


def test_loggers_may_change_when_a_run_is_resumed_and_bits_do_not_depend_on_them(run, spy, tmp_path, settings):
    folder = run(f"{spy}:spy")
    simulate(RunConfig.from_mapping(settings), tmp_path / "without")
    assert (folder / "rounds.jsonl").read_bytes() == (tmp_path / "without" / "rounds.jsonl").read_bytes()
    (folder / "summary.json").unlink()
    assert resume(folder, overrides={"loggers": ""})["status"] == "completed"
