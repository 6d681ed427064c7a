"""The networks of texts: what they predict from, and that clipping sees each text alone."""

import math

import pytest
import torch

from fed_dpsat.data.sequences import IGNORED
from fed_dpsat.errors import ModelError
from fed_dpsat.params import trainable
from fed_dpsat.plugins import builtin, summary
from fed_dpsat.step.clipping import FlatClipping
from fed_dpsat.step.gradients.per_example import ModelLoss, clipped_gradient_sum
from fed_dpsat.tasks.classification import Classification
from fed_dpsat.tasks.tokens import CausalLM

BYTES, LENGTH = 261, 64
COUNTS = {"gpt": 472_069, "gru": 166_149}
each_model = pytest.mark.parametrize("name", COUNTS)


def build(name, task="causal-lm", vocabulary=11, **more):
    torch.manual_seed(0)
    outputs = vocabulary if task == "causal-lm" else 3
    return builtin("model")[name]((LENGTH,), outputs, vocabulary, task, **{"width": 8, **more})


def batch(count=4, length=6):
    tokens = torch.randint(0, 11, (count, length), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(length)[None] < torch.tensor([[length], [1], [3], [0]])[:count]).long()
    return {"input_ids": tokens, "attention_mask": mask}


@each_model
def test_parameter_count_is_the_documented_one(name):
    module = builtin("model")[name]((LENGTH,), BYTES, BYTES, "causal-lm")
    assert sum(p.numel() for p in module.parameters()) == COUNTS[name]
    assert f"{COUNTS[name]:,}" in summary(builtin("model")[name])


@each_model
def test_a_position_does_not_see_later_ones(name):
    module, inputs = build(name), batch()
    changed = {**inputs, "input_ids": inputs["input_ids"].index_fill(1, torch.tensor([4]), 0)}
    with torch.no_grad():
        before, after = module(**inputs), module(**changed)
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


@each_model
def test_padding_is_in_no_output_of_a_text(name):
    module, inputs = build(name, "classification"), batch()
    changed = {**inputs, "input_ids": inputs["input_ids"].where(inputs["attention_mask"].bool(), 7)}
    with torch.no_grad():
        torch.testing.assert_close(module(**inputs), module(**changed))
    assert module(**inputs).shape == (4, 3)


@each_model
@pytest.mark.parametrize("task", ["causal-lm", "classification"])
def test_the_clipped_sum_is_that_of_single_texts(name, task):
    module, inputs, clip_norm = build(name, task), batch(), 0.05
    made = CausalLM(11) if task == "causal-lm" else Classification(("a", "b", "c"))
    targets = torch.tensor([0, 2, 1, 0])
    if task == "causal-lm":
        targets = inputs["input_ids"].where(inputs["attention_mask"].bool(), IGNORED)
    found, _ = clipped_gradient_sum(
        ModelLoss(module, made.loss), trainable(module), (inputs, targets), FlatClipping(clip_norm=clip_norm)
    )
    wide = module.double()
    expected = {key: torch.zeros_like(p) for key, p in wide.named_parameters()}
    for i in range(4):
        outputs = wide(**{key: value[i : i + 1] for key, value in inputs.items()})
        loss = made.loss(outputs, targets[i : i + 1]).sum()
        gradients = torch.autograd.grad(loss, list(wide.parameters()))
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        for key, g in zip(expected, gradients, strict=True):
            expected[key] += g * (min(1.0, clip_norm / norm) if norm else 0.0)
    for key, value in expected.items():
        torch.testing.assert_close(found[key].double(), value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gpt", {"width": 6}, "width=6 is no multiple of heads=4"),
        ("gpt", {"layers": 0}, "layers=0"),
        ("gru", {"width": 0}, "width=0"),
        ("gru", {"vocabulary": 0}, "is for texts"),
    ],
)
def test_what_cannot_be_built_is_refused(name, change, message):
    with pytest.raises(ModelError, match=message):
        build(name, **change)
