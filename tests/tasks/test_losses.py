"""The loss of each task: its value, that examples stay apart, and that the planned sum is that of a float64 loop."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from fed_dpsat.data import Dataset, Examples
from fed_dpsat.data.sequences import IGNORED, Sequences
from fed_dpsat.errors import DataError, ModelError
from fed_dpsat.params import trainable
from fed_dpsat.step.clipping import FlatClipping
from fed_dpsat.step.gradients.per_example import ModelLoss, clipped_gradient_sum
from fed_dpsat.tasks.classification import Classification
from fed_dpsat.tasks.multilabel import Multilabel
from fed_dpsat.tasks.regression import Regression
from fed_dpsat.tasks.tokens import CausalLM, MaskedLM, TokenClassification

B, T, V = 5, 6, 11
NAMES = ("a", "b", "c")
LENGTHS = torch.tensor([6, 1, 4, 2, 5])
THERE = torch.arange(T)[None] < LENGTHS[:, None]


class Network(nn.Module):
    """Tokens to an output for each position, or for each text with ``pooled``."""

    def __init__(self, outputs, pooled, hides=False):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.layer, self.head = nn.Embedding(V, 8), nn.Linear(8, 8), nn.Linear(8, outputs)
        self.pooled, self.hides = pooled, hides

    def forward(self, input_ids, attention_mask):
        hidden = attention_mask.bool() & (input_ids % 3 == 0)
        tokens = input_ids.where(~hidden, 1) if self.hides else input_ids
        x = torch.tanh(self.layer(self.embedding(tokens)))
        x = x + x.cumsum(1)
        if self.pooled:
            x = (x * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)
        return (self.head(x), hidden) if self.hides else self.head(x)


def tokens():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, V, (B, T), generator=generator).where(THERE, 0)


def problems():
    ids = tokens()
    text = ids.where(THERE, IGNORED)
    generator = torch.Generator().manual_seed(2)
    some = torch.randint(0, 3, (B, T), generator=generator).where(THERE, IGNORED)
    some[1] = IGNORED  # an example without a label
    scale = ((10.0, 4.0), (0.0, 1.0))
    return {
        "classification": (Classification(NAMES), Network(3, True), torch.tensor([0, 1, 2, 0, 1])),
        "multilabel": (Multilabel(NAMES), Network(3, True), torch.randint(0, 2, (B, 3), generator=generator).float()),
        "regression": (Regression(2, scale), Network(2, True), torch.randn(B, 2, generator=generator)),
        "token-classification": (TokenClassification(NAMES), Network(3, False), some),
        "causal-lm": (CausalLM(V), Network(V, False), text),
        "masked-lm": (MaskedLM(V), Network(V, False, hides=True), text),
    }


def by_hand(name, task, outputs, target):
    """The loss of one example, from its definition; ``outputs`` has a batch of one."""
    if name == "classification":
        return -outputs[0].log_softmax(0)[target[0]]
    if name == "multilabel":
        p = outputs[0].sigmoid()
        return -(target[0] * p.log() + (1 - target[0]) * (1 - p).log()).mean()
    if name == "regression":
        mean, std = torch.tensor([[10.0, 0.0], [4.0, 1.0]], dtype=outputs.dtype)
        return ((outputs[0] - (target[0] - mean) / std) ** 2).mean()
    logits, hidden = outputs if name == "masked-lm" else (outputs, None)
    terms = []
    for t in range(T):
        wanted = t + 1 if name == "causal-lm" else t
        if wanted < T and target[0, wanted] != IGNORED and (hidden is None or hidden[0, t]):
            terms.append(-logits[0, t].log_softmax(0)[target[0, wanted]])
    return torch.stack(terms).mean() if terms else logits.sum() * 0


@pytest.mark.parametrize("name", problems())
def test_the_clipped_sum_is_that_of_single_examples(name):
    task, module, targets = problems()[name]
    inputs = {"input_ids": tokens(), "attention_mask": THERE.long()}
    params, clip_norm = trainable(module), 0.05
    found, _ = clipped_gradient_sum(
        ModelLoss(module, task.loss), params, (inputs, targets), FlatClipping(clip_norm=clip_norm)
    )
    wide = module.double()
    expected = {key: torch.zeros_like(p) for key, p in wide.named_parameters()}
    for i in range(B):
        outputs = wide(**{key: value[i : i + 1] for key, value in inputs.items()})
        loss = by_hand(name, task, outputs, targets[i : i + 1])
        given = task.loss(outputs, targets[i : i + 1].to(targets.dtype))
        torch.testing.assert_close(given[0].double(), loss, rtol=1e-6, atol=1e-9)
        gradients = torch.autograd.grad(loss, list(wide.parameters()), allow_unused=True)
        gradients = [torch.zeros(()) if g is None else g for g in gradients]
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        for key, g in zip(expected, gradients, strict=True):
            expected[key] += g * (min(1.0, clip_norm / norm) if norm else 0.0)
    for key, value in expected.items():
        torch.testing.assert_close(found[key].double(), value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["token-classification", "causal-lm", "masked-lm"])
def test_padding_adds_nothing_to_a_loss(name):
    task, module, targets = problems()[name]
    inputs = {"input_ids": tokens(), "attention_mask": THERE.long()}
    once = task.loss(module(**inputs), targets)
    longer = {key: functional.pad(value, (0, 3)) for key, value in inputs.items()}
    again = task.loss(module(**longer), functional.pad(targets, (0, 3), value=IGNORED))
    torch.testing.assert_close(once, again)


def test_an_example_without_a_target_has_loss_0():
    text = tokens().where(THERE, IGNORED)
    assert CausalLM(V).loss(torch.randn(B, T, V), text)[1] == 0  # one token has nothing to predict
    assert CausalLM(V).loss(torch.randn(2, 1, V), torch.ones(2, 1, dtype=torch.int64)).tolist() == [0, 0]


def test_masked_lm_says_what_a_model_gives():
    with pytest.raises(ModelError, match=r"gives \(logits, hidden\)"):
        MaskedLM(V).loss(torch.randn(B, T, V), tokens())


def test_outputs_in_half_precision_have_a_loss_in_float32():
    assert Regression(1, ()).loss(torch.zeros(2, 1, dtype=torch.bfloat16), torch.zeros(2)).dtype == torch.float32


@pytest.mark.parametrize(
    ("task", "outputs", "fits"),
    [
        (Classification(NAMES), (4, 3), True),
        (Classification(NAMES), (4, 5), True),
        (Classification(NAMES), (4, 2), False),
        (Classification(NAMES), (3,), False),
        (Regression(1, ()), (4,), True),
        (Regression(2, ()), (4,), False),
        (TokenClassification(NAMES), (4, 9, 3), True),
        (TokenClassification(NAMES), (4, 3), False),
        (CausalLM(V), (1, 9, V), False),
    ],
)
def test_outputs_are_checked_by_their_shape(task, outputs, fits):
    assert task.fits(torch.zeros(outputs), 4) is fits


def test_texts_of_one_token_have_nothing_to_predict():
    text = Sequences(values=torch.ones(2).long(), offsets=torch.arange(3), max_length=1, vocabulary_size=V)
    examples = Examples(inputs={"input_ids": text}, labels=None)
    with pytest.raises(DataError, match="made: texts of max_length=1 have no next token; raise it to 2 or more"):
        CausalLM(V).check(Dataset(name="made", train=examples, test=examples))
    MaskedLM(V).check(Dataset(name="made", train=examples, test=examples))
