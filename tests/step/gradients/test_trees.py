"""Batches that are trees of tensors, modules of several arguments, and outputs that are several."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from fed_dpsat.errors import ModelError
from fed_dpsat.params import global_norm, subtract, trainable
from fed_dpsat.step.clipping import FlatClipping
from fed_dpsat.step.gradients.per_example import ENGINES, ModelLoss, clipped_gradient_sum
from fed_dpsat.step.gradients.planned import per_example
from fed_dpsat.step.gradients.routes import routes_of

RULE = FlatClipping(clip_norm=0.3)


class Texts(nn.Module):
    """Tokens, and which of them count."""

    def __init__(self, answer=lambda logits: logits):
        super().__init__()
        self.words, self.head, self.answer = nn.Embedding(9, 4), nn.Linear(4, 3), answer

    def forward(self, tokens, mask):
        weights = mask.to(self.words.weight.dtype)[..., None]
        return self.answer(self.head((self.words(tokens) * weights).sum(1) / weights.sum(1)))


@dataclass
class Answer:
    logits: Tensor


FORMS = {
    "keywords": lambda tokens, mask: {"mask": mask, "tokens": tokens},
    "a tuple": lambda tokens, mask: (tokens, mask),
    "a list": lambda tokens, mask: [tokens, mask],
}
ANSWERS = {
    "a tensor": lambda logits: logits,
    "a tuple": lambda logits: (logits, None),
    "a dictionary": lambda logits: {"logits": logits},
    "an object": Answer,
}


def batch(form=FORMS["keywords"], count=5):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(9, (count, 6), generator=generator)
    mask = torch.rand(count, 6, generator=generator) < 0.7
    mask[:, 0] = True
    return form(tokens, mask), torch.arange(count) % 3


def one_by_one(loss, inputs, targets):
    """Each example alone, by autograd, clipped, added up."""
    total = {name: torch.zeros_like(p) for name, p in trainable(loss.module).items()}
    for i in range(len(targets)):
        leaves = {name: p.detach().requires_grad_() for name, p in trainable(loss.module).items()}
        own = {key: value[i : i + 1] for key, value in inputs.items()}
        found = torch.autograd.grad(loss(leaves, own, targets[i : i + 1]).sum(), list(leaves.values()))
        gradient = dict(zip(leaves, found, strict=True))
        factor = min(1.0, RULE.clip_norm / float(global_norm(gradient)))
        total = {name: t + factor * gradient[name] for name, t in total.items()}
    return total


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("form", FORMS)
def test_arguments_of_a_module_are_a_tree(form, engine):
    if engine == "opacus":
        pytest.skip("hooks of Opacus take one tensor")
    torch.manual_seed(0)
    loss = ModelLoss(Texts().double())
    expected = one_by_one(loss, *batch())
    for physical in (2, 128):
        found, _ = clipped_gradient_sum(
            loss, trainable(loss.module), batch(FORMS[form]), RULE, engine=engine, physical_batch_size=physical
        )
        assert float(global_norm(subtract(found, expected))) < 1e-12


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_logits_are_found_in_what_a_module_answers(answer, precision):
    torch.manual_seed(0)
    module = Texts()
    sums = []
    for form in (ANSWERS["a tensor"], ANSWERS[answer]):
        module.answer = form
        loss = ModelLoss(module, precision=precision)
        sums.append(clipped_gradient_sum(loss, trainable(module), batch(), RULE)[0])
    assert float(global_norm(subtract(*sums))) == 0


def test_an_answer_without_logits_is_refused():
    loss = ModelLoss(Texts(lambda logits: "logits"))
    with pytest.raises(ModelError, match="no logits and no first tensor; wrap it"):
        clipped_gradient_sum(loss, trainable(loss.module), batch(), RULE)


def test_all_tensors_begin_with_the_batch():
    loss, (inputs, targets) = ModelLoss(Texts()), batch()
    with pytest.raises(ValueError, match=r"begin with \[4, 5\]"):
        clipped_gradient_sum(loss, trainable(loss.module), ({**inputs, "mask": inputs["mask"][:4]}, targets), RULE)
    with pytest.raises(ValueError, match="batch of 5 inputs and 4 targets"):
        clipped_gradient_sum(loss, trainable(loss.module), (inputs, targets[:4]), RULE)


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize(
    "settings", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}, {"batch_first": True}], ids=str
)
def test_recurrent_layers_are_planned(make, settings):
    """Sequence first or batch first, each as ``torch.nn`` has it."""

    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.layer = nn.Embedding(9, 4), make(4, 3, **settings)
            self.head = nn.Linear(6 if settings.get("bidirectional") else 3, 3)

        def forward(self, tokens):
            x = self.words(tokens)
            out, _ = self.layer(x if settings.get("batch_first") else x.transpose(0, 1))
            return self.head(out.mean(1 if settings.get("batch_first") else 0))

    torch.manual_seed(0)
    loss = ModelLoss(Last().double())
    inputs, targets = batch()
    held = per_example(loss, trainable(loss.module), inputs["tokens"], targets, routes_of(loss))
    assert held.keys() == trainable(loss.module).keys()
    found, _ = clipped_gradient_sum(loss, trainable(loss.module), (inputs["tokens"], targets), RULE)
    expected = one_by_one(loss, {"tokens": inputs["tokens"]}, targets)
    assert float(global_norm(subtract(found, expected))) < 1e-12


def test_packed_sequences_have_a_pass_for_each():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.layer, self.head = nn.Embedding(9, 4), nn.GRU(4, 3, batch_first=True), nn.Linear(3, 3)

        def forward(self, tokens, mask):
            lengths = mask.sum(1)
            packed = nn.utils.rnn.pack_padded_sequence(self.words(tokens), lengths, True, enforce_sorted=False)
            return self.head(self.layer(packed)[1][0])

    torch.manual_seed(0)
    loss = ModelLoss(Packed().double())
    inputs, targets = batch()
    found, _ = clipped_gradient_sum(loss, trainable(loss.module), (inputs, targets), RULE)
    assert float(global_norm(subtract(found, one_by_one(loss, inputs, targets)))) < 1e-12


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU])
def test_recurrent_layers_compute_in_float32_where_others_do_in_bfloat16(make):
    """torch's own LSTM raises RuntimeError under autocast on a CPU."""

    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.layer, self.head = nn.Linear(6, 8), make(8, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.layer(self.first(x))[0].mean(1))

    torch.manual_seed(0)
    module, x, y = Last(), torch.randn(4, 5, 6), torch.arange(4) % 3
    narrow, wide = (
        clipped_gradient_sum(ModelLoss(module, precision=p), trainable(module), (x, y), RULE)[0]
        for p in ("bfloat16", "float32")
    )
    assert float(global_norm(subtract(narrow, wide)) / global_norm(wide)) < 0.05


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU])
def test_a_learned_first_state_takes_one_pass(make, monkeypatch):
    monkeypatch.setattr("fed_dpsat.step.gradients.loop.remember", lambda loss_fn, reason: pytest.fail(reason))

    class Learned(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.layer, self.head = nn.Embedding(9, 4), make(4, 3, batch_first=True), nn.Linear(3, 3)
            self.first = nn.Parameter(torch.randn(1, 1, 3))

        def forward(self, tokens):
            state = self.first.expand(1, len(tokens), 3)
            out, _ = self.layer(self.words(tokens), (state, state.tanh()) if make is nn.LSTM else state)
            return self.head(out[:, -1])

    torch.manual_seed(0)
    loss = ModelLoss(Learned().double())
    inputs, targets = batch()
    found, _ = clipped_gradient_sum(loss, trainable(loss.module), (inputs["tokens"], targets), RULE)
    expected = one_by_one(loss, {"tokens": inputs["tokens"]}, targets)
    assert float(global_norm(subtract(found, expected))) < 1e-12
