"""A run in Python: its model is the trained one, whatever the run was made of, and it shows itself."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from torch import nn

import fed_dpsat
from fed_dpsat.data.digits import digits
from fed_dpsat.errors import RunError, SettingError
from fed_dpsat.run.folder import RunFolder
from fed_dpsat.run.reading import load_run
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.simulation import simulate
from fed_dpsat.step.optimizers import DPSGD

CONFIG = RunConfig(num_clients=3, num_rounds=2, noise_multiplier=1.0, delta=1e-3, lr=8.0, sample_rate=0.1)


def network(seed=0, width=10):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, width))


def accuracy_of(model):
    inputs, labels = digits().test.batch(torch.arange(360), torch.device("cpu"))
    with torch.no_grad():
        return float((model(inputs).argmax(1) == labels).double().mean())


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return simulate(CONFIG, tmp_path_factory.mktemp("result") / "run")


@pytest.fixture
def copy(done, tmp_path):
    return shutil.copytree(done.path, tmp_path / "copy")


def test_what_is_loaded_is_what_was_returned(done):
    run = fed_dpsat.load_run(str(done.path))
    assert (run.config.num_rounds, run.status, run.path) == (2, "completed", done.path)
    assert (run.rounds, run.timing, run.epsilon) == (done.rounds, done.timing, done.epsilon)
    assert run == done == json.loads((done.path / "summary.json").read_text())
    assert (run["test_accuracy"], run.get("nothing"), "epsilon" in run) == (done.summary["test_accuracy"], None, True)


def test_the_model_is_the_trained_one(done):
    run = load_run(done.path)
    model = run.model()
    assert accuracy_of(model) == run["test_accuracy"] != accuracy_of(done.module)
    assert not model.training
    assert same(model, done.model())
    with torch.no_grad():
        model[1].weight.zero_()
    assert accuracy_of(run.model()) == accuracy_of(done.model()) == run["test_accuracy"]


def test_a_run_with_objects_gives_its_model_and_loads_it_into_a_network_that_is_given(tmp_path):
    done = simulate(CONFIG, tmp_path / "run", dataset=digits(), model=network(), optimizer=DPSGD(lr=4.0))
    run = load_run(tmp_path / "run")
    given = network()
    assert accuracy_of(done.model()) == accuracy_of(run.model(given)) == run["test_accuracy"]
    assert same(given, network())
    with pytest.raises(SettingError, match=r"it was given dataset, model, optimizer; in Python, load_run\(.*network"):
        run.model()
    with pytest.raises(SettingError, match=r"3.weight is \[10, 8\] there, and it has \[11, 8\]"):
        run.model(network(width=11))
    with pytest.raises(SettingError, match=r"3.weight is .* there, and it has no such parameter"):
        run.model(network()[:2])


def test_frozen_layers_of_another_network_are_refused(tmp_path):
    """They are in no file: only their digest is."""
    config = dataclasses.replace(CONFIG, train_layers="head")
    done = simulate(config, tmp_path / "run", model=network())
    run = load_run(tmp_path / "run")
    assert same(run.model(network()), done.model())
    assert torch.equal(done.model()[1].weight, network()[1].weight)
    with pytest.raises(RunError, match="the frozen layers of its model are other ones"):
        run.model(network(seed=1))


def test_a_head_that_stays_with_clients_is_in_no_model(tmp_path):
    done = simulate(dataclasses.replace(CONFIG, personal_layers="head", model="mlp"), tmp_path / "run")
    for run in (done, load_run(done.path)):
        with pytest.raises(SettingError, match="personal_layers='head' stay with its clients"):
            run.model()


def test_of_a_killed_run_everything_is_there_that_is_on_disk(copy, done):
    (copy / "summary.json").unlink()
    run = load_run(copy)
    assert run.picture() == done.picture() != ""
    assert (run.status, dict(run), bool(run), len(run.rounds)) == ("unfinished", {}, True, 3)
    assert run.ledger().epsilon == run.epsilon == done.epsilon
    assert same(run.model(), done.model())
    assert "2 of 2, unfinished" in repr(run)
    shutil.rmtree(copy / "checkpoint")
    with pytest.raises(RunError, match="has no checkpoint; resume it"):
        load_run(copy).model()


def test_a_run_without_a_round_is_readable(tmp_path):
    RunFolder(tmp_path / "run").open(CONFIG)
    run = load_run(tmp_path / "run")
    assert (run.rounds, list(run.table().index), run.picture()) == ((), [], "")
    assert "not evaluated" in repr(run)
    assert "unknown: there is no ledger" in repr(run)
    assert "0 of 2, unfinished" in run._repr_html_()


def test_the_model_of_a_run_that_was_replaced_is_not_that_of_the_next(tmp_path):
    """As of a cell that runs again: the folder has another model now."""
    first = simulate(CONFIG, tmp_path / "run")
    second = simulate(dataclasses.replace(CONFIG, lr=1.0), tmp_path / "run", overwrite=True)
    assert accuracy_of(second.model()) == second["test_accuracy"]
    for ask in (first.model, first.ledger):
        with pytest.raises(RunError, match="has changed since this run was read"):
            ask()


def test_clients_are_numbers(tmp_path):
    config = dataclasses.replace(CONFIG, dropout_rate=0.5)
    seen = []
    done = simulate(config, tmp_path / "run", on_round=seen.append)
    assert [line["dropped"] for line in done.rounds] == [record["dropped"] for record in seen]
    assert {type(client) for line in done.rounds for client in line["dropped"]} == {int}


def test_the_table_has_a_row_for_each_round(done):
    table = done.table()
    assert list(table.index) == [0, 1, 2]
    assert table["test_accuracy"].iloc[-1] == done["test_accuracy"]
    assert list(table["epsilon"]) == [line["epsilon"] for line in done.rounds]


def test_the_ledger_is_that_of_the_run(done):
    statement = done.ledger()
    assert (statement.epsilon, len(statement.clients)) == (done.epsilon, 3)


def test_it_shows_itself(done):
    lines = repr(done).splitlines()
    assert lines[0] == f"Run in {done.path}"
    assert lines[1].startswith("  test accuracy  ")
    assert "95 % interval" in lines[1]
    assert "(360 examples)" in lines[1]
    assert f"{done.epsilon:.4g} at delta 0.001 (PLD)" in lines[2]
    page = done._repr_html_()
    assert page.count("<table>") == page.count("</table>") == page.count("<svg") == page.count("</svg>") == 1
    assert str(done.path) in page


def test_without_noise_epsilon_is_infinite(tmp_path):
    done = simulate(RunConfig(num_clients=2, num_rounds=1, private=False), tmp_path / "run")
    assert "∞, without noise" in repr(done)
    assert "noise  " not in repr(done)


def test_the_name_of_a_folder_is_no_html(copy):
    folder = copy.rename(copy.with_name("<b>bold"))
    assert "&lt;b&gt;bold" in load_run(folder)._repr_html_()
    assert "<b>bold" not in load_run(folder)._repr_html_()
