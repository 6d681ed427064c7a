"""A run that is resumed is refused with another plug-in, table, data set or object than it began with, by name."""

from __future__ import annotations

import dataclasses
import importlib
import shutil
import sys

import pytest
import torch
from torch import nn

from fed_dpsat import RunConfig, simulate
from fed_dpsat.client.build import Experiment
from fed_dpsat.data.digits import digits
from fed_dpsat.errors import SettingError
from fed_dpsat.lab.report.sharpness import measure_run
from fed_dpsat.plugins import PluginError
from fed_dpsat.run.folder import RunFolder
from fed_dpsat.run.inputs import inputs_of
from fed_dpsat.simulation import resume
from fed_dpsat.step.optimizers import DPSGD

CONFIG = RunConfig(num_clients=3, num_rounds=1, noise_multiplier=1.0, delta=1e-4)
SGD = "from fed_dpsat.step.optimizers import DPSGD\nRATE = 0.5\ndef make(): return DPSGD(lr=RATE)\n"
FLAT = "from fed_dpsat.step.clipping import FlatClipping\ndef make(): return FlatClipping(clip_norm=0.5)\n"
PARTS = "import numpy as np\ndef make(labels): return np.split(np.arange(len(labels)), [9, 20])\n"
PLUGINS = {
    "optimizer": (SGD, "0.5", "5.0"),
    "base_optimizer": (SGD, "0.5", "5.0"),
    "clipping": (FLAT, "0.5", "0.4"),
    "model": ("from torch import nn\ndef make(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n", "10", "11"),
    "task": ("from fed_dpsat.tasks.classification import Classification as make\n", "as make", "as  make"),
    "dataset": ("from fed_dpsat.data.digits import digits\ndef make(): return digits()\n", "digits()\n", "digits() \n"),
    "partition": (PARTS, "9", "8"),
    "strategy": ("from flwr.serverapp.strategy import FedAdam\ndef make(): return FedAdam(eta=0.1)\n", "0.1", "0.2"),
    "attack": ("from fed_dpsat.lab.attacks.scaling import Scaling\ndef make(): return Scaling(factor=2)\n", "2", "3"),
}


def stop(record):
    raise KeyboardInterrupt


def begun(config, folder, **objects):
    with pytest.raises(KeyboardInterrupt):
        simulate(config, folder, on_round=stop, **objects)
    return folder


def with_plugin(kind, name):
    more = {"attackers": 0.4} if kind == "attack" else {}
    return dataclasses.replace(CONFIG, **{kind: name}, **more)


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def before_and_after(folder):
    """All that a refused resume must leave as it is."""
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("kind", PLUGINS)
def test_an_edited_plugin_is_refused_by_name_and_the_copy_brings_it_back(tmp_path, kind):
    text, old, new = PLUGINS[kind]
    file = tmp_path / "plugin.py"
    file.write_text(text)
    folder = begun(with_plugin(kind, f"{file}:make"), tmp_path / "run")
    edit(file, old, new)
    left = before_and_after(folder)
    said = rf"{file} \({kind}\) has changed since {folder} began; restore {folder}/inputs/\w{{8}}-plugin.py"
    with pytest.raises(SettingError, match=said) as raised:
        resume(folder)
    assert "\n" not in str(raised.value)
    assert before_and_after(folder) == left
    (copy,) = (folder / "inputs").iterdir()
    shutil.copyfile(copy, file)
    RunFolder(folder, resume=True).check_files(setting="resume", value=True, again="")
    if kind == "optimizer":
        assert resume(folder)["status"] == "completed"


def test_a_module_that_a_plugin_imports_is_refused_by_its_own_name(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "plugin.py").write_text("def make():\n    from beside import rate, DPSGD\n    return DPSGD(lr=rate)\n")
    (tmp_path / "beside.py").write_text("from fed_dpsat.step.optimizers import DPSGD\nrate = 0.5\n")
    importlib.invalidate_caches()
    folder = begun(dataclasses.replace(CONFIG, optimizer=f"{tmp_path}/plugin.py:make"), tmp_path / "run")
    assert len(list((folder / "inputs").iterdir())) == 2
    edit(tmp_path / "beside.py", "0.5", "5.0")
    del sys.modules["beside"]
    with pytest.raises(SettingError, match=rf"{tmp_path}/beside.py \(optimizer\) has changed since"):
        resume(folder)


def test_an_edit_that_breaks_a_plugin_is_no_other_error(tmp_path):
    file = tmp_path / "plugin.py"
    file.write_text(PLUGINS["optimizer"][0])
    folder = begun(dataclasses.replace(CONFIG, optimizer=f"{file}:make"), tmp_path / "run")
    file.write_text("def make(:")
    with pytest.raises(SettingError, match=r"plugin.py \(optimizer\) has changed since"):
        resume(folder)
    file.unlink()
    with pytest.raises(PluginError, match="no file"):
        resume(folder)


def test_a_file_of_the_same_name_in_another_folder_is_not_taken_for_it_unless_it_is_the_same(tmp_path, monkeypatch):
    text = PLUGINS["optimizer"][0]
    for place, rate in (("here", "0.5"), ("there", "5.0"), ("moved", "0.5")):
        (tmp_path / place).mkdir()
        (tmp_path / place / "plugin.py").write_text(text.replace("0.5", rate))
    monkeypatch.chdir(tmp_path / "here")
    folder = begun(dataclasses.replace(CONFIG, optimizer="plugin.py:make"), tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(tmp_path / "here")
    with pytest.raises(SettingError, match=r"plugin.py \(optimizer\) has changed since .* began"):
        resume(folder, overrides={"optimizer": "there/plugin.py:make"})
    moved = f"{tmp_path}/moved/plugin.py:make"
    assert resume(folder, overrides={"optimizer": "moved/plugin.py:make"})["status"] == "completed"
    assert RunFolder(folder, resume=True).config().optimizer == moved


READING = """
import torch
from torch import nn
from pathlib import Path
from fed_dpsat.data.digits import digits
from fed_dpsat.data.dataset import Dataset, Examples

def dataset(data_path):
    whole = digits()
    labels = torch.load(Path(data_path) / "file.pt")["labels"]
    train = Examples(inputs=whole.train.inputs, labels=labels, mean=whole.train.mean, std=whole.train.std)
    return Dataset(name="mine", train=train, test=whole.test, class_names=whole.class_names)

def partition(labels, data_path):
    return [part.numpy() for part in torch.load(Path(data_path) / "file.pt")["parts"]]

def model(data_path):
    layer = nn.Linear(64, 16)
    layer.weight.data.copy_(torch.load(Path(data_path) / "file.pt")["weight"])
    return nn.Sequential(nn.Flatten(), layer, nn.Linear(16, 10))
"""
HELD = {
    "dataset": ("labels", "the examples"),
    "partition": ("parts", "the clients' examples"),
    "model": ("weight", "its frozen layers"),
}


@pytest.mark.parametrize("kind", HELD)
def test_what_a_plugin_reads_is_told_apart_by_what_comes_of_it(tmp_path, kind):
    """Its file is the same; one label, one example of a client or one frozen weight is not."""
    torch.manual_seed(0)
    what, name = HELD[kind]
    numbers = {
        "labels": digits().train.labels.clone(),
        "parts": list(torch.arange(1437).chunk(3)),
        "weight": torch.rand(16, 64),
    }
    (tmp_path / "plugin.py").write_text(READING)
    torch.save(numbers, tmp_path / "file.pt")
    config = dataclasses.replace(CONFIG, data_path=str(tmp_path), **{kind: f"{tmp_path}/plugin.py:{kind}"})
    folder = begun(dataclasses.replace(config, train_layers="head" if kind == "model" else "all"), tmp_path / "run")
    changed = {**numbers, what: [*numbers[what]] if what == "parts" else numbers[what].clone()}
    if what == "labels":
        changed[what][0] = (changed[what][0] + 1) % 10
    elif what == "parts":
        changed[what][0], changed[what][1] = changed[what][0][:-1], torch.cat([changed[what][0][-1:], changed[what][1]])
    else:
        changed[what][0, 0] += 1e-7
    torch.save(changed, tmp_path / "file.pt")
    with pytest.raises(SettingError, match=rf"possible: {name} \({kind}\) has changed since .* began; give the same"):
        resume(folder)
    torch.save(numbers, tmp_path / "file.pt")
    if kind == "model":
        assert resume(folder)["status"] == "completed"


def test_an_edited_table_of_clients_is_refused(tmp_path):
    table = tmp_path / "clients.csv"
    table.write_text("client,target_epsilon\n0,2.0\n")
    config = dataclasses.replace(CONFIG, noise_multiplier=0.0, target_epsilon=3.0, client_table=str(table))
    folder = begun(config, tmp_path / "run")
    edit(table, "2.0", "9.0")
    with pytest.raises(SettingError, match=rf"{table} \(client_table\) has changed since .*; restore .*-clients.csv"):
        resume(folder)


def test_edited_columns_of_a_table_and_another_tokenizer_are_refused(tmp_path):
    columns, tokenizer = tmp_path / "columns.toml", tmp_path / "tokenizer.json"
    columns.write_text("[age]\nmean = 40\n")
    tokenizer.write_text("{}")
    config = dataclasses.replace(CONFIG, columns_file=str(columns), tokenizer=str(tokenizer))
    folder = begun(config, tmp_path / "run")
    edit(columns, "40", "41")
    with pytest.raises(SettingError, match=rf"{columns} \(columns_file\) has changed .*; restore .*-columns.toml"):
        resume(folder)
    edit(columns, "41", "40")
    tokenizer.write_text("{ }")
    with pytest.raises(SettingError, match=rf"{tokenizer} \(tokenizer\) has changed .*; restore it"):
        resume(folder)


def test_objects_have_to_be_the_same(tmp_path):
    given = {"dataset": digits(), "optimizer": DPSGD(lr=0.5), "model": nn.Sequential(nn.Flatten(), nn.Linear(64, 10))}
    folder = begun(CONFIG, tmp_path / "run", **given)
    again = dataclasses.replace(CONFIG, resume=True)
    train = given["dataset"].train
    labels = train.labels.clone()
    labels[7] = (labels[7] + 1) % 10
    others = {
        "dataset": dataclasses.replace(given["dataset"], train=dataclasses.replace(train, labels=labels)),
        "optimizer": DPSGD(lr=0.6),
    }
    for kind, other in others.items():
        with pytest.raises(SettingError, match=rf"\({kind}\) has changed since .* began; give the same {kind}"):
            simulate(again, folder, **{**given, kind: other})
    assert simulate(again, folder, **given)["status"] == "completed"


def test_a_run_of_plug_ins_named_in_a_file_beside_them_is_resumed_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "plugin.py").write_text(PLUGINS["optimizer"][0])
    (tmp_path / "mine" / "mine.toml").write_text(
        'optimizer = "plugin.py:make"\nnum_clients = 3\nnum_rounds = 1\nnoise_multiplier = 1.0\ndelta = 1e-4\n'
    )
    folder = begun(RunConfig.load(tmp_path / "mine" / "mine.toml"), tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    assert resume(folder)["optimizer"] == f"{tmp_path}/mine/plugin.py:make"


def test_a_run_of_an_older_version_has_plug_ins_relative_to_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plugin.py").write_text(PLUGINS["optimizer"][0])
    folder = begun(dataclasses.replace(CONFIG, optimizer="plugin.py:make"), tmp_path / "run")
    edit(folder / "config.toml", f'"{tmp_path}/plugin.py:make"', '"plugin.py:make"')
    assert resume(folder)["status"] == "completed"


def test_a_logger_may_be_another(tmp_path):
    text = "class Log:\n    def begin(self, *a): pass\n    round = end = begin\n"
    (tmp_path / "log.py").write_text(text)
    folder = begun(dataclasses.replace(CONFIG, loggers=f"{tmp_path}/log.py:Log"), tmp_path / "run")
    (tmp_path / "log.py").write_text(text + "# louder\n")
    assert resume(folder)["status"] == "completed"


def test_a_run_of_an_older_version_is_not_known_to_be_the_same(tmp_path):
    folder = begun(CONFIG, tmp_path / "run")
    (folder / "inputs.json").unlink()
    with pytest.raises(SettingError, match=r"inputs.json.*use the version that started it"):
        resume(folder)


def test_a_run_that_was_killed_before_its_settings_were_there_starts_again(tmp_path):
    (tmp_path / "plugin.py").write_text(PLUGINS["optimizer"][0])
    config = dataclasses.replace(CONFIG, optimizer=f"{tmp_path}/plugin.py:make")
    folder = begun(config, tmp_path / "run")
    for path in [p for p in sorted(folder.rglob("*"), reverse=True) if p.parent.name != "inputs"]:
        if path.is_file() and path.name not in ("inputs.json", "environment.json"):
            path.unlink()
    assert simulate(config, folder)["status"] == "completed"
    (tmp_path / "mine" / "inputs").mkdir(parents=True)
    (tmp_path / "mine" / "inputs" / "precious.csv").write_text("1")
    with pytest.raises(SettingError, match="not new or empty"):
        simulate(config, tmp_path / "mine")


def test_what_measures_a_run_later_is_not_run_with_another_model(tmp_path):
    (tmp_path / "plugin.py").write_text(PLUGINS["model"][0])
    config = dataclasses.replace(CONFIG, model=f"{tmp_path}/plugin.py:make")
    begun(config, tmp_path / "run")
    edit(tmp_path / "plugin.py", "nn.Flatten(), ", "nn.Flatten(), nn.Tanh(), ")
    with pytest.raises(SettingError, match=r"plugin.py \(model\) has changed since"):
        measure_run(tmp_path / "run", examples=8)


def test_a_data_set_is_told_from_another_by_one_pixel_and_by_what_it_means():
    def digest(**changes):
        dataset = dataclasses.replace(digits(), **changes)
        (found,) = [
            one.sha256 for one in inputs_of(Experiment.build(CONFIG, dataset=dataset)) if one.setting == "dataset"
        ]
        return found

    test = digits().test
    pixel = test.inputs.clone()
    pixel[-1, 0, -1, -1] += 1
    others = [
        {"test": dataclasses.replace(test, inputs=pixel)},
        {"test": dataclasses.replace(test, std=(2.0,))},
        {"class_names": tuple("ABCDEFGHIJ")},
    ]
    assert len({digest(**changes) for changes in [{}, *others]}) == 4
    assert digest() == digest()
