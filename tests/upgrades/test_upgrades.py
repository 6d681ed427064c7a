"""Files of version 0.1.0 (README.md): read, never reset, and continued only if the bits are the same."""

from __future__ import annotations

import dataclasses
import importlib
import shutil
import sqlite3
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from typer.testing import CliRunner

from fed_dpsat import PrivacyEvent, PrivacyLedger, RunConfig, left, load_run, plugins, resume
from fed_dpsat.cli import app
from fed_dpsat.client.assignment import Assignment
from fed_dpsat.device.policy import Policy
from fed_dpsat.device.release import journal_path, ledger_path
from fed_dpsat.device.status import read_status
from fed_dpsat.errors import InputError, SettingError
from fed_dpsat.flower.client_app import app as client_app
from fed_dpsat.flower.grid import answer
from fed_dpsat.flower.wire import compat, records
from fed_dpsat.lab.sweep.execute import completed
from fed_dpsat.plugins import PluginError
from fed_dpsat.run.folder import RunFolder
from fed_dpsat.run.state_file import StateError, read_state
from fed_dpsat.run.statement import read_statement
from fed_dpsat.settings.flat import SPECS

EVENT = PrivacyEvent(noise_multiplier=3.0, sample_rate=0.2, steps=1)
EPSILON = 0.349427503484567
"""Of the two rounds, as 0.1.0 computed it."""


@pytest.fixture
def written(tmp_path) -> Path:
    return Path(shutil.copytree(Path(__file__).parent / "written", tmp_path / "written"))


def complete(written: Path) -> Path:
    (run,) = [path for path in (written / "sweep" / "runs").iterdir() if path.is_dir()]
    return run


def digest(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_settings_are_read_and_mean_the_same(written):
    config, stored = RunConfig.load(written / "settings.toml"), RunFolder(written / "interrupted", resume=True).config()
    same = {"out": "", "cache_dir": stored.cache_dir, "kernels": stored.kernels}  # stored as they were resolved
    assert dataclasses.replace(config, **same) == dataclasses.replace(stored, **same)
    assert (config.momentum, config.noise_distribution, config.task) == (0.5, "gaussian", "classification")


def test_a_run_is_read_with_its_account(written):
    run = load_run(written / "interrupted")
    assert (run.status, len(run.rounds), run.summary["ledger_head"]["charges"]) == ("interrupted", 3, 6)
    assert read_statement(written / "interrupted").epsilon == run.epsilon == pytest.approx(EPSILON, abs=1e-12)
    whole = load_run(complete(written))
    assert (whole.status, whole["noise_distribution"]) == ("completed", "gaussian")


def test_commands_show_old_runs(written):
    for arguments in (
        ["ledger", written / "interrupted"],
        ["resume", complete(written)],
        ["compare", written / "sweep"],
    ):
        result = CliRunner().invoke(app, [str(one) for one in arguments])
        assert result.exit_code == 0, result.output
        assert "Traceback" not in result.output


def test_spent_budget_of_a_run_is_kept_and_continued(written):
    with PrivacyLedger(written / "interrupted" / "ledger.sqlite") as ledger:
        ledger.verify()
        assert ledger.epsilon(1e-4) == pytest.approx(EPSILON, abs=1e-12)
        ledger.charge(0, 3, 0, EVENT)
        assert ledger.head.charges == 7
        assert ledger.epsilon(1e-4) > EPSILON
        ledger.verify()


@pytest.mark.parametrize("overrides", [None, {"num_rounds": 8}], ids=["resumed", "extended"])
def test_a_run_is_not_continued_to_other_bits_and_says_so(written, overrides):
    before = digest(written / "interrupted")
    with pytest.raises(SettingError) as error:
        resume(written / "interrupted", overrides=overrides, progress=False)
    said = one_line(error)
    assert "is not possible to the same bits" in said
    assert "began with fed-dpsat 0.1.0, this is" in said
    assert "use that version, or start a new run" in said
    assert digest(written / "interrupted") == before


def test_a_complete_run_does_not_count_in_a_sweep_that_goes_on(written):
    with pytest.raises(SettingError, match=r"began with fed-dpsat 0\.1\.0.* name another folder with --out") as error:
        completed(complete(written))
    one_line(error)


def test_the_model_of_a_run_without_a_list_of_inputs_says_so(written):
    with pytest.raises(InputError, match="use the version that started it") as error:
        load_run(complete(written)).model()
    one_line(error)


def test_a_client_state_of_another_form_says_so(written):
    with pytest.raises(StateError, match="not a client state of this version") as error:
        read_state(written / "interrupted" / "state" / "0" / "2.state")
    one_line(error)


def asked(written: Path, settings: dict, *, run: int, round: int = 3) -> Message:
    compat.identify_process(run_id=run, node_id=5)
    config = {"policy": str(written / "device" / "policy.toml")}
    context = Context(run_id=run, node_id=5, node_config=config, state=RecordDict(), run_config=settings)
    event = PrivacyEvent(noise_multiplier=2.0, sample_rate=0.5, steps=2)
    content = {**records.protocol_content()}
    content[records.ASSIGNMENT] = records.assignment_record(Assignment(round=round, event=event))
    network = plugins.build("model", "linear", {"shape": (1, 1, 2), "input_shape": (1, 1, 2), "num_classes": 2})
    content[records.ARRAYS] = records.to_arrays(dict(network.named_parameters()))
    return answer(client_app, Message(RecordDict(content), 5, MessageType.TRAIN), context)


SETTINGS = {
    **RunConfig(noise_source="system", noise_multiplier=2.0, delta=1e-4, num_clients=3, momentum=0.5).settings(),
    "dataset": "pixels",
}


def test_the_policy_and_the_account_of_a_device_are_read(written):
    status = read_status(Policy.load(written / "device" / "policy.toml"))
    assert (status.integrity, status.rounds, status.rounds_by_run) == ("unbroken", 2, {"7": 2})
    assert status.epsilon_spent == pytest.approx(2.0978, abs=1e-4)


def test_a_device_goes_on_with_its_account_in_a_new_run(written):
    assert not asked(written, SETTINGS, run=8, round=1).has_error()
    status = read_status(Policy.load(written / "device" / "policy.toml"))
    assert (status.rounds, status.rounds_by_run) == (3, {"7": 2, "8": 1})
    assert 2.0978 < status.epsilon_spent < status.epsilon_budget


def test_a_run_of_an_older_server_is_not_continued_on_a_device_and_costs_nothing(written):
    reply = asked(written, SETTINGS, run=7)
    assert "run 7 has other settings than at its start; start a new run" in reply.error.reason
    with PrivacyLedger(ledger_path(written / "device" / "device"), readonly=True) as ledger:
        assert ledger.head.charges == 2


def test_a_device_without_its_journal_keeps_its_account(written):
    """The account is the ledger alone: a reset would be a charge below the two that are there."""
    journal_path(written / "device" / "device").unlink()
    assert not asked(written, SETTINGS, run=8, round=1).has_error()
    with sqlite3.connect(ledger_path(written / "device" / "device")) as file:
        assert file.execute("SELECT round FROM charges ORDER BY seq").fetchall() == [(1,), (2,), (3,)]


@pytest.mark.parametrize(
    ("values", "instead"),
    [
        ({"image_column": "image"}, "it is input_columns now"),
        ({"ascent_memory": "server"}, "client keeps the direction on the client, and zero"),
    ],
    ids=["setting", "value"],
)
def test_a_setting_that_left_names_its_successor(values, instead):
    with pytest.raises(SettingError, match=instead) as error:
        RunConfig(**values)
    one_line(error)


def test_a_run_with_a_setting_that_left_is_not_read_otherwise(written):
    path = written / "interrupted" / "config.toml"
    path.write_text(path.read_text().replace('ascent_memory = "client"', 'ascent_memory = "server"'))
    for reading in (load_run, lambda path: resume(path, progress=False)):
        with pytest.raises(InputError, match="ascent_memory='server' is not one of client, zero; it left") as error:
            reading(written / "interrupted")
        one_line(error)


@pytest.mark.parametrize("name", ["fedexp", "low-pass"])
def test_a_strategy_that_left_names_its_successor(name):
    with pytest.raises(PluginError, match="so write fedavg"):
        plugins.load("strategy", name)


def test_a_plug_in_that_imports_a_module_that_moved_is_told_its_place(tmp_path):
    (tmp_path / "mine.py").write_text("from fed_dpsat.optimizers.dpsgd import DPSGD\n")
    for name in (f"{tmp_path / 'mine.py'}:DPSGD", "fed_dpsat.optimizers.dpsgd:DPSGD"):
        with pytest.raises(PluginError, match=r"fed_dpsat\.optimizers is fed_dpsat\.step\.optimizers now"):
            plugins.load("optimizer", name)


def test_each_successor_is_there_and_what_left_is_not():
    for key in left.SETTINGS:
        name, _, value = key.partition("=")
        assert (name in SPECS) == bool(value)
        assert value not in (*SPECS[name].metadata["choices"], *plugins.builtin("strategy")) if value else True
    for old, new in left.MODULES.items():
        assert importlib.import_module(new)
        assert importlib.util.find_spec(old.rpartition(".")[0]) is None or importlib.util.find_spec(old) is None


def test_the_records_of_0_1_0_have_no_charge(written):
    """An older server calls the assignment ``fed_dpsat.task``, and states no protocol."""
    node = {"policy": str(written / "device" / "policy.toml")}
    context = Context(run_id=8, node_id=5, node_config=node, state=RecordDict(), run_config=SETTINGS)
    compat.identify_process(run_id=8, node_id=5)
    task = ConfigRecord({"round": 1, "noise_multiplier": 2.0, "sample_rate": 0.5, "local_steps": 2, "attempt": 0})
    reply = answer(client_app, Message(RecordDict({"fed_dpsat.task": task}), 5, MessageType.TRAIN), context)
    assert "the server has fed-dpsat 0.1.0 or older" in reply.error.reason
    with PrivacyLedger(ledger_path(written / "device" / "device"), readonly=True) as ledger:
        assert ledger.head.charges == 2
