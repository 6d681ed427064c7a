"""When a release of flwr is added to those that were tested, this says which internal broke."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import flwr
import numpy as np
import pytest
from flwr.app import ArrayRecord, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy

from fed_dpsat.errors import InputError
from fed_dpsat.flower.grid import SimulationGrid
from fed_dpsat.flower.wire import compat
from fed_dpsat.flower.wire.compat import versions
from fed_dpsat.simulation.in_process import InProcessBackend

ROOT = Path(__file__).parents[2]
PUBLIC = {"flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.serverapp.strategy"}


@pytest.fixture
def flower_of(monkeypatch):
    """Pretend to another release of Flower, which has not been spoken of."""

    def use(version):
        monkeypatch.setattr(flwr, "__version__", version)
        versions.say_untested.cache_clear()

    yield use
    versions.say_untested.cache_clear()


def test_no_other_module_knows_what_is_inside_flower():
    """``import flwr`` for its version too is the business of ``compat``."""
    found = {}
    for path in [*ROOT.glob("fed_dpsat/**/*.py"), *ROOT.glob("strategies/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            inside = {name for name in names if name and name.split(".")[0] == "flwr"} - PUBLIC
            if inside and path.parent != ROOT / "fed_dpsat" / "flower" / "wire" / "compat":
                found[str(path)] = inside
    assert found == {}


def test_the_tested_releases_are_the_first_that_is_allowed_and_the_one_that_make_installs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (wanted,) = (name for name in project["dependencies"] if re.match(r"flwr[\[>]", name))
    assert f">={versions.TESTED[0]}," in wanted
    assert f"\nflwr=={versions.TESTED[-1]}." in (ROOT / "constraints.txt").read_text()


@pytest.mark.parametrize("version", ["1.41.0", "1.42.0", "1.42.9", "1.42.0.dev20261101"])
def test_a_tested_release_goes_without_a_word(version, flower_of, caplog):
    flower_of(version)
    compat.say_untested()
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("1.43.0", "flwr 1.43.0 is newer than 1.42, the newest that was tested"),
        ("1.100.0rc1", "flwr 1.100.0rc1 is newer than 1.42, the newest that was tested"),
        ("2.0", "flwr 2.0 is newer than 1.42, the newest that was tested"),
        ("1.40.1", "flwr 1.40.1 is older than 1.41, the oldest that was tested"),
        ("unknown", "flwr unknown is of an unknown release; 1.42 is the newest that was tested"),
        ("0.99", "flwr 0.99 is older than 1.41, the oldest that was tested"),
    ],
)
def test_another_release_is_spoken_of_once(version, said, flower_of, caplog):
    flower_of(version)
    compat.say_untested()
    compat.say_untested()
    assert caplog.text.count(said) == 1


def test_a_missing_name_or_module_of_flower_is_named():
    said = r"^flwr 1\.\d+\.\d+ has no flwr\.supercore\.%s, which fed_dpsat needs; it was tested with 1\.41 and 1\.42"
    with pytest.raises(InputError, match=said % r"run\.Walk"), versions.internals():
        from flwr.supercore.run import Walk  # noqa: F401
    with pytest.raises(InputError, match=said % "walk"), versions.internals():
        import flwr.supercore.walk  # noqa: F401


def test_a_missing_module_of_somebody_else_is_not_laid_at_flowers_door():
    with pytest.raises(ModuleNotFoundError, match="no_such_module"), versions.internals():
        import no_such_module  # noqa: F401


@pytest.mark.parametrize(
    ("touched", "instead", "named"),
    [
        ("TaskIdentity", SimpleNamespace(), "TaskIdentity.run_id"),
        ("ArrayRecord", SimpleNamespace, "ArrayRecord._data"),
        ("Run", object, "Run.create_empty"),
        (
            "Message",
            lambda *_: SimpleNamespace(metadata=SimpleNamespace(run_id=1, src_node_id=1)),
            "Metadata._message_id",
        ),
        ("MessageType", SimpleNamespace(TRAIN="walk"), "message for this TaskIdentity"),
    ],
)
def test_what_has_another_name_is_named_before_a_run_begins(touched, instead, named, monkeypatch):
    compat.act_for(7, 8, 9)
    monkeypatch.setattr(compat, touched, instead)
    with pytest.raises(versions.FlowerError, match=f"has no {re.escape(named)}.*pip install 'flwr==1.42"):
        SimulationGrid(InProcessBackend(ClientApp(), {}, 1), 1)


@pytest.mark.slow
def test_a_command_says_in_one_line_what_is_missing(tmp_path):
    code = (
        "import sys, flwr.app, flwr.supercore.task_identity as module; del module.TaskIdentity; "
        "from fed_dpsat.cli import app; app(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, "run", str(ROOT / "simulations" / "digits_dpsat.toml"), "--out", "run"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: flwr 1.")
    assert "has no flwr.supercore.task_identity.TaskIdentity, which fed_dpsat needs" in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_process_can_say_who_it_is_and_create_messages():
    compat.identify_process(run_id=7, node_id=8)
    message = Message(RecordDict(), 9, MessageType.TRAIN)
    assert (message.metadata.run_id, message.metadata.src_node_id) == (7, 8)
    compat.identify_process()


def test_a_message_id_can_be_set_and_is_what_a_reply_refers_to():
    compat.identify_process()
    message = Message(RecordDict(), 9, MessageType.TRAIN)
    compat.set_message_id(message, "42")
    assert Message(RecordDict(), reply_to=message).metadata.reply_to_message_id == "42"


def test_a_run_can_be_empty():
    assert compat.empty_run().run_id == compat.SIMULATION_RUN_ID


def test_error_codes_are_there():
    assert {compat.ErrorCode.CLIENT_APP_RAISED_EXCEPTION, compat.ErrorCode.NODE_UNAVAILABLE} == {2, 5}


def test_the_grid_and_the_strategy_have_the_methods_that_are_implemented():
    assert Grid.__abstractmethods__ == {
        "set_run", "run", "create_message", "get_node_ids", "push_messages", "pull_messages", "send_and_receive",
    }  # fmt: skip
    assert Strategy.__abstractmethods__ == {
        "configure_train", "aggregate_train", "configure_evaluate", "aggregate_evaluate", "summary",
    }  # fmt: skip


def test_the_loop_calls_evaluate_fn_before_the_first_and_after_each_round():
    source = inspect.getsource(Strategy.start)
    assert source.count("evaluate_fn(") == 2


def test_stock_strategies_have_the_sampling_settings_that_are_overruled():
    names = {"fraction_train", "fraction_evaluate", "min_train_nodes", "min_evaluate_nodes", "min_available_nodes"}
    assert names <= set(vars(FedAvg()))


def test_a_record_of_arrays_is_the_one_that_is_set_item_by_item():
    arrays = {"b": np.arange(3.0), "a": np.zeros((2, 1), dtype=np.int64)}
    record, expected = compat.record_of(arrays), ArrayRecord()
    for name, array in arrays.items():
        expected[name] = compat.Array(array)
    assert record == expected
    assert list(compat.items(record)) == list(expected.items())
    assert list(record) == ["b", "a"]
    assert record.object_id == expected.object_id
