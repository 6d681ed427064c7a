"""A module that mixes examples only for some data is found by its operations, not by its results."""

from __future__ import annotations

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

from fed_dpsat.clipping import FlatClipping
from fed_dpsat.engines.probe import refusal
from fed_dpsat.errors import ModelError
from fed_dpsat.params import global_norm, subtract, trainable
from fed_dpsat.per_example import ENGINES, ModelLoss, clipped_gradient_sum
from fed_dpsat.plugins import builtin


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
