"""A module that mixes examples only for some data is found by its operations, not by its results."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from torch import nn

from fed_dpsat.errors import InputError, ModelError
from fed_dpsat.params import global_norm, subtract, trainable
from fed_dpsat.plugins import builtin
from fed_dpsat.step.clipping import FlatClipping
from fed_dpsat.step.draws import KEY_BYTES, Draws
from fed_dpsat.step.gradients.contribution import Unplanned
from fed_dpsat.step.gradients.loss import PRECISIONS
from fed_dpsat.step.gradients.per_example import ENGINES, ModelLoss, clipped_gradient_sum, cross_entropy
from fed_dpsat.step.gradients.planned import per_example
from fed_dpsat.step.gradients.probe import ask, refusal


class Model(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.linear, self.body = nn.Linear(4, 4), body

    def forward(self, x):
        return self.body(self.linear(x))


MIXES = {
    "a branch on the batch": lambda x: x if x.abs().max() < 50 else -3 * x,
    "a threshold of the batch": lambda x: torch.where(x > x.mean(0) + 50, -x, x),
    "another row, for large values only": lambda x: torch.where(x.abs() > 50, x.flip(0), x),
    "a mean": lambda x: x - x.mean(0, keepdim=True),
    "a number read off": lambda x: x * (1.0 if x.sum().item() < 1e6 else 2.0),
    "sorted": lambda x: x.sort(0).values,
    "summed up": lambda x: x.cumsum(0),
    "softmax over the batch": lambda x: x.softmax(0),
    "normalised over the batch": lambda x: nn.functional.normalize(x, dim=0),
    "a matrix of all pairs": lambda x: (x @ x.T) @ x,
}


@torch.jit.script
def compiled_flip(x: torch.Tensor) -> torch.Tensor:
    """No operation of it is seen, and for small values it does nothing."""
    return x + x.flip(0) * (x.abs() > 50.0).float()


def without_graph(x):
    with torch.no_grad():
        flipped = compiled_flip(x)
    return x + flipped - x.detach()


class Leaks(torch.autograd.Function):
    """Mixes where gradients go back, if they are large."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad if float(grad.abs().max()) < 50 else grad.flip(0)


class Own(torch.Tensor):
    pass


def shared_memory(x):
    numbers = x.detach().numpy()
    numbers[1:] += numbers[:-1]
    return x


def shared_memory_by_another_door(x):
    numbers = torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(x.detach()))
    return x + numbers.sum() * 1e-9


def in_place(x):
    x = x.clone()
    x[1:] += x[:-1]
    return x


def in_place_row_by_row(x):
    x = x.clone()
    x[:, 0] = 0  # right, but nothing comes back that could be looked at
    return x


def seen_from_elsewhere(x):
    total = torch.zeros(len(x), x.shape[1])
    view = total.view(-1)
    total.add_(x.detach())
    return x + 1e-9 * view.sum()


def out_of(x):
    total = torch.zeros(len(x), x.shape[1])
    view = total.view(-1)
    torch.mul(x.detach(), 2, out=total)
    return x + 1e-9 * view.sum()


def hooked(x):
    if x.requires_grad:
        x.register_hook(lambda grad: grad if float(grad.abs().max()) < 50 else grad.flip(0))
    return x


MIXES |= {
    "compiled": compiled_flip,
    "compiled, without a graph": without_graph,
    "in the backward pass": Leaks.apply,
    "by a hook on a tensor": hooked,
    "a tensor of a class of its own": lambda x: x.as_subclass(Own).tanh().as_subclass(torch.Tensor),
    "memory shared with numpy": shared_memory,
    "memory shared by dlpack": shared_memory_by_another_door,
    "in place": in_place,
    "in place, row by row": in_place_row_by_row,
    "a view of what is written to": seen_from_elsewhere,
    "out=": out_of,
    "everyone reads row 1": lambda x: x[torch.ones(len(x), dtype=torch.long)],
    "everyone reads row 2": lambda x: x[torch.full((len(x),), len(x) - 1)],
    "a layer whose weight is the batch": lambda x: x + 1e-9 * nn.functional.linear(x, x)[:, :1],
    "a map of functorch": lambda x: torch.vmap(torch.tanh)(x),
    "checkpointed": lambda x: torch.utils.checkpoint.checkpoint(lambda h: h - h.mean(0), x, use_reentrant=False),
    "bool": lambda x: torch.where((x > 50).roll(1, 0), -x, x),
}
KEEPS_APART = {
    "elementwise": lambda x: torch.tanh(x).mul(2) + 1,
    "in place": lambda x: x.clone().mul_(2),
    "over features": lambda x: x - x.mean(1, keepdim=True),
    "softmax": lambda x: x.softmax(-1),
    "reshaped": lambda x: x.view(x.shape[0], 2, 2).transpose(1, 2).flatten(1),
    "dropout": lambda x: nn.functional.dropout(x, 0.5),
    "cut and joined": lambda x: torch.cat(x.chunk(2, dim=1)[::-1], dim=1),
    "its own size": lambda x: x / x.size(1),
    "a constant": lambda x: x / CONSTANT,
    "a constant made here": lambda x: x * torch.tensor([1.0, 2.0, 3.0, 4.0]) + torch.arange(4),
    "relu in place": lambda x: nn.functional.relu(x, inplace=True),
    "an operator of aten": lambda x: torch.ops.aten.relu(x),
    "noise": lambda x: x + torch.rand_like(x),
}
CONSTANT = torch.tensor([1.0, 2.0, 3.0, 4.0])


def asked(body):
    loss = ModelLoss(Model(body))
    return refusal(loss, trainable(loss.module), torch.randn(8, 4), torch.zeros(8, dtype=torch.int64))


@pytest.mark.parametrize("case", MIXES)
def test_what_may_mix_is_refused(case):
    assert asked(MIXES[case])


@pytest.mark.parametrize("case", KEEPS_APART)
def test_what_keeps_examples_apart_is_planned(case):
    assert asked(KEEPS_APART[case]) == ""


@pytest.mark.parametrize("name", builtin("model"))
def test_every_built_in_model_is_planned(name):
    shape = (1, 28, 28) if name in ("dpnasnet-fashion-mnist", "resnet10-gn") else (3, 32, 32)
    loss = ModelLoss(builtin("model")[name](shape, 10))
    assert refusal(loss, trainable(loss.module), torch.randn(2, *shape), torch.zeros(2, dtype=torch.int64)) == ""


class Zeros(Model):
    """At zero ``share`` hides everything; it is trained."""

    def __init__(self, mix):
        super().__init__(None)
        self.share, self.mix = nn.Parameter(torch.zeros(4, 4)), mix

    def forward(self, x):
        hidden = self.linear(x)
        return hidden + nn.functional.linear(self.mix(hidden, self.share), self.share)


class Head(nn.Module):
    """A head of zeros, as fine-tuning begins with, behind what mixes where gradients go back."""

    def __init__(self):
        super().__init__()
        self.linear, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        nn.init.zeros_(self.head.weight)

    def forward(self, x):
        hidden = self.linear(x)
        return self.head(hidden + (hidden @ hidden.detach().T).triu(1) @ hidden)


class Words(nn.Module):
    """Tokens ``[B, T]``; ``mix`` says of which example."""

    def __init__(self, mix, length=50, **layer):
        super().__init__()
        self.words, self.more, self.mix = nn.Embedding(length, 8, padding_idx=0), nn.Embedding(7, 8), mix
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, **{"batch_first": True, **layer})
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.mix(x)
        return self.head(self.encoder(self.words(x) + self.more(x % 7)).mean(1))


class Counts(nn.Module):
    """Keeps the last batch in a buffer."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x):
        with torch.no_grad():
            self.seen.mul_(0.9).add_(0.1)
        return self.linear(x) + self.seen


def reason(module, inputs):
    return refusal(ModelLoss(module), trainable(module), inputs, torch.zeros(len(inputs), dtype=torch.int64))


TOKENS = torch.arange(35).view(5, 7)
NUMBERS = torch.arange(20.0).view(5, 4)
HIDES = {
    "a parameter that is zero": (Zeros(lambda h, p: h.flip(0)), NUMBERS),
    "a product with it": (Zeros(lambda h, p: p[: len(h), : len(h)] @ h), NUMBERS),
    "a head that is zero": (Head(), NUMBERS),
    "words of the neighbour": (Words(lambda x: x.roll(1, 0)), TOKENS),
    "rare words of the neighbour": (Words(lambda x: torch.where(x > 45, x.roll(1, 0), x)), TOKENS),
    "attention over the batch": (Words(lambda x: x, batch_first=False), TOKENS),
    "a buffer": (Counts(), NUMBERS),
}


@pytest.mark.parametrize("case", HIDES)
def test_what_made_up_zeros_would_hide_is_refused(case):
    module, inputs = HIDES[case]
    said = reason(module, inputs)
    assert "mix" in said, said


def test_tokens_are_made_up_within_the_table_they_are_looked_up_in():
    """Of two tables the shorter one decides where the longer one's length does not pass."""
    assert reason(Words(lambda x: x), TOKENS) == ""
    assert reason(Words(lambda x: x, length=7), TOKENS % 7) == ""
    direct = nn.Sequential(nn.Embedding(2, 8), nn.Flatten(), nn.Linear(56, 3))
    assert reason(direct, TOKENS % 2) == ""


@pytest.mark.parametrize("case", ["a parameter that is zero", "a head that is zero", "words of the neighbour"])
def test_what_is_refused_is_still_bounded(case):
    """One example more moves the sum by at most C, whichever way it is then taken."""
    module, inputs = HIDES[case]
    torch.manual_seed(0)
    for p in module.parameters():
        nn.init.normal_(p)
    sums = []
    for few in (inputs, inputs[:-1]):
        batch = few, torch.zeros(len(few), dtype=torch.int64)
        sums.append(clipped_gradient_sum(ModelLoss(module), trainable(module), batch, FlatClipping(clip_norm=0.1))[0])
    assert float(global_norm(subtract(*sums))) <= 0.1 * (1 + 1e-5)


def test_a_probe_leaves_the_module_as_it_was(same_bits):
    module = Counts()
    before = {name: t.clone() for name, t in module.state_dict().items()}
    reason(module, NUMBERS)
    assert same_bits(dict(module.state_dict()), before)


def test_what_holds_no_float32_is_refused_by_name():
    for dtype in (torch.float16, torch.bfloat16):
        module = nn.Linear(4, 3).to(dtype)
        batch = NUMBERS.to(dtype), torch.zeros(5, dtype=torch.int64)
        for engine in ENGINES:
            with pytest.raises(ModelError, match=r"parameter weight is b?float16, .*; train in float32"):
                clipped_gradient_sum(
                    ModelLoss(module), trainable(module), batch, FlatClipping(clip_norm=1.0), engine=engine
                )


def positions(x):
    """As a tutorial adds them to sequences whose second dimension is the batch, to a batch that is the first."""
    return (x[:, None] + TABLE[: x.size(0), None]).mean(1)


TABLE = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
BY_PLACE = {
    "positions of the batch": positions,
    "looked up by place": lambda x: x + nn.functional.embedding(torch.arange(len(x)), TABLE),
    "a triangle": lambda x: x * torch.ones(len(x), 4).tril(),
    "a unit matrix": lambda x: x + torch.eye(len(x), 4),
    "its place": lambda x: x * torch.arange(len(x))[:, None],
}
BY_SIZE = {
    "a mean of many": lambda x: x - x.mean(0) if len(x) > 8 else x,
    "an odd number": lambda x: x * (len(x) % 2 * 2 - 1),
    "a step by the size": lambda x: x.roll(len(x) // 4, 0),
    "another sign for many": lambda x: -x if len(x) > 40 else x,
    "another number for many": lambda x: x * (-1.0 if len(x) > 40 else 1.0),
}


def moved(loss, inputs, targets, clip_norm, **options):
    """By how many clip norms a sum moves without its first example."""
    ids, sums = np.arange(len(inputs)), []
    for few in (ids, ids[1:]):
        draws, batch = Draws(key=bytes(KEY_BYTES), ids=few), (inputs[few], targets[few])
        rule = FlatClipping(clip_norm=clip_norm)
        sums.append(clipped_gradient_sum(loss, trainable(loss.module), batch, rule, draws=draws, **options)[0])
    return float(global_norm(subtract(*sums))) / clip_norm


def of_kind(body, seed=0):
    torch.manual_seed(seed)
    inputs, targets = torch.randn(41, 4), torch.arange(41) % 4
    inputs[0] *= 100
    return ModelLoss(Model(body)), inputs, targets


@pytest.mark.parametrize("case", BY_PLACE)
def test_what_tells_examples_apart_by_their_place_is_refused(case):
    assert "mix" in asked(BY_PLACE[case])


@pytest.mark.parametrize("case", [*BY_PLACE, *BY_SIZE])
def test_one_example_moves_a_sum_by_one_clip_norm_whatever_place_and_size_do(case):
    body = {**BY_PLACE, **BY_SIZE}[case]
    assert moved(*of_kind(body), 0.1) <= 1 + 1e-5


@pytest.mark.parametrize("case", [*BY_PLACE, *BY_SIZE])
def test_opacus_refuses_what_depends_on_place_or_size(case):
    body = {**BY_PLACE, **BY_SIZE}[case]
    with pytest.raises(InputError, match="opacus"):
        clipped_gradient_sum(*_batch_of(*of_kind(body)), FlatClipping(clip_norm=0.1), engine="opacus")


def _batch_of(loss, inputs, targets):
    return loss, trainable(loss.module), (inputs, targets)


def test_a_criterion_by_the_number_of_examples_is_refused():
    loss, inputs, targets = of_kind(lambda x: x)
    signed = ModelLoss(loss.module, lambda o, t: cross_entropy(o, t) * (len(t) % 2 * 2 - 1))
    assert "mix" in refusal(signed, trainable(loss.module), inputs, targets)
    assert moved(signed, inputs, targets, 0.1) <= 1 + 1e-5


class Scaled(Model):
    """Mixes at zeros, with which heads begin."""

    def forward(self, x):
        hidden = self.linear(x)
        return hidden - hidden.mean(0) if float(self.linear.bias.detach().sum()) == 0 else hidden


def test_a_branch_on_the_value_of_a_parameter_is_not_planned_for():
    _, inputs, targets = of_kind(lambda x: x)
    module = Scaled(None)
    nn.init.zeros_(module.linear.bias)
    trained = trainable(module)
    answer = ask(ModelLoss(module), trained, inputs, targets)
    assert answer.expected is not None
    with pytest.raises(Unplanned, match="something else"):
        per_example(ModelLoss(module), trained, inputs, targets, answer.expected)
    assert moved(ModelLoss(module), inputs, targets, 0.1) <= 1 + 1e-5


@pytest.mark.parametrize("name", ["tanh-cnn", "resnet10-gn", "transformer"])
def test_passes_of_any_size_are_as_expected(name):
    size = 7
    if name == "transformer":
        module, inputs = Words(lambda x: x), TOKENS[:1].repeat(size, 1)
    else:
        shape = (1, 28, 28) if name in ("dpnasnet-fashion-mnist", "resnet10-gn") else (3, 32, 32)
        module, inputs = builtin("model")[name](shape, 10), torch.randn(size, *shape)
    loss, trained, targets = ModelLoss(module), trainable(module), torch.zeros(size, dtype=torch.int64)
    expected = ask(loss, trained, inputs, targets).expected
    assert expected is not None
    per_example(loss, trained, inputs, targets, expected)


def test_a_pass_at_either_precision_is_as_expected():
    _, inputs, targets = of_kind(lambda x: x)
    module = Model(nn.Dropout())
    trained = trainable(module)
    for precision in PRECISIONS:
        loss = ModelLoss(module, precision=precision)
        per_example(loss, trained, inputs, targets, ask(loss, trained, inputs, targets).expected)


def test_a_hook_on_a_node_of_the_backward_pass_goes_to_vmap():
    """It may normalise over the batch: one example moved the sum by 8.8 times the bound."""

    class Hooked(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x):
            h = self.linear(x)
            if h.grad_fn is not None:
                h.grad_fn.register_prehook(lambda grads: (grads[0] / grads[0].norm(),))
            return h

    module = Hooked()
    loss, x, y = ModelLoss(module), torch.randn(5, 4), torch.zeros(5, dtype=torch.long)
    assert "backward pass" in refusal(loss, trainable(module), x, y)
