"""One number for what no message carries: the same for the same run, another for other clients, data or weights."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from fed_dpsat.client import fingerprint as module_under_test
from fed_dpsat.client.build import Experiment
from fed_dpsat.client.fingerprint import contents, fingerprint
from fed_dpsat.data.dataset import Dataset, Examples
from fed_dpsat.data.sequences import Sequences
from fed_dpsat.settings.config import RunConfig

PARTS = [np.array([0, 2]), np.array([1, 3])]


class Counted(nn.Linear):
    def __init__(self):
        super().__init__(3, 2)
        self.register_buffer("seen", torch.tensor(0))


def dataset(pixel=0.0, label=0, mean=0.0, test_label=1):
    torch.manual_seed(0)
    inputs = torch.rand(4, 3)
    inputs[3, 2] = pixel
    train = Examples(inputs=inputs, labels=torch.tensor([0, 1, 1, label]), mean=(mean,) * 3, std=(1.0,) * 3)
    test = Examples(inputs=inputs[:1], labels=torch.tensor([test_label]), mean=(0.0,) * 3, std=(1.0,) * 3)
    return Dataset(name="four", train=train, test=test, class_names=("a", "b"))


def module(weight=1.0, bias=1.0, seen=0):
    made = Counted()
    with torch.no_grad():
        made.weight.fill_(weight)
        made.bias.fill_(bias)
        made.seen.fill_(seen)
    return made


@pytest.mark.parametrize(
    "change",
    [
        {"data": dataset(pixel=1.0)},
        {"data": dataset(label=1)},
        {"data": dataset(mean=1.0)},
        {"data": dataset(test_label=0)},
        {"parts": [np.array([0, 1]), np.array([2, 3])]},
        {"parts": [np.array([0, 2, 1]), np.array([3])]},
        {"module": module(bias=2.0)},
        {"module": module(seen=1)},
    ],
)
def test_it_feels_every_pixel_label_place_and_weight_that_is_not_sent(change):
    def of(data=None, parts=PARTS, module=None):
        return fingerprint(contents(data or dataset(), parts, module or globals()["module"](), {"weight"}))

    assert of() == of(module=module(weight=5.0))
    assert of(**change) != of()


@pytest.mark.parametrize(
    "change",
    [{"padding": 1}, {"mask_token": 2}, {"vocabulary_size": 4}, {"max_length": 4}, {"label_scale": ((0.0, 2.0),)}],
)
def test_it_feels_what_is_declared_of_texts_and_numbers(change):
    def of(label_scale=(), **text):
        given = {"max_length": 3, "vocabulary_size": 3} | text
        sequences = Sequences(values=torch.arange(3), offsets=torch.tensor([0, 2, 3]), **given)
        split = Examples(inputs={"input_ids": sequences}, labels=torch.tensor([0.5, 1.0]))
        data = Dataset(name="notes", train=split, test=split, label_scale=label_scale)
        return contents(data, [np.arange(2)], nn.Linear(1, 1), {"weight", "bias"})

    assert of(**change)["dataset"] != of()["dataset"]


def test_of_a_large_split_it_takes_rows_at_equal_distances(monkeypatch):
    inputs = torch.rand(100, 4)
    monkeypatch.setattr(module_under_test, "MOST_BYTES", inputs.nbytes // 10)
    monkeypatch.setattr(module_under_test, "CHUNK_BYTES", 40)

    def of(row):
        changed = inputs.clone()
        if row is not None:
            changed[row] += 1
        split = Examples(inputs=changed, labels=torch.zeros(100).long(), mean=(0.0,) * 4, std=(1.0,) * 4)
        data = Dataset(name="many", train=split, test=split, class_names=("a",))
        return contents(data, [np.arange(100)], nn.Linear(1, 1), {"weight", "bias"})

    assert of(10) != of(None) != of(90)
    assert of(11) == of(None)


def test_of_an_experiment_it_leaves_out_what_is_sent_and_holds_what_is_frozen_or_personal():
    def of(weights, **changes):
        found = Experiment.build(RunConfig(noise_multiplier=1.0, model="mlp", **changes))
        with torch.no_grad():
            for p in list(found.loss_fn.module.parameters())[:-2]:  # all but the head
                p.fill_(weights)
        return found.fingerprint

    assert of(0.0) == of(1.0)
    assert of(0.0, train_layers="head") != of(1.0, train_layers="head")
    head = {"personal_layers": "head"}
    assert of(0.0, **head) == of(1.0, **head)
    kept = Experiment.build(RunConfig(noise_multiplier=1.0, model="mlp", **head))
    changed = dataclasses.replace(kept)
    with torch.no_grad():
        before = kept.fingerprint
        next(reversed(list(kept.loss_fn.module.parameters()))).add_(1)
        assert changed.fingerprint != before
