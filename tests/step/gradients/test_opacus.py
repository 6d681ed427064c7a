"""Opacus is a cross-check, so it is checked itself: against autograd, example by example, before it trains."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fed_dpsat.errors import SettingError
from fed_dpsat.params import global_norm, subtract, trainable
from fed_dpsat.step.clipping import FlatClipping
from fed_dpsat.step.gradients import opacus
from fed_dpsat.step.gradients.per_example import ModelLoss, clipped_gradient_sum

IMAGES = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(20, (5, 5), generator=torch.Generator().manual_seed(0))
NUMBERS = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def padded(mode):
    layer = nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(256, 3))


class Words(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.words, self.out = nn.Embedding(20, 6, **settings), nn.Linear(6, 3)

    def forward(self, x):
        return self.out(self.words(x).mean(1))


class Positions(Words):
    """One table that all examples read together, ``[1, T]``."""

    def __init__(self):
        super().__init__()
        self.places = nn.Embedding(5, 6)

    def forward(self, x):
        return self.out((self.words(x) + self.places(torch.arange(x.shape[1])[None])).mean(1))


class OverTheBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        hidden = self.first(x)
        return self.out(nn.functional.layer_norm(hidden, hidden.shape))


class LargeOnly(OverTheBatch):
    """Mixes for values that no made-up example has."""

    def forward(self, x):
        hidden = self.first(x)
        return self.out(torch.where(hidden.abs() > 50, hidden.flip(0), hidden))


RIGHT = {
    "zeros": (lambda: padded("zeros"), IMAGES),
    "words": (Words, TOKENS),
    "a parametrisation": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 3)),
        NUMBERS,
    ),
}
MASK = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 1, 1]])
WRONG = {
    "circular": (lambda: padded("circular"), IMAGES, r"0 \(Conv2d\): its gradients of 0\.weight"),
    "reflect": (lambda: padded("reflect"), IMAGES, r"0 \(Conv2d\)"),
    "replicate": (lambda: padded("replicate"), IMAGES, r"0 \(Conv2d\)"),
    "a row that pads": (lambda: Words(padding_idx=3), TOKENS, r"words \(Embedding\)"),
    "positions": (Positions, TOKENS, r"places \(Embedding\)"),
    "normalised over the batch": (OverTheBatch, NUMBERS, r"first \(Linear\)"),
}


def total(module, inputs, engine):
    batch = inputs, torch.tensor([0, 1, 2, 0, 1])
    rule = FlatClipping(clip_norm=0.1)
    return clipped_gradient_sum(ModelLoss(module), trainable(module), batch, rule, engine=engine)[0]


@pytest.mark.parametrize("case", RIGHT)
def test_what_opacus_does_as_autograd_does_is_trained_with_it(case):
    make, inputs = RIGHT[case]
    module = make()
    found = total(module, inputs, "opacus")
    assert float(global_norm(subtract(found, total(module, inputs, "vmap")))) < 1e-5


@pytest.mark.parametrize("inputs", [{"words": TOKENS, "mask": MASK}, (TOKENS, MASK), [TOKENS, MASK]])
def test_several_inputs_are_the_arguments_of_a_module(inputs):
    class Masked(Words):
        def forward(self, words, mask):
            return super().forward(words) * mask.sum(1, keepdim=True)

    module = Masked()
    found = total(module, inputs, "opacus")
    assert float(global_norm(subtract(found, total(module, inputs, "vmap")))) < 1e-5


@pytest.mark.parametrize("case", WRONG)
def test_what_opacus_does_otherwise_is_refused_by_the_name_of_its_layer(case):
    make, inputs, layer = WRONG[case]
    module = make()
    with pytest.raises(SettingError, match=rf"engine='opacus' is not right for {layer}.*; use 'auto' or 'vmap'"):
        total(module, inputs, "opacus")


@pytest.mark.parametrize("case", ["circular", "a row that pads"])
def test_the_gradients_that_are_refused_are_wrong(case):
    """So the comparison is needed: Opacus gives other gradients, and no word is said."""
    make, inputs, _ = WRONG[case]
    loss = ModelLoss(make())
    batch, params = (inputs, torch.tensor([0, 1, 2, 0, 1])), trainable(loss.module)
    found = {name: g.sum(0) for name, g in opacus.per_example(loss, params, *batch, "hooks").items()}
    expected, _ = clipped_gradient_sum(loss, params, batch, FlatClipping(clip_norm=math.inf))
    assert float(global_norm(subtract(found, expected)) / global_norm(expected)) > 0.05


def test_what_mixes_for_some_data_alone_is_refused_for_those():
    module = LargeOnly()
    total(module, NUMBERS / 100, "opacus")
    with pytest.raises(SettingError, match=r"engine='opacus' is not right for first \(Linear\)"):
        total(module, NUMBERS * 100, "opacus")


def test_what_a_pass_over_a_batch_does_otherwise_is_refused():
    """With ``scale_grad_by_freq`` a word of one example counts those of the others."""
    with pytest.raises(
        SettingError, match=r"engine='opacus' is not for Words: embedding with .*; use 'auto' or 'vmap'"
    ):
        total(Words(scale_grad_by_freq=True), TOKENS, "opacus")
    with pytest.raises(SettingError, match=r"engine='opacus' is not for Sequential: it draws random numbers"):
        total(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 3)), NUMBERS, "opacus")


def test_what_opacus_does_not_take_is_told_in_its_words():
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 3), nn.Flatten(), nn.ReLU(inplace=True))
    with pytest.raises(SettingError, match=r"engine='opacus' is not for Sequential: RuntimeError, .*; use 'auto'"):
        total(module, NUMBERS, "opacus")
