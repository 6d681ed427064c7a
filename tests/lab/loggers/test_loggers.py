from __future__ import annotations

import dataclasses
import json
import sys

import pytest
from typer.testing import CliRunner

from fed_dpsat.cli import app
from fed_dpsat.errors import RunError
from fed_dpsat.plugins import PluginError
from fed_dpsat.run.folder import Checkpoint, RunFolder
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


def told(calls):
    return [call[1]["round"] for call in calls if call[0] == "round"]


def test_a_logger_finds_the_model_of_its_round(run, tmp_path, same_bits):
    """Each round moves the model, so that of the round before is another one."""
    plugin = tmp_path / "keeper.py"
    plugin.write_text(
        "import torch\n\nfound = []\n\n\nclass Keeper:\n    def begin(self, config, folder, next_round):\n"
        "        self.file = folder / 'checkpoint' / 'model.pt'\n\n    def round(self, record):\n"
        "        found.append((record['round'], torch.load(self.file, weights_only=True)))\n\n"
        "    def end(self, summary):\n        pass\n\n\ndef keeper():\n    return Keeper()\n"
    )
    folder = run(f"{plugin}:keeper")
    found = sys.modules["fed_dpsat_plugin_keeper"].found
    assert [(round, saved["round"]) for round, saved in found] == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert same_bits(found[-1][1]["params"], RunFolder(folder, resume=True).load_checkpoint().params)
    assert not same_bits(found[-1][1]["params"], found[-2][1]["params"])


@pytest.mark.parametrize(
    ("owner", "name", "when", "after", "first", "next_round", "second"),
    [
        pytest.param(RunFolder, "append_round", 2, False, [0, 1], 2, [2, 3], id="before the line"),
        pytest.param(RunFolder, "save_checkpoint", 2, False, [0, 1], 2, [2, 3], id="before the checkpoint"),
        pytest.param(Loggers, "round", 2, False, [0, 1], 2, [2, 3], id="between checkpoint and loggers"),
        pytest.param(Loggers, "round", 0, False, [], 0, [0, 1, 2, 3], id="before the first call"),
        pytest.param(Loggers, "round", 2, True, [0, 1, 2], 3, [3], id="after the loggers"),
        pytest.param(Loggers, "round", 3, False, [0, 1, 2], 3, [3], id="before the last call"),
    ],
)
def test_a_round_is_never_missed_after_a_kill(
    owner, name, when, after, first, next_round, second, run, spy, monkeypatch, tmp_path
):
    folder = tmp_path / "run"

    def at(given, *_):
        return (given.round if isinstance(given, Checkpoint) else given["round"]) == when

    whole = getattr(owner, name)

    def broken(self, given, *others):
        if after or not at(given):
            whole(self, given, *others)
        if at(given):
            raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, broken)
    with pytest.raises(KeyboardInterrupt):
        run(f"{spy}:spy")
    begun = list(spy.calls())
    assert begun[-1][1]["status"] == "interrupted"
    monkeypatch.setattr(owner, name, whole)
    resume(folder)
    resumed = spy.calls()  # of the file, imported again
    assert (told(begun), resumed[0][3], told(resumed)) == (first, next_round, second)
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    for record in (call[1] for call in resumed if call[0] == "round"):
        assert {k: v for k, v in record.items() if k != "timing"} == lines[record["round"]]
        assert record["timing"]["round"] == record["round"]


def test_a_kill_within_the_call_of_a_logger_tells_the_round_again(run, spy, monkeypatch, tmp_path):
    """Nobody knows what the logger did before it."""
    with pytest.raises(KeyboardInterrupt):
        run(f"{spy}:StopsAtRound")
    assert told(spy.calls()) == [0]
    resume(tmp_path / "run", overrides={"loggers": f"{spy}:spy"})
    assert told(spy.calls()) == [0, 1, 2, 3]


def test_loggers_may_change_when_a_run_is_resumed_and_bits_do_not_depend_on_them(run, spy, tmp_path, settings):
    folder = run(f"{spy}:spy")
    simulate(RunConfig.from_mapping(settings), tmp_path / "without")
    assert (folder / "rounds.jsonl").read_bytes() == (tmp_path / "without" / "rounds.jsonl").read_bytes()
    (folder / "summary.json").unlink()
    assert resume(folder, overrides={"loggers": ""})["status"] == "completed"
