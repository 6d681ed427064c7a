from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from fed_dpsat.client.evaluation import (
    CALIBRATION_BINS,
    ClassAccuracy,
    client_accuracies,
    evaluate,
    evaluation_of,
    gini,
    predict,
    quality_of,
    reliability,
    worst_decile,
)
from fed_dpsat.data.dataset import Examples
from fed_dpsat.plugins import PluginError
from fed_dpsat.tasks.base import Measure
from fed_dpsat.tasks.metric import UNDEFINED, Metric
from fed_dpsat.tasks.regression import Regression


def model_and_examples():
    module = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False))
    params = {"1.weight": torch.eye(2) * math.log(3)}  # logits (log 3, 0): probability 3/4 for the hot one
    inputs = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]).view(3, 1, 1, 2)
    return module, params, Examples(inputs=inputs, labels=torch.tensor([0, 1, 1]), mean=(0.0,), std=(1.0,))


@pytest.mark.parametrize("batch_size", [1, 2, 500])
def test_accuracy_and_loss_of_a_model_whose_answers_are_known(batch_size):
    module, params, examples = model_and_examples()
    result = evaluation_of(predict(module, params, examples, batch_size))
    assert result.accuracy == pytest.approx(2 / 3)
    assert result.loss == pytest.approx((2 * math.log(4 / 3) + math.log(4)) / 3)
    assert result.num_examples == 3
    assert module.training


def test_quality_of_a_model_whose_answers_are_known():
    module, params, examples = model_and_examples()
    quality = quality_of(predict(module, params, examples, batch_size=2), 3)
    assert quality.accuracy == pytest.approx(2 / 3)
    assert quality.nll == pytest.approx((2 * math.log(4 / 3) + math.log(4)) / 3)
    assert quality.brier == pytest.approx((2 * (2 / 16) + 2 * 9 / 16) / 3)  # (1/4, 1/4) twice, (3/4, 3/4) once
    assert quality.ece == quality.mce == pytest.approx(3 / 4 - 2 / 3)  # all three are in one bin
    assert [b.count for b in quality.bins if b.count] == [3]
    assert [(c.count, c.accuracy) for c in quality.per_class] == [(1, 1.0), (2, 0.5), (0, None)]


def test_bins_are_closed_above_and_of_equal_width():
    bins = reliability(np.array([0.25, 0.5, 0.50001, 1.0]), np.array([True, False, True, True]), num_bins=4)
    assert [b.count for b in bins] == [1, 1, 1, 1]
    assert [(b.low, b.high) for b in bins] == [(0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0)]
    assert [b.accuracy for b in bins] == [1.0, 0.0, 1.0, 1.0]


def test_ece_weights_bins_by_examples_and_mce_takes_the_worst():
    # confidence 0.9, right 3 of 4 (gap 0.15), and 0.6, wrong once (gap 0.6)
    p = torch.tensor([[0.9, 0.1]] * 4 + [[0.6, 0.4]], dtype=torch.float64)
    quality = quality_of([(p.log(), torch.tensor([0, 0, 0, 1, 1]))], 2)
    assert quality.ece == pytest.approx((4 * 0.15 + 1 * 0.6) / 5)
    assert quality.mce == pytest.approx(0.6)
    assert len(quality.bins) == CALIBRATION_BINS == 15


def test_a_uniform_guess_has_the_brier_score_and_the_nll_of_one():
    quality = quality_of([(torch.zeros(8, 4), torch.arange(8) % 4)], 4)
    assert quality.brier == pytest.approx(3 / 16 + 9 / 16)
    assert quality.nll == pytest.approx(math.log(4))
    assert quality.ece == pytest.approx(0.0, abs=1e-12)  # right one time in four, and a quarter sure


class Given(Measure):
    def __init__(self, values):
        self._values = values

    def update(self, outputs, targets):
        pass

    def compute(self):
        return self._values


class Ranking(Regression):
    name = "ranking"
    metrics = (Metric(name="rank", label="rank"),)

    def __init__(self, found):
        super().__init__(1, ())
        self.found = found

    def measure(self):
        return Given(self.found)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(torch.tensor(0.5), 0.5), (float("nan"), UNDEFINED), (UNDEFINED, UNDEFINED), (np.float32(2), 2.0)],
)
def test_a_value_of_a_task_of_ones_own_is_a_number_or_undefined(value, shown):
    module, params, examples = model_and_examples()
    numbers = Examples(inputs=examples.inputs, labels=torch.zeros(3), mean=(0.0,), std=(1.0,))
    assert evaluate(module, params, numbers, Ranking({"rank": value})).values == {"rank": shown}
    with pytest.raises(PluginError, match="task='ranking': its measure has no 'rank'; return a value of each metric"):
        evaluate(module, params, numbers, Ranking({}))


def test_outputs_that_are_not_finite_have_no_calibration():
    quality = quality_of([(torch.tensor([[math.nan, 0.0], [0.0, 9.0]]), torch.tensor([0, 1]))], 2)
    assert quality.num_nonfinite == 1
    assert all(math.isnan(v) for v in (quality.ece, quality.mce, quality.nll, quality.brier))
    assert sum(b.count for b in quality.bins) == 1


def test_accuracy_on_a_clients_mix_of_labels_is_the_weighted_mean():
    per_class = [
        ClassAccuracy(count=4, accuracy=1.0),
        ClassAccuracy(count=4, accuracy=0.5),
        ClassAccuracy(count=0, accuracy=None),
    ]
    found = client_accuracies(np.array([[3, 1, 0], [0, 2, 0], [1, 0, 1]]), per_class)
    assert found[:2] == pytest.approx([7 / 8, 0.5])
    assert math.isnan(found[2])


@pytest.mark.parametrize(
    ("values", "worst", "inequality"),
    [
        ([0.5] * 10, 0.5, 0.0),
        ([0.0, 1.0], 0.0, 0.5),  # |0 - 1| twice over 2 * 4 * 1/2
        ([1.0, 2.0, 3.0], 1.0, 2 / 9),  # 8 over 2 * 9 * 2
        ([0.9] * 18 + [0.1, 0.3], 0.2, None),  # two of twenty
        ([i / 100 for i in range(11)], 0.005, None),  # two of eleven
        ([0.0, 0.0], 0.0, 0.0),
    ],
)
def test_worst_decile_and_gini(values, worst, inequality):
    assert worst_decile(values) == pytest.approx(worst)
    if inequality is not None:
        assert gini(values) == pytest.approx(inequality)


def test_nobody_has_neither():
    assert math.isnan(worst_decile([]))
    assert math.isnan(gini([]))
