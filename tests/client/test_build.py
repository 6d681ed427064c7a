"""Names become objects, and a client's round does what the configuration says."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch
from torch import nn

from fed_dpsat.accounting.event import PrivacyEvent
from fed_dpsat.client.assignment import Assignment
from fed_dpsat.client.build import Experiment
from fed_dpsat.data.dataset import Dataset, Examples
from fed_dpsat.errors import DataError, ModelError, SettingError
from fed_dpsat.params import trainable
from fed_dpsat.settings.config import RunConfig

CONFIG = RunConfig(noise_multiplier=1.0, num_clients=4, local_steps=2, num_rounds=3, momentum=0.5)
ASSIGNMENT = Assignment(round=1, event=PrivacyEvent(noise_multiplier=1.0, sample_rate=0.5, steps=2))


@pytest.fixture(scope="module")
def experiment():
    return Experiment.build(CONFIG)


@pytest.fixture(scope="module")
def params(experiment):
    return trainable(experiment.loss_fn.module)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_the_same_config_builds_the_same_objects(experiment):
    again = Experiment.build(CONFIG)
    assert same(trainable(again.loss_fn.module), trainable(experiment.loss_fn.module))
    assert all(np.array_equal(a, b) for a, b in zip(again.partitions, experiment.partitions, strict=True))


def test_another_seed_builds_another_model_and_partition(experiment):
    other = Experiment.build(dataclasses.replace(CONFIG, seed=1))
    assert not same(trainable(other.loss_fn.module), trainable(experiment.loss_fn.module))
    assert not np.array_equal(other.partitions[0], experiment.partitions[0])


def test_building_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    Experiment.build(CONFIG)
    assert torch.equal(torch.rand(1), expected)


def tiny(labels):
    examples = Examples(inputs=torch.rand(len(labels), 1, 2, 2), labels=torch.tensor(labels), mean=(0.0,), std=(1.0,))
    return Dataset(name="tiny", train=examples, test=examples, class_names=("a", "b"))


def test_objects_stand_in_for_names():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    config = RunConfig(noise_multiplier=1.0, num_clients=2, sample_rate=1.0)
    experiment = Experiment.build(config, dataset=tiny([0, 1, 0]), model=model)
    assert not experiment.named
    result = experiment.client_round(0, ASSIGNMENT, trainable(model), None)
    assert result.params.keys() == trainable(model).keys()


@pytest.mark.parametrize("model", ["linear", "tanh-cnn", "gpt", "timm:resnet18"])
def test_a_built_in_model_takes_no_two_inputs(model):
    examples = Examples(inputs={"a": torch.rand(3, 2), "b": torch.rand(3, 4)}, labels=torch.tensor([0, 1, 0]))
    two = Dataset(name="two", train=examples, test=examples, class_names=("a", "b"))
    config = RunConfig(noise_multiplier=1.0, num_clients=2, sample_rate=1.0, model=model)
    with pytest.raises(ModelError, match=f"model='{model}' takes one array, and the inputs .* are 'a', 'b'; join them"):
        Experiment.build(config, dataset=two)


def test_a_client_with_one_example_trains():
    experiment = Experiment.build(RunConfig(noise_multiplier=1.0, num_clients=3), dataset=tiny([0, 1, 0]))
    assert [len(indices) for indices in experiment.partitions] == [1, 1, 1]
    assignment = dataclasses.replace(ASSIGNMENT, event=dataclasses.replace(ASSIGNMENT.event, steps=5))
    result = experiment.client_round(0, assignment, trainable(experiment.loss_fn.module), None)
    assert all(torch.isfinite(p).all() for p in result.params.values())


def test_more_clients_than_examples_is_refused():
    with pytest.raises(SettingError, match="num_clients=4 is not at most 3"):
        Experiment.build(RunConfig(noise_multiplier=1.0, num_clients=4), dataset=tiny([0, 1, 0]))


@pytest.mark.parametrize(
    ("changes", "carried"),
    [
        ({"momentum": 0.0, "ascent_memory": "zero"}, set()),
        ({"momentum": 0.0, "optimizer": "dp-sgd"}, set()),
        ({"momentum": 0.0}, {"ascent"}),
        ({"momentum": 0.5, "optimizer": "dp-sgd"}, {"momentum"}),
        ({"momentum": 0.0, "optimizer": "dp-sgd", "clipping": "adaptive"}, {"clipping"}),
    ],
)
def test_what_a_client_carries_from_round_to_round_is_known(changes, carried):
    assert Experiment.build(dataclasses.replace(CONFIG, **changes)).carried_state() == carried


def test_validation_examples_are_no_clients_and_stand_in_the_test_splits_place(experiment):
    held = Experiment.build(dataclasses.replace(CONFIG, validation_share=0.25))
    total = len(experiment.dataset.train)
    assert len(held.dataset.test) == round(0.25 * total)
    assert sum(len(part) for part in held.partitions) == len(held.dataset.train) == total - round(0.25 * total)
    ours, theirs = ({row.tobytes() for row in e.inputs.numpy()} for e in (held.dataset.train, held.dataset.test))
    assert not ours & theirs


def test_another_seed_puts_other_examples_aside():
    first, second = (
        Experiment.build(dataclasses.replace(CONFIG, validation_share=0.1, seed=seed)).dataset.test for seed in (0, 1)
    )
    assert not torch.equal(first.inputs, second.inputs)


MINE = """
import numpy as np
from torch import nn

from fed_dpsat.step.clipping import FlatClipping
from fed_dpsat.data.digits import digits
from fed_dpsat.testing.problems import step_info


def data(names):
    import dataclasses
    return dataclasses.replace(digits(), name=names)


def by_place(labels, num_clients, step):
    return [np.arange(k, step * num_clients, num_clients) for k in range(num_clients)]


def network(num_classes, width):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Linear(width, num_classes))


def rule(clip_norm, share):
    return FlatClipping(clip_norm=share * clip_norm)
"""


def test_every_kind_of_plug_in_takes_arguments(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    config = dataclasses.replace(
        CONFIG,
        dataset=f"{tmp_path}/mine.py:data",
        dataset_args="names = 'north'",
        partition=f"{tmp_path}/mine.py:by_place",
        partition_args="step = 5",
        model=f"{tmp_path}/mine.py:network",
        model_args="width = 3",
        clipping=f"{tmp_path}/mine.py:rule",
        clipping_args="share = 0.5",
    )
    experiment = Experiment.build(config)
    assert experiment.dataset.name == "north"
    assert [len(part) for part in experiment.partitions] == [5] * 4
    assert experiment.loss_fn.module[1].out_features == 3
    assert experiment.clipping.clip_norm == config.clip_norm / 2


DRAWING = """
import random

import numpy as np
import torch
from torch import nn


def network():
    layer = nn.Linear(64, 10)
    layer.weight.data = torch.from_numpy(np.random.randn(10, 64)).float() * random.random()
    return nn.Sequential(nn.Flatten(), layer)


def parts(labels, num_clients):
    return np.array_split(np.random.permutation(len(labels)), num_clients)
"""


def test_a_factory_that_draws_from_any_generator_makes_the_same_for_a_seed(tmp_path):
    """Only torch was seeded: two runs of one seed had other weights, and numpy's generator had moved."""
    (tmp_path / "mine.py").write_text(DRAWING)
    config = dataclasses.replace(CONFIG, model=f"{tmp_path}/mine.py:network", partition=f"{tmp_path}/mine.py:parts")
    states = random.getstate(), np.random.get_state()[1].tolist()
    first, again = (Experiment.build(config) for _ in range(2))
    other = Experiment.build(dataclasses.replace(config, seed=1))
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert same(first.shared(), again.shared())
    assert not same(first.shared(), other.shared())


class Mixing(Examples):
    def batch(self, indices, device=None):
        inputs, labels = super().batch(indices, device)
        return inputs - inputs.mean(0), labels


class Shifting(torch.Tensor):
    """Rows that are taken from it are rows less their mean."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        answer = super().__torch_function__(func, types, args, kwargs or {})
        return answer - answer.mean(0) if func is torch.Tensor.index_select else answer


def mixed(split, kind):
    values = dict(vars(split))
    if kind == "rows":
        return Examples(**{**values, "inputs": split.inputs.as_subclass(Shifting)})
    if kind == "class":
        return Mixing(**values)
    own = Examples(**values)
    object.__setattr__(own, "batch", Mixing(**values).batch)
    return own


@pytest.mark.parametrize("share", [0.0, 0.1])
@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("kind", ["class", "rows", "method"])
def test_examples_that_may_mix_in_a_batch_are_refused(kind, split, share, experiment):
    """One of them would move the gradients of all others of its batch."""
    given = dataclasses.replace(experiment.dataset, **{split: mixed(getattr(experiment.dataset, split), kind)})
    config = dataclasses.replace(CONFIG, validation_share=share)
    with pytest.raises(DataError, match=rf"{split} .* is not .*; put .* into the model"):
        Experiment.build(config, dataset=given)
    with pytest.raises(DataError, match=rf"{split} .* is not .*; put .* into the model"):
        dataclasses.replace(experiment, dataset=given)


def test_a_data_set_that_may_answer_otherwise_later_is_refused(experiment):
    class Changing(Dataset):
        pass

    with pytest.raises(DataError, match=r"'Changing' is not Dataset itself"):
        Experiment.build(CONFIG, dataset=Changing(**vars(experiment.dataset)))
