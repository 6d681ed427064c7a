"""A device of a table or of texts, by path and with declarations of its own; and a server that declares others."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from flwr.app import ConfigRecord, Context, MessageType, RecordDict
from flwr.serverapp import Grid

from fed_dpsat import plugins
from fed_dpsat.client.build import Experiment
from fed_dpsat.data.described.tokenizer import digest
from fed_dpsat.device.client import _experiment
from fed_dpsat.device.data import check_tokenizer, own_data
from fed_dpsat.device.policy import Policy, PolicyError
from fed_dpsat.errors import DataError, InputError
from fed_dpsat.flower.client_app import app
from fed_dpsat.flower.federation import run_federation
from fed_dpsat.flower.grid import answer
from fed_dpsat.flower.nodes import FederationError
from fed_dpsat.flower.wire import compat, records
from fed_dpsat.run.folder import RunFolder
from fed_dpsat.settings.config import RunConfig

ROWS = [
    f"{20 + 3 * i},{'fm'[i % 2]},{100 + 20 * i},{i % 2},{1 - i % 2},{'well' if i % 3 else 'ill'}" for i in range(12)
]
CSV = "\n".join(["age,sex,cost,a,b,outcome", *ROWS])
COLUMNS = "age = {mean = 40, std = 10}\nsex = {values = ['f', 'm']}\ncost = {mean = 150, std = 80}\n"
NOTES = [
    {"text": f"note {'abc'[i % 3] * (i + 1)}", "words": ["no", "te"], "tags": ["x", "y"], "label": "xy"[i % 2]}
    for i in range(12)
]
JSON_LINES = "".join(json.dumps(row) + "\n" for row in NOTES)
SERVER = {"dataset": "pixels", "noise_source": "system", "noise_multiplier": 2.0, "delta": 1e-4, "sample_rate": 0.5}
QUICK = "width = 4"


@pytest.fixture
def table(device):
    """The device has a table, and the policy for it."""
    (device.path / "own.csv").write_text(CSV)
    (device.path / "columns.toml").write_text(COLUMNS)

    def write(**changes):
        given = {
            "content": '"table"', "data_source": '"csv"', "data_path": '"own.csv"', "columns_file": '"columns.toml"',
            "input_columns": '["age", "sex"]', "label_column": '"outcome"', "class_names": '["well", "ill"]',
        }  # fmt: skip
        device.write(**{**given, **changes})
        return Policy.load(device.policy_path)

    return write


@pytest.fixture
def notes(device):
    """The device has texts, and the policy for them."""
    (device.path / "own.jsonl").write_text(JSON_LINES)

    def write(**changes):
        given = {
            "content": '"text"', "data_source": '"jsonl"', "data_path": '"own.jsonl"', "max_length": 16,
            "class_names": '["x", "y"]', "models": '["gru"]', "model_args": f'["{QUICK}"]',
        }  # fmt: skip
        device.write(**{**given, **changes})
        return Policy.load(device.policy_path)

    return write


@pytest.fixture
def server(tmp_path):
    """What a server says of its public data of the same form, and the parameters that it sends."""

    def say(dataset, arguments="", **settings):
        if "columns_file" in settings:
            (tmp_path / "theirs.toml").write_text(settings["columns_file"])
            settings["columns_file"] = str(tmp_path / "theirs.toml")
        given = {
            "data_path": str(tmp_path / "public"),
            "cache_dir": str(tmp_path / "cache"),
            "test_share": 0.5,
            **settings,
        }
        data = plugins.build("dataset", dataset, given, arguments)
        config = {key: settings[key] for key in ("task", "model", "model_args") if key in settings}
        experiment = Experiment.build(_config(**config), dataset=data)
        return {records.SAME: ConfigRecord(experiment.same)}, experiment.shared(1)

    return say


def _config(**changes):
    return RunConfig(**{**SERVER, "num_clients": 1, **changes})


def asked(device, said, changes):
    """The answer to the question who the device is."""
    return device.send(RecordDict(said), MessageType.QUERY, settings={**_config().settings(), **changes})


OF_TABLE = {"data_source": "csv", "label_column": "outcome", "class_names": "well, ill", "columns_file": COLUMNS}
OF_NOTES = {"data_source": "jsonl", "label_column": "label", "class_names": "x, y", "max_length": 16, "model": "gru"}


def public(tmp_path, content, name):
    (tmp_path / "public").mkdir(exist_ok=True)
    (tmp_path / "public" / name).write_text(content)


def test_a_table_trains_a_round_and_the_server_declares_the_same(device, table, server, tmp_path):
    table()
    public(tmp_path, CSV, "a.csv")
    said, params = server("table", **OF_TABLE, input_columns="age, sex")
    assert asked(device, said, {}).content[records.IDENTITY]["num_examples"] == 12
    reply = device.ask(params=params, extra=said)
    assert reply.has_content(), reply.error
    assert reply.content[records.METRICS]["num-examples"] == 12
    trained = records.to_params(reply.content.array_records[records.ARRAYS])
    assert {name: p.shape for name, p in trained.items()} == {name: p.shape for name, p in params.items()}
    assert not torch.equal(trained["1.weight"], params["1.weight"])


def test_texts_train_a_round_with_the_servers_declarations(device, notes, server, tmp_path):
    notes()
    public(tmp_path, JSON_LINES, "a.jsonl")
    said, params = server("text", **OF_NOTES, model_args=QUICK)
    changes = {"model": "gru", "model_args": QUICK}
    assert asked(device, said, changes).content[records.IDENTITY]["num_examples"] == 12
    reply = device.ask(params=params, extra=said, changes=changes)
    assert reply.has_content(), reply.error


class OneDevice(Grid):
    """A network of one node, which is a device."""

    def __init__(self, device, settings):
        compat.identify_process()
        self.device, self.settings = device, settings

    def get_node_ids(self):
        return [5]

    def send_and_receive(self, messages, *, timeout=None):
        for number, message in enumerate(messages):
            compat.set_message_id(message, f"message {number}")
            node = {"policy": str(self.device.policy_path)}
            yield answer(app, message, Context(7, 5, node, RecordDict(), self.settings))

    set_run = run = create_message = push_messages = pull_messages = None


def test_a_server_sends_what_it_declares_to_a_device_of_a_table(device, table, tmp_path):
    """With the same settings on both sides, from the question who the device is to the end of the run."""
    table(client=0, dataset='"table"', tasks='["regression"]', label_column='"cost"', class_names="[]")
    public(tmp_path, CSV, "a.csv")
    config = _config(
        dataset="table", data_source="csv", data_path=str(tmp_path / "public"), test_share=0.5, label_column="cost",
        columns_file=str(device.path / "columns.toml"), input_columns="age, sex", task="regression", num_rounds=2,
        join_timeout=0.01, cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    summary = run_federation(OneDevice(device, config.settings()), Experiment.build(config), RunFolder(tmp_path / "a"))
    assert summary["status"] == "completed"
    assert "test_rmse" in summary
    (tmp_path / "other.toml").write_text(COLUMNS.replace("std = 80", "std = 8"))
    config = dataclasses.replace(config, columns_file=str(tmp_path / "other.toml"))
    with pytest.raises(
        FederationError, match=r"label_scale: the run has \[\[150.0, 8.0\]\], which is not that of this"
    ):
        run_federation(OneDevice(device, config.settings()), Experiment.build(config), RunFolder(tmp_path / "b"))


@pytest.mark.parametrize(
    ("declared", "says"),
    [
        ({"class_names": "ill, well"}, 'class_names: the run has ["ill", "well"], which is not that of this device'),
        ({"columns_file": COLUMNS.replace("std = 10", "std = 11")}, "declare the same columns, encoding"),
        ({"columns_file": COLUMNS.replace("'f', 'm'", "'m', 'f'")}, "declare the same columns, encoding"),
        ({"input_columns": "sex, age"}, "declare the same columns, encoding"),
        ({"label_column": "cost", "task": "regression", "model": "linear"}, "choose the task and the label_column"),
    ],
)
def test_a_table_that_the_server_declares_otherwise_is_refused(device, table, server, tmp_path, declared, says):
    table()
    public(tmp_path, CSV, "a.csv")
    said, params = server("table", **{**OF_TABLE, "input_columns": "age, sex", **declared})
    for reply in (asked(device, said, {}), device.ask(params=params, extra=said)):
        assert says in reply.error.reason
    assert "refused" in device.log()[-1]
    assert device.ask(run=9, params=model_of(device)).has_content(), "nothing was charged, and it goes on"


def model_of(device):
    policy = Policy.load(device.policy_path)
    return _experiment(policy, policy.admit(9, _config().settings())).shared(1)


def test_the_scale_of_a_number_is_that_of_the_device_and_another_is_refused(device, table, server, tmp_path):
    policy = table(label_column='"cost"', tasks='["regression"]', class_names="[]")
    assert own_data(policy).label_scale == ((150.0, 80.0),)
    public(tmp_path, CSV, "a.csv")
    regression = {
        **OF_TABLE,
        "label_column": "cost",
        "class_names": "",
        "input_columns": "age, sex",
        "task": "regression",
    }
    said, params = server("table", **regression)
    assert device.ask(params=params, extra=said, changes={"task": "regression"}).has_content()
    regression["columns_file"] = COLUMNS.replace("std = 80", "std = 8")
    said, _ = server("table", **regression)
    reply = device.ask(params=params, extra=said, changes={"task": "regression"}, run=8)
    assert "label_scale: the run has [[150.0, 8.0]], which is not that of this device" in reply.error.reason


@pytest.mark.parametrize(
    ("declared", "says"),
    [
        ({"max_length": 32}, "max_length: the run has 32, which is not that of this device; set the same max_length"),
        ({"arguments": "add_special_tokens = true"}, "declare the same columns, encoding and special tokens on both"),
    ],
)
def test_texts_that_the_server_declares_otherwise_are_refused(device, notes, server, tmp_path, declared, says):
    notes()
    public(tmp_path, JSON_LINES, "a.jsonl")
    said, params = server("text", **{**OF_NOTES, "model_args": QUICK, **declared})
    changes = {"model": "gru", "model_args": QUICK}
    for reply in (asked(device, said, changes), device.ask(params=params, extra=said, changes=changes)):
        assert says in reply.error.reason


@pytest.fixture
def tokenizer(device):
    """A ``tokenizer.json`` on the device, and one of the same size that gives other numbers."""
    tokenizers = pytest.importorskip("tokenizers")
    for name, words in (("own", ["[PAD]", "[UNK]", "note", "a"]), ("other", ["[PAD]", "[UNK]", "a", "note"])):
        made = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, "[UNK]"))
        made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        made.save(str(device.path / f"{name}.json"))
    return {name: device.path / f"{name}.json" for name in ("own", "other")}


OF_LIBRARY = "pad_token = '[PAD]'"


def test_a_tokenizer_is_used_only_by_its_hash(device, notes, tokenizer):
    given = {"tokenizer": '"own.json"', "dataset_args": f'"{OF_LIBRARY}"'}
    sha256 = digest(str(tokenizer["own"]))
    for wrong in ({}, {"tokenizer_sha256": f'"{digest(str(tokenizer["other"]))}"'}):
        policy = notes(**given, **wrong)
        for use in (check_tokenizer, own_data):
            with pytest.raises(PolicyError, match=rf"tokenizer_sha256='.*' is not {sha256}, the SHA-256 of the files"):
                use(policy)
    reply = device.ask(changes={"model": "gru", "model_args": QUICK})
    assert "its own log has the reason" in reply.error.reason
    assert "tokenizer_sha256=" in "".join(device.log())
    policy = notes(**given, tokenizer_sha256=f'"{sha256}"')
    data = own_data(policy)
    assert data.tokenizer == sha256
    assert data.train.inputs["input_ids"].rows(torch.tensor([0])).values.tolist() == [2, 3]


def test_another_tokenizer_of_the_server_is_refused_and_its_file_is_never_read(
    device, notes, tokenizer, server, tmp_path, monkeypatch
):
    notes(tokenizer='"own.json"', tokenizer_sha256=f'"{digest(str(tokenizer["own"]))}"', dataset_args=f'"{OF_LIBRARY}"')
    public(tmp_path, JSON_LINES, "a.jsonl")
    changes = {"model": "gru", "model_args": QUICK, "tokenizer": str(tokenizer["other"])}
    theirs = {**OF_NOTES, "model_args": QUICK, "tokenizer": str(tokenizer["other"])}
    said, params = server("text", OF_LIBRARY, **theirs)
    assert "use the same files of a tokenizer on both" in asked(device, said, changes).error.reason
    said, _ = server("text", OF_LIBRARY, **{**theirs, "tokenizer": str(tokenizer["own"])})
    tokenizer["other"].unlink()
    assert device.ask(params=params, extra=said, changes=changes).has_content(), "the path of the server is ignored"


def test_a_folder_of_texts_by_class(device, notes):
    for label in "xy":
        (device.path / "texts" / label).mkdir(parents=True)
        for name in ("test-1", "2"):
            (device.path / "texts" / label / f"{name}.txt").write_text(f"{label} {name}")
    data = own_data(notes(data_source='"folder"', data_path='"texts"'))
    assert (len(data.train), len(data.test), data.name) == (4, 0, "pixels")
    assert data.train.labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("task", "content", "changes"),
    [
        ("classification", "table", {}),
        ("multilabel", "table", {"label_column": '"a, b"', "class_names": '["a", "b"]'}),
        ("regression", "table", {"label_column": '"cost"', "class_names": "[]"}),
        ("classification", "text", {}),
        ("token-classification", "text", {"input_columns": '["words"]', "label_column": '"tags"'}),
        ("causal-lm", "text", {"class_names": "[]"}),
    ],
)
def test_each_task_works_without_a_test_split(device, table, notes, task, content, changes):
    """The trial, the check of the task and a round."""
    policy = {"table": table, "text": notes}[content](tasks=f'["{task}"]', **changes)
    settings = {"task": task} | ({"model": "gru", "model_args": QUICK} if content == "text" else {})
    config = policy.admit(7, {**_config().settings(), **settings})
    assert len(own_data(policy, 7, task).test) == 0
    reply = device.ask(params=_experiment(policy, config, 7).shared(1), changes=settings)
    assert reply.has_content(), reply.error


def test_a_row_that_is_not_as_declared_stays_on_the_device(device, table):
    table()
    (device.path / "own.csv").write_text(CSV + "\n44,f,120,0,1,secret")
    reply = device.ask()
    assert "its own log has the reason" in reply.error.reason
    assert "secret" not in reply.error.reason
    assert "row 12: column 'outcome' has the label 'secret'" in "".join(device.log())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"content": '"images"'},
            "'csv' is not one of folder, parquet, images, function for content='images'",
        ),
        ({"content": '"video"'}, "content='video' is not one of images, table, text"),
        ({"data_source": '"hub"'}, "data_source='hub' is not one of csv, jsonl, parquet, function for content='table'"),
        ({"dataset_args": '"test_share = 0.5"'}, "all_private=True is not possible with test_share"),
        ({"dataset_args": '"max_length = 5"'}, "'max_length' is a setting of its own"),
        ({"columns_file": '"none.toml"'}, "none.toml' is not a file that exists; name the TOML file"),
        ({"label_column": '"nothing"'}, "no column 'nothing'; there are 'age', 'sex'"),
        ({"tasks": "[]"}, r"tasks=\(\) is not a list with a name"),
        ({"max_length": 0}, "max_length=0 is not at least 1"),
    ],
)
def test_a_policy_that_does_not_describe_the_data_is_told(table, changes, says):
    with pytest.raises(InputError, match=says):
        own_data(table(**changes))


def test_a_file_without_rows_is_told(device, table):
    (device.path / "own.csv").write_text(CSV.splitlines()[0] + "\n")
    with pytest.raises(DataError, match=r"own\.csv: there is no row"):
        own_data(table())
