"""Runs of networks of other libraries: by name, from weights in a folder, with workers, and again after a pause."""

from __future__ import annotations

import dataclasses
import json
import logging

import pytest
import torch
from torch import nn

from fed_dpsat.client.build import Experiment
from fed_dpsat.data.dataset import Dataset, Examples
from fed_dpsat.errors import ModelError, SettingError
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.simulation import simulate

CONFIG = RunConfig(num_clients=4, num_rounds=2, noise_multiplier=1.0, delta=1e-3, optimizer="dp-sgd")
REASON = 'pip install "fed_dpsat[text,vision]" to run these tests'


def with_batch_norm():
    layers = [nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(288, 10))


def test_batch_norm_is_replaced_and_the_log_says_so_once(tmp_path, caplog):
    model = with_batch_norm()
    with pytest.raises(ModelError, match=r"mix examples: 3 \(BatchNorm2d\); set norm='group'"):
        simulate(CONFIG, tmp_path / "refused", model=model)
    with caplog.at_level(logging.WARNING, logger="fed_dpsat"):
        simulate(dataclasses.replace(CONFIG, norm="group"), tmp_path / "run", model=model)
    assert [r.message for r in caplog.records if "norm" in r.message] == [
        "norm='group' replaced 3 (BatchNorm2d) by GroupNorm"
    ]
    assert isinstance(model[3], nn.BatchNorm2d)  # the caller's stays as it was


def test_other_norms_are_refused():
    with pytest.raises(SettingError, match="norm='layer' is not"):
        dataclasses.replace(CONFIG, norm="layer")


def texts():
    """Texts of 6 to 12 tokens below 50; the class is that of the first token."""

    def split(count, seed):
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(1, 50, (count, 12), generator=generator).float()
        tokens[::3, 6:] = 0
        return Examples(inputs=tokens, labels=(tokens[:, 0] > 25).long(), mean=(0.0,) * 12, std=(1.0,) * 12)

    return Dataset(name="texts", train=split(120, 0), test=split(40, 1), class_names=("low", "high"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a small BERT that has a head for masked tokens."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers", reason=REASON)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 16}
    torch.manual_seed(5)
    network = transformers.BertForMaskedLM(transformers.BertConfig(hidden_size=16, vocab_size=50, **sizes))
    network.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def stop(record):
    raise KeyboardInterrupt


def test_a_run_begins_from_the_body_in_a_folder_and_goes_on_after_a_pause(folder, tmp_path, caplog):
    config = dataclasses.replace(CONFIG, model=f"transformers:{folder}", start_from=str(folder))
    with pytest.raises(SettingError, match=r"missing: network\.bert\.pooler.*not in the model: .*start_head='new'"):
        Experiment.build(config, dataset=texts())
    config = dataclasses.replace(config, start_head="new")
    with caplog.at_level(logging.WARNING, logger="fed_dpsat"):
        simulate(config, tmp_path / "whole", dataset=texts())
    assert len([r for r in caplog.records if "tensors are left out (cls." in r.message]) == 1
    with pytest.raises(KeyboardInterrupt):
        simulate(config, tmp_path / "cut", dataset=texts(), on_round=stop)
    simulate(dataclasses.replace(config, resume=True), tmp_path / "cut", dataset=texts())
    whole, cut = (
        torch.load(tmp_path / run / "checkpoint" / "model.pt", weights_only=True)["params"] for run in ("whole", "cut")
    )
    assert all(torch.equal(p, cut[name]) for name, p in whole.items())


def test_the_configuration_of_a_network_is_an_input_of_its_run(folder, tmp_path):
    config = dataclasses.replace(CONFIG, model=f"transformers:{folder}")
    with pytest.raises(KeyboardInterrupt):
        simulate(config, tmp_path / "run", dataset=texts(), on_round=stop)
    inputs = json.loads((tmp_path / "run" / "inputs.json").read_text())
    (recorded,) = [one for one in inputs if one["name"] == "config.json"]
    assert recorded["setting"] == "model"
    text = (folder / "config.json").read_text()
    assert (tmp_path / "run" / recorded["copy"]).read_text() == text
    (folder / "config.json").write_text(text.replace('"gelu"', '"relu"'))
    with pytest.raises(SettingError, match=r"config.json \(model\) has changed since .*run began"):
        simulate(dataclasses.replace(config, resume=True), tmp_path / "run", dataset=texts())
