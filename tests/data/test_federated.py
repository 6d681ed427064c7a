"""The data of a configuration: a partition sees the training split, with its columns, also if some is held out."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from fed_dpsat.client.build import Experiment
from fed_dpsat.data.dataset import Dataset, Examples
from fed_dpsat.data.federated import Federated
from fed_dpsat.data.sequences import Sequences
from fed_dpsat.errors import DataError
from fed_dpsat.plugins import PluginError
from fed_dpsat.settings.config import RunConfig

CONFIG = RunConfig(noise_multiplier=1.0, num_clients=4, partition="natural", partition_by="ward")


def hospital(labels):
    """40 examples, the input of each is its own number; example i is of ward i % 4."""
    number = torch.arange(40, dtype=torch.float32).view(40, 1)
    train = Examples(inputs=number, mean=(0.0,), std=(1.0,), labels=labels, columns={"ward": np.array([*"nesw"] * 10)})
    return Dataset(name="hospital", train=train, test=train, class_names=("ill", "well"))


CLASSES = torch.arange(40) // 20


def test_a_client_holds_a_ward_also_if_validation_examples_are_held_out():
    """Columns that stay behind would deal each client other wards."""
    for share in (0.0, 0.25):
        found = Federated.build(dataclasses.replace(CONFIG, validation_share=share), hospital(CLASSES))
        wards = [found.dataset.train.inputs[torch.from_numpy(part)].flatten() % 4 for part in found.partitions]
        assert [set(ward.tolist()) for ward in wards] == [{1}, {0}, {2}, {3}]  # e, n, s, w
        assert sum(map(len, found.partitions)) == 40 * (1 - share)


MINE = """
import numpy as np

def mine(labels, columns, num_examples, num_clients, seed):
    assert num_examples == len(columns["ward"]) == 30
    assert labels is None or labels.shape == (30,) and labels.dtype == np.int64
    columns["ward"][:] = "x"  # its own copy
    if labels is not None:
        labels[:] = 0
    return np.array_split(np.random.default_rng(seed).permutation(num_examples), num_clients)

"""


@pytest.mark.parametrize("labels", [CLASSES, CLASSES.float()])
def test_a_partition_of_ones_own_gets_copies_of_labels_and_columns(tmp_path, labels):
    (tmp_path / "mine.py").write_text(MINE)
    given = hospital(labels)
    config = dataclasses.replace(CONFIG, partition=f"{tmp_path}/mine.py:mine", validation_share=0.25)
    found = Federated.build(config, given)
    assert sum(map(len, found.partitions)) == 30
    assert (given.train.labels == labels).all()
    assert found.dataset.train.columns["ward"].tolist().count("x") == 0


@pytest.mark.parametrize("kind", ["task", "model", "optimizer", "clipping"])
@pytest.mark.parametrize("private", ["labels", "columns"])
def test_only_a_partition_is_given_private_labels(tmp_path, kind, private):
    """A task could weight classes by them, which no epsilon covers."""
    (tmp_path / "weighted.py").write_text(f"def weighted({private}):\n    raise RuntimeError\n")
    config = dataclasses.replace(CONFIG, **({"model": "linear"} | {kind: f"{tmp_path}/weighted.py:weighted"}))
    with pytest.raises(PluginError, match=f"{kind}='.*' needs '{private}', which is not a setting"):
        Experiment.build(config, dataset=hospital(CLASSES))


def test_partitions_by_class_are_refused_for_labels_that_are_no_classes():
    numbers = hospital(CLASSES.float())
    text = Sequences(values=torch.arange(40), offsets=torch.arange(41), max_length=1, vocabulary_size=40)
    texts = Examples(inputs={"input_ids": text}, labels=None, columns=numbers.train.columns)
    for data in (numbers, Dataset(name="letters", train=texts, test=texts)):
        with pytest.raises(DataError, match=r"partition='dirichlet' divides by class, .* choose natural"):
            Federated.build(dataclasses.replace(CONFIG, partition="dirichlet"), data)
        for name in ("natural", "iid", "size-skew", "linear"):
            assert len(Federated.build(dataclasses.replace(CONFIG, partition=name), data).partitions) == 4


def test_arguments_that_a_run_fills_are_refused(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    config = dataclasses.replace(CONFIG, partition=f"{tmp_path}/mine.py:mine", partition_args="num_examples = 3")
    with pytest.raises(PluginError, match="'num_examples' is a setting of its own"):
        Federated.build(config, hospital(CLASSES))
