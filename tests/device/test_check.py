"""All that is wrong with a policy and can be told without a server: names, arguments, files, budget, data."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from fed_dpsat.cli import app
from fed_dpsat.device.check import advice, costliest_round, problems
from fed_dpsat.device.node import run_device
from fed_dpsat.device.policy import Policy, PolicyError


def call(*arguments):
    result = CliRunner().invoke(app, ["device", *map(str, arguments)])
    return result.exit_code, result.output


def test_a_right_policy_has_no_problems(device):
    assert problems(device.policy) == []
    device.write(
        models='["linear", "mlp"]', model_args='["hidden = 4"]', adapters='["lora", "ffa-lora"]',
        optimizers='["dp-sgd", "zeroth-order"]', optimizer_args='["directions = 2"]', clippings='["flat", "l1"]',
    )  # fmt: skip
    assert problems(Policy.load(device.policy_path)) == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"models": '["tanh-cnn-smal"]'}, "model='tanh-cnn-smal' is not a built-in model; did you mean tanh-cnn-small"),
        ({"models": '["none.py:model"]'}, "models: model='none.py:model': cannot import 'none.py'"),
        ({"tasks": '["clasification"]'}, "task='clasification' is not a built-in task; did you mean classification"),
        ({"optimizers": '["dp-sgdd"]'}, "optimizer='dp-sgdd' is not a built-in optimizer; did you mean dp-sgd"),
        ({"clippings": '["flatt"]'}, "clippings: clipping='flatt' is not a built-in clipping; did you mean flat"),
        ({"adapters": '["lorra"]'}, "adapters='lorra' is not known; did you mean lora"),
        ({"models": '["mlp"]', "model_args": '["hiden = 3"]'}, "model_args='hiden' is not known; did you mean hidden"),
        ({"optimizer_args": '["directions 2"]'}, "optimizer_args='directions 2' are no arguments"),
        ({"clipping_args": '["factor = 2"]'}, "clipping_args='factor' is not known"),
        ({"start_from": '"none.safetensors"'}, "none.safetensors' is not a file; write the path of the weights"),
        ({"server": '"localhost"'}, "server='localhost' is not of the form host:port"),
        ({"server": '"a:1"'}, "root_certificates is missing; `fed-dpsat device run` needs server, root_certificates"),
        ({"root_certificates": '"policy.toml"'}, "policy.toml' is not a certificate in PEM"),
        ({"private_key": '"policy.toml"'}, "policy.toml' is not a private key of ssh-keygen -t ecdsa"),
        ({"data_path": '"none.py:examples"'}, "none.py' (no file "),
        ({"content": '"text"', "data_source": '"csv"', "data_path": '"none.csv"'}, "none.csv' does not exist"),
    ],
)  # fmt: skip
def test_init_and_status_say_it_and_init_makes_no_ledger(device, changes, says):
    assert call("status", device.policy_path)[0] == 0
    device.write(**changes)
    code, text = call("status", device.policy_path)
    assert (code, f"error: {says}" in text or says in text) == (1, True)
    assert "epsilon spent" in text  # the budget is told whatever else is wrong
    assert any(says in said for said in json.loads(call("status", device.policy_path, "--json")[1])["problems"])
    device.write(**changes, folder='"another"')
    code, text = call("init", device.policy_path)
    assert (code, says in text) == (2, True)
    assert not (device.path / "another" / "ledger.sqlite").exists()


def test_everything_that_is_wrong_is_told_at_once(device):
    device.write(models='["linar"]', optimizers='["dp-sgdd"]', data_path='"none.py:examples"')
    assert call("init", device.policy_path)[1].count("error: ") == 3


def test_a_missing_column_is_told_by_its_file(device):
    (device.path / "own.csv").write_text("age,outcome\n40,ill\n")
    (device.path / "columns.toml").write_text("age = {mean = 50, std = 10}\n")
    table = {"content": '"table"', "data_source": '"csv"', "data_path": '"own.csv"', "columns_file": '"columns.toml"'}
    device.write(**table, class_names='["well", "ill"]', label_column='"outcom"', folder='"another"')
    assert "own.csv: no column 'outcom'; there are 'age', 'outcome'" in call("init", device.policy_path)[1]


def test_a_tokenizer_is_that_of_its_hash(device):
    (device.path / "tokenizer.json").write_text("{}")
    texts = {"content": '"text"', "data_source": '"csv"', "data_path": '"own.csv"', "tokenizer": '"tokenizer.json"'}
    device.write(**texts, tokenizer_sha256='"abc"', folder='"another"')
    assert "tokenizer_sha256='abc' is not" in call("init", device.policy_path)[1]


def test_a_device_does_not_connect_with_a_wrong_name(device):
    device.write(models='["linar"]', server='"127.0.0.1:1"', root_certificates='"a"', private_key='"b"')
    with pytest.raises(PolicyError, match="model='linar' is not a built-in model; did you mean linear"):
        run_device(device.policy_path)


def test_a_budget_that_protects_little_or_pays_for_nothing_is_told(device):
    assert advice(device.policy) == []
    device.write(largest_epsilon=50.0)
    assert ["largest_epsilon=50 is above 20" in said for said in advice(Policy.load(device.policy_path))] == [True]
    device.write(largest_epsilon=0.01)
    (said,) = advice(Policy.load(device.policy_path))
    assert "largest_epsilon=0.01 is below" in said
    device.write(largest_delta=0.05)
    (said,) = advice(Policy.load(device.policy_path))
    assert "largest_delta: delta=0.05 is not below 1/20" in said
    code, text = call("status", device.policy_path)
    assert (code, "warning: largest_delta: delta=0.05 is not below 1/20" in text) == (0, True)
    assert json.loads(call("status", device.policy_path, "--json")[1])["warnings"] == [said]
    device.write(data_path='"none.py:examples"')
    code, text = call("status", device.policy_path)
    assert (code, "none.py" in text, "warning" in text) == (1, True, False)


def test_the_costliest_round_is_that_of_all_limits_together(device):
    from fed_dpsat.accounting import PrivacyEvent, epsilon

    event = PrivacyEvent(noise_multiplier=1.0, sample_rate=0.5, steps=5)
    assert costliest_round(device.policy) == pytest.approx(epsilon([event], 1e-4, "rdp"))
    device.write(noise_distributions='["laplace"]')
    assert costliest_round(Policy.load(device.policy_path)) is None
