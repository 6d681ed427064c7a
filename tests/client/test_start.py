"""The model that a run starts with: its types, its frozen layers, and passes that change nothing."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from fed_dpsat.accounting.event import PrivacyEvent
from fed_dpsat.client.assignment import Assignment
from fed_dpsat.client.build import Experiment
from fed_dpsat.client.start import check_passes
from fed_dpsat.data.dataset import Dataset, Examples
from fed_dpsat.data.sequences import Sequences
from fed_dpsat.errors import ModelError, SettingError
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.simulation import simulate

CONFIG = RunConfig(noise_multiplier=1.0, num_clients=4, local_steps=2, num_rounds=3, momentum=0.5)
ASSIGNMENT = Assignment(round=1, event=PrivacyEvent(noise_multiplier=1.0, sample_rate=0.5, steps=2))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def tiny(labels):
    examples = Examples(inputs=torch.rand(len(labels), 1, 2, 2), labels=torch.tensor(labels), mean=(0.0,), std=(1.0,))
    return Dataset(name="tiny", train=examples, test=examples, class_names=("a", "b"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("layer", [1, 2])
def test_parameters_that_are_not_float32_are_refused_before_anything(tmp_path, dtype, layer):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 10))
    model[layer].to(getattr(torch, dtype))
    wrong = rf"of float32 parameters \({layer}.weight is {dtype}\); build it in float32.*precision=bfloat16"
    config = RunConfig(noise_multiplier=1.0, num_clients=2)
    with pytest.raises(SettingError, match=wrong) as raised:
        simulate(config, tmp_path / "run", model=model)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()
    later = dataclasses.replace(config, train_layers="head-then-all", unfreeze_round=2)
    with pytest.raises(SettingError, match=wrong):
        Experiment.build(later, model=model)


def test_a_frozen_layer_may_be_of_another_type():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.features, self.head = nn.Linear(4, 4).to(torch.bfloat16), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.features(x.flatten(1).to(torch.bfloat16)).float())

    config = RunConfig(noise_multiplier=1.0, num_clients=2, sample_rate=1.0, train_layers="head")
    experiment = Experiment.build(config, dataset=tiny([0, 1, 0]), model=Half())
    params = experiment.trained(1)
    moved = experiment.client_round(0, ASSIGNMENT, params, None).params
    assert moved.keys() == {"head.weight", "head.bias"}
    assert not same(moved, params)


def spectral(num_classes):
    normed = nn.utils.parametrizations.spectral_norm(nn.Linear(64, 16))
    return nn.Sequential(nn.Flatten(), normed, nn.Tanh(), nn.Linear(16, num_classes))


def test_a_module_that_changes_its_own_buffers_is_refused_before_the_start():
    """Its test loss was 1.7149 in one process and 1.6791 on two workers."""
    with pytest.raises(ModelError, match=r"changes 1\.parametrizations\.weight\.0\._u.*weight_norm"):
        Experiment.build(dataclasses.replace(CONFIG, model=f"{__name__}:spectral"))


def test_an_adapter_over_new_weights_is_told(tmp_path):
    """A network that never learnt is frozen: it trains, and is of no use."""
    pytest.importorskip("peft")
    config = dataclasses.replace(CONFIG, model="mlp", adapter="lora", adapter_targets="1")
    (note,) = Experiment.build(config).start.notes
    assert note == "adapter='lora' without start_from: initial weights are frozen"
    torch.save(Experiment.build(dataclasses.replace(CONFIG, model="mlp")).trained(1), tmp_path / "mlp.pt")
    assert Experiment.build(dataclasses.replace(config, start_from=str(tmp_path / "mlp.pt"))).start.notes == ()


class LastPass(nn.Module):
    """Keeps what it made of its last inputs, and adds it to the next."""

    def __init__(self):
        super().__init__()
        self.embedding, self.layer, self.last = nn.Embedding(12, 4), nn.Linear(4, 2), 0.0

    def forward(self, input_ids, attention_mask):
        outputs = self.layer(self.embedding(input_ids)).mean(1)
        outputs, self.last = outputs + self.last, outputs.mean().detach()
        return outputs


@pytest.mark.parametrize("padding", [0, 1, 7])
def test_a_module_that_keeps_something_of_texts_is_refused_whatever_their_padding(padding):
    text = Sequences(
        values=torch.arange(6), offsets=torch.tensor([0, 4, 6]), max_length=5, vocabulary_size=12, padding=padding
    )
    with pytest.raises(ModelError, match=r"LastPass changes last in a pass|keeps something from pass to pass"):
        check_passes(LastPass(), Examples(inputs={"input_ids": text}, labels=torch.tensor([0, 1])))
