"""The metrics of each task, against scikit-learn and definitions; and what is undefined."""

import json
import math

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from fed_dpsat.data.sequences import IGNORED
from fed_dpsat.tasks.classification import Classification
from fed_dpsat.tasks.metric import UNDEFINED
from fed_dpsat.tasks.multilabel import Multilabel
from fed_dpsat.tasks.regression import Regression
from fed_dpsat.tasks.tokens import CausalLM, MaskedLM, TokenClassification

NAMES = ("a", "b", "c")


def computed(task, outputs, targets, size=7):
    measure = task.measure()
    parts = [outputs.split(size)] if isinstance(outputs, torch.Tensor) else [o.split(size) for o in outputs]
    for *given, y in zip(*parts, targets.split(size), strict=True):
        measure.update(given[0] if len(given) == 1 else tuple(given), y)
    found = dict(measure.compute())
    assert found.keys() == {metric.name for metric in task.metrics}
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    return found


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_metrics_of_classes_are_those_of_scikit_learn():
    logits, y = random(50, 4), torch.arange(50) % 3  # a fourth output that no class has
    p, said = logits[:, :3].softmax(1).numpy(), logits[:, :3].argmax(1).numpy()
    found = computed(Classification(NAMES), logits, y)
    expected = {
        "accuracy": sk.accuracy_score(y, said),
        "balanced_accuracy": sk.balanced_accuracy_score(y, said),
        "macro_f1": sk.f1_score(y, said, average="macro"),
        "auroc": sk.roc_auc_score(y, p, multi_class="ovr"),
        "average_precision": sk.average_precision_score(np.eye(3)[y], p),
    }
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_class_without_examples_is_left_out_of_means():
    logits, y = random(40, 3), torch.arange(40) % 2
    found = computed(Classification(NAMES), logits, y)
    said, p = logits.argmax(1).numpy(), logits.softmax(1).numpy()
    with pytest.warns(UserWarning, match="y_pred contains classes"):
        assert found["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(y, said), rel=1e-5)
    each = [sk.roc_auc_score(y == k, p[:, k]) for k in (0, 1)]
    assert found["auroc"] == pytest.approx(np.mean(each), rel=1e-5)


def test_a_split_of_one_class_has_no_auroc():
    found = computed(Classification(NAMES), random(9, 3), torch.zeros(9, dtype=torch.int64))
    assert found["auroc"] == UNDEFINED
    assert found["accuracy"] != UNDEFINED


def test_metrics_of_several_classes_are_those_of_scikit_learn():
    logits, y = random(60, 3), (random(60, 3) + random(60, 3).flip(0) > 0.3).to(torch.float32)
    p = logits.sigmoid().numpy()
    found = computed(Multilabel(NAMES), logits, y)
    expected = {
        "macro_f1": sk.f1_score(y, p > 0.5, average="macro"),
        "auroc": sk.roc_auc_score(y, p),
        "average_precision": sk.average_precision_score(y, p),
        "accuracy": float((y.numpy() == (p > 0.5)).mean()),
    }
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_label_that_all_or_none_have_is_left_out():
    y = torch.zeros(8, 3)
    y[:, 0] = 1
    found = computed(Multilabel(NAMES), random(8, 3) - 9, y)
    assert found["auroc"] == UNDEFINED
    assert found["average_precision"] == pytest.approx(1)  # of the one label that examples have
    assert found["macro_f1"] == 0  # that label is never said


def test_metrics_of_numbers_are_in_their_own_units():
    task = Regression(2, ((100.0, 10.0), (0.0, 2.0)))
    outputs, y = random(30, 2), random(30, 2).flip(0) * torch.tensor([10, 2]) + torch.tensor([100, 0])
    numbers = outputs * torch.tensor([10, 2]) + torch.tensor([100, 0])
    found = computed(task, outputs.float(), y.float())
    expected = {
        "rmse": np.mean(sk.root_mean_squared_error(y, numbers, multioutput="raw_values")),
        "mae": sk.mean_absolute_error(y, numbers),
        "r2": sk.r2_score(y, numbers),
    }
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("y", [torch.ones(5), torch.ones(1)])
def test_numbers_that_do_not_differ_have_no_r2(y):
    found = computed(Regression(1, ()), torch.zeros(len(y), 1), y)
    assert found == {"rmse": 1.0, "mae": 1.0, "r2": UNDEFINED}


def test_perplexity_counts_tokens_and_not_texts():
    logits, y = random(8, 5, 11), (random(8, 5) * 100).long().abs() % 11
    y[:, 3:], y[0] = IGNORED, IGNORED
    found = computed(CausalLM(11), logits, y, size=3)
    log_p, wanted = logits[:, :-1].log_softmax(-1), y[:, 1:]
    terms = [-float(log_p[i, t, wanted[i, t]]) for i in range(8) for t in range(4) if wanted[i, t] != IGNORED]
    right = [int(log_p[i, t].argmax() == wanted[i, t]) for i in range(8) for t in range(4) if wanted[i, t] != IGNORED]
    assert found["perplexity"] == pytest.approx(math.exp(np.mean(terms)), rel=1e-5)
    assert found["token_accuracy"] == pytest.approx(np.mean(right))


def test_a_token_that_a_model_rules_out_leaves_a_perplexity():
    """In float32 its probability is 0."""
    logits = torch.tensor([[[0.0, 0.0], [0.0, 0.0], [200.0, 0.0]]])
    found = computed(CausalLM(2), logits[:, [2, 1, 0]], torch.tensor([[0, 1, 1]]))
    assert found["perplexity"] == pytest.approx(math.exp((200 + math.log(2)) / 2))


def test_a_single_class_has_metrics():
    ones = computed(Classification(("a",)), random(5, 1), torch.zeros(5).long())
    assert ones == {
        "accuracy": 1.0,
        "balanced_accuracy": 1.0,
        "macro_f1": 1.0,
        "auroc": UNDEFINED,
        "average_precision": 1.0,
    }
    found = computed(Multilabel(("a",)), torch.tensor([[1.0], [-1.0], [2.0]]), torch.tensor([[1.0], [0.0], [1.0]]))
    assert found == {"macro_f1": 1.0, "auroc": 1.0, "average_precision": 1.0, "accuracy": 1.0}


def test_hidden_tokens_alone_count():
    logits, y, hidden = random(6, 4, 11), torch.ones(6, 4, dtype=torch.int64), torch.arange(24).view(6, 4) % 5 == 0
    found = computed(MaskedLM(11), (logits, hidden), y, size=2)
    assert found["perplexity"] == pytest.approx(float((-logits.log_softmax(-1)[..., 1][hidden].mean()).exp()), rel=1e-5)


def test_texts_without_a_target_have_no_metric():
    assert set(computed(CausalLM(11), random(3, 1, 11), torch.ones(3, 1).long()).values()) == {UNDEFINED}
    empty = torch.full((3, 2), IGNORED)
    assert set(computed(TokenClassification(NAMES), random(3, 2, 3), empty).values()) == {UNDEFINED}


def test_metrics_of_positions_leave_out_those_without_a_label():
    logits, y = random(9, 5, 3), torch.arange(45).view(9, 5) % 3
    y[2:4] = IGNORED
    kept = (y != IGNORED).flatten()
    truth, said = y.flatten()[kept], logits.argmax(-1).flatten()[kept]
    found = computed(TokenClassification(NAMES), logits, y)
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(truth, said), rel=1e-5)
    assert found["macro_f1"] == pytest.approx(sk.f1_score(truth, said, average="macro"), rel=1e-5)


@pytest.mark.parametrize("task", [Classification(NAMES), Multilabel(NAMES), Regression(3, ())])
def test_outputs_that_overflow_are_undefined_and_no_error(task):
    from fed_dpsat.client.evaluation import evaluate
    from fed_dpsat.data.dataset import Examples

    labels = {"classification": torch.zeros(4).long(), "multilabel": torch.zeros(4, 3).byte()}
    examples = Examples(inputs=torch.zeros(4, 1), labels=labels.get(task.name, torch.zeros(4, 3)), mean=(0,), std=(1,))
    module = torch.nn.Linear(1, 3)
    torch.nn.init.constant_(module.bias, math.nan)
    found = evaluate(module, dict(module.named_parameters()), examples, task)
    assert set(found.values.values()) == {UNDEFINED}
