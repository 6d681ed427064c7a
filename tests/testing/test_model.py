"""check_model passes every shipped model and catches each broken one, and a broken engine."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fed_dpsat import plugins
from fed_dpsat.step.gradients.per_example import ENGINES
from fed_dpsat.tasks.tokens import TokenClassification
from fed_dpsat.testing import ConformanceError, check_model

SHAPES = {"dpnasnet-fashion-mnist": (1, 28, 28)}
GRADIENTS = "gradients_are_those_of_single_examples"


def mlp(*layers):
    return nn.Sequential(nn.Linear(6, 8), *layers, nn.Linear(8, 10))


class CentresTheBatch(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


class Counts(nn.Module):
    """Keeps a running mean that it does not even use."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x


class CountsCalls(nn.Module):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return x


class ChangesItsInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 10)

    def forward(self, x):
        return self.layer(x.clamp_(min=0))


BROKEN = {
    "BatchNorm": (lambda: mlp(nn.BatchNorm1d(8)), "layers_share_no_statistics"),
    "InstanceNorm that tracks": (
        lambda: mlp(nn.InstanceNorm1d(8, track_running_stats=True)),
        "layers_share_no_statistics",
    ),
    "a mean over the batch": (lambda: mlp(CentresTheBatch()), "logits_ignore_the_other_examples"),
    "a running mean": (lambda: mlp(Counts()), "forward_changes_nothing"),
    "a counter": (lambda: mlp(CountsCalls()), "forward_changes_nothing"),
    "a spectral norm": (
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 10)),
        "forward_changes_nothing",
    ),
    "an input changed in place": (ChangesItsInput, "forward_changes_nothing"),
    "too few classes": (lambda: nn.Linear(6, 9), "logits_are_one_row_per_example"),
}


def naive_hooks(loss_fn, params, inputs, targets, clipping):
    """Per-example gradients of linear layers from what hooks keep by reference: wrong after an in-place activation."""
    kept, layers = {}, {n: m for n, m in loss_fn.module.named_modules() if isinstance(m, nn.Linear)}
    handles = [m.register_forward_hook(lambda m, x, y, n=n: kept.update({n: (x[0], y)})) for n, m in layers.items()]
    losses = loss_fn.criterion(loss_fn.module(inputs), targets)
    for handle in handles:
        handle.remove()
    outputs = [y for _, y in kept.values()]
    rows = {}
    for (name, (x, _)), g in zip(kept.items(), torch.autograd.grad(losses.sum(), outputs), strict=True):
        rows[f"{name}.weight"], rows[f"{name}.bias"] = torch.einsum("bo,bi->boi", g, x.detach()), g
    factors = clipping.factors({n: g.flatten(1).square().sum(1) for n, g in rows.items()})
    return {n: torch.einsum("b,b...->...", factors[n], g) for n, g in rows.items()}, 0


@pytest.mark.by_default("linear", "mlp*", "tanh-cnn-small", "selu-cnn-small")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in ("dpnasnet-cifar", "resnet10-gn") else name
        for name in plugins.builtin("model")
        if not name.startswith(("wrn", "gpt", "gru"))
    ],
)
def test_every_shipped_model_conforms(name):
    shape = SHAPES.get(name, (3, 32, 32))
    factory = plugins.builtin("model")[name]
    assert len(check_model(lambda: factory(input_shape=shape, num_classes=10), input_shape=shape)) == 5


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_model_is_caught(case, caught):
    factory, check = BROKEN[case]
    assert caught(check_model, factory, input_shape=(6,)) == check


@pytest.mark.parametrize("engine", ENGINES)
def test_every_shipped_engine_conforms(engine):
    assert GRADIENTS in check_model(lambda: mlp(nn.Tanh()), input_shape=(6,), engine=engine)


@pytest.mark.parametrize("engine", ["auto", "vmap"])
def test_activations_in_place_do_not_break_ours(engine):
    check_model(lambda: mlp(nn.ReLU(inplace=True)), input_shape=(6,), engine=engine)


@pytest.mark.parametrize("engine", [naive_hooks, "opacus"])
def test_activations_in_place_that_break_hooks_are_caught(engine, caught):
    if engine is naive_hooks:
        check_model(lambda: mlp(nn.ReLU()), input_shape=(6,), engine=engine)
    assert caught(check_model, lambda: mlp(nn.ReLU(inplace=True)), input_shape=(6,), engine=engine) == GRADIENTS


def test_dropout_is_no_mixing():
    check_model(lambda: mlp(nn.Dropout(0.5)), input_shape=(6,))


# A batch of the author's own: tokens with their mask, several tensors, an output for each position.


def texts(size=4):
    lengths = torch.arange(3, 3 + size)[:, None]
    mask = (torch.arange(8) < lengths).long()
    return {"input_ids": torch.randint(1, 20, (size, 8), generator=torch.Generator().manual_seed(0)) * mask} | {
        "attention_mask": mask
    }


class Tokens(nn.Module):
    """The class of a text, or of each position; ``mix`` is what it does to states ``[B, T, 6]``."""

    def __init__(self, mix=lambda states, mask: states, each=False):
        super().__init__()
        self.embedding, self.head, self.mix, self.each = nn.Embedding(20, 6), nn.Linear(6, 5), mix, each

    def forward(self, input_ids, attention_mask):
        states = self.mix(self.embedding(input_ids), attention_mask[..., None].float())
        return self.head(states if self.each else (states * attention_mask[..., None]).sum(1))


def test_a_model_of_tokens_conforms():
    assert len(check_model(Tokens, inputs=texts(), num_classes=5)) == 5


def test_a_class_for_each_position_conforms():
    task, targets = TokenClassification(tuple("abcde")), torch.arange(32).view(4, 8) % 5
    assert len(check_model(lambda: Tokens(each=True), inputs=texts(), targets=targets, task=task)) == 5
    with pytest.raises(ConformanceError, match=r"outputs of shape \[1, length, 5\]"):
        check_model(Tokens, inputs=texts(), targets=targets, task=task)
    with pytest.raises(ValueError, match="without targets"):
        check_model(Tokens, inputs=texts(), task=task)


def test_several_tensors_conform():
    check_model(lambda: nn.Bilinear(3, 4, 10), inputs=(torch.randn(4, 3), torch.randn(4, 4)))


@pytest.mark.parametrize(
    ("mix", "check"),
    [
        (lambda states, mask: states - states.mean(0), "logits_ignore_the_other_examples"),
        (lambda states, mask: states * mask.mean(), "logits_ignore_the_other_examples"),
        (lambda states, mask: states + mask.detach().mul_(2), None),
    ],
)
def test_tokens_that_mix_are_caught(mix, check):
    if check is None:
        check_model(lambda: Tokens(mix), inputs=texts(), num_classes=5)
        return
    with pytest.raises(ConformanceError, match=check):
        check_model(lambda: Tokens(mix), inputs=texts(), num_classes=5)


def test_tokens_that_are_written_into_are_caught_by_name():
    class Writes(Tokens):
        def forward(self, input_ids, attention_mask):
            return super().forward(input_ids.clamp_(max=3), attention_mask)

    with pytest.raises(ConformanceError, match="input_ids"):
        check_model(Writes, inputs=texts(), num_classes=5)


def test_one_example_is_too_few():
    with pytest.raises(ValueError, match="inputs of 1 examples"):
        check_model(Tokens, inputs=texts(1), num_classes=5)
