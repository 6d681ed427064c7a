"""The task of a configuration, and what a run refuses with it before anything is charged."""

from __future__ import annotations

import pytest
import torch

from fed_dpsat.client.build import Experiment
from fed_dpsat.client.evaluation import measured
from fed_dpsat.data.dataset import Dataset, Examples
from fed_dpsat.errors import SettingError
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.tasks.classification import Classification
from fed_dpsat.tasks.regression import Regression

LABELS = {
    "classification": torch.arange(8) % 2,
    "multilabel": torch.ones(8, 2, dtype=torch.uint8),
    "regression": torch.arange(8, dtype=torch.float32),
}


def build(task, **change):
    examples = Examples(inputs=torch.rand(8, 3), labels=LABELS[task], mean=(0.0,) * 3, std=(1.0,) * 3)
    names = () if task == "regression" else ("a", "b")
    config = RunConfig(noise_multiplier=1.0, num_clients=2, model="linear", task=task, **change)
    return Experiment.build(config, dataset=Dataset(name="made", train=examples, test=examples, class_names=names))


@pytest.mark.parametrize("task", ["multilabel", "regression"])
@pytest.mark.parametrize(
    ("chain", "name"),
    [({"optimizer": "saf"}, "saf"), ({"optimizer": "dp-sat", "base_optimizer": "saf"}, "dp-sat over saf")],
)
def test_an_optimizer_that_compares_classes_is_refused_in_another_task(task, chain, name):
    """Its divergence of one number is 0: SAF was DP-SGD, in silence."""
    with pytest.raises(SettingError, match=rf"optimizer='{name}' is not possible with task='{task}': SAF.*; choose"):
        build(task, **chain)
    assert build("classification", **chain).task.outputs == 2


@pytest.mark.parametrize(("largest", "warned"), [(99.0, False), (1234.5, True)])
def test_large_targets_are_told_without_their_number(largest, warned, caplog):
    """With validation_share they are of private examples."""
    task, test = Regression(1, ((0.0, 1.0),)), torch.tensor([0.0, -largest])
    examples = [Examples(inputs=torch.zeros(2, 1), labels=y, mean=(0.0,), std=(1.0,)) for y in (torch.ones(2), test)]
    task.check(Dataset(name=f"targets warned={warned}", train=examples[0], test=examples[1]))
    assert ("above 100 after scaling" in caplog.text) == warned
    assert "1234" not in caplog.text
    assert "1.23e" not in caplog.text


class Doubled(Classification):
    def loss(self, outputs, targets):
        return 2 * super().loss(outputs, targets)


def test_a_task_made_from_that_of_classes_shows_its_own_loss():
    experiment = build("classification")
    module, test = experiment.loss_fn.module, experiment.dataset.test
    plain, _ = measured(module, experiment.shared(1), test, experiment.task)
    other, _ = measured(module, experiment.shared(1), test, Doubled(("a", "b")))
    assert other.loss == pytest.approx(2 * plain.loss)
    assert other.accuracy == pytest.approx(plain.accuracy)
