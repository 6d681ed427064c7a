"""Runs whose privacy unit is a person with several examples."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import pytest
import torch
from torch import nn

from fed_dpsat.accounting import PrivacyLedger, noise_multiplier_for
from fed_dpsat.accounting.event import UNITS, PrivacyError, PrivacyEvent
from fed_dpsat.client.assignment import Assignment
from fed_dpsat.client.build import Experiment
from fed_dpsat.client.train import with_stacks
from fed_dpsat.data.dataset import Dataset, Examples
from fed_dpsat.data.sequences import Sequences
from fed_dpsat.errors import DataError, SettingError
from fed_dpsat.run.statement import read_statement
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.simulation import simulate
from fed_dpsat.step.clipping import FlatClipping

PERSONS = np.repeat(np.arange(60), np.arange(60) % 5 + 1).astype(str)
COUNT = len(PERSONS)
CONFIG = RunConfig(
    privacy_unit="user",
    user_column="patient",
    user_examples=3,
    num_clients=3,
    num_rounds=2,
    partition="natural",
    partition_by="patient",
    target_epsilon=3.0,
    delta=1e-3,
    sample_rate=0.3,
    seed=1,
)


def table(patients=PERSONS):
    inputs = torch.randn(COUNT, 4, generator=torch.Generator().manual_seed(0))
    rows = Examples(
        inputs=inputs,
        labels=(inputs[:, 0] > 0).long(),
        mean=(0.0,) * 4,
        std=(1.0,) * 4,
        columns={} if patients is None else {"patient": patients},
    )
    return Dataset(name="table", train=rows, test=dataclasses.replace(rows, columns={}), class_names=("well", "sick"))


def experiment(config=CONFIG, data=None):
    return Experiment.build(config, dataset=table() if data is None else data)


def test_a_run_says_person_wherever_it_says_whom_it_protects(tmp_path):
    run = simulate(CONFIG, out=tmp_path / "run", dataset=table())
    noise = noise_multiplier_for(3.0, 1e-3, 0.3, 2, kind="poisson_gaussian_users")
    event = PrivacyEvent(noise_multiplier=noise, sample_rate=0.3, steps=2, kind="poisson_gaussian_users")
    with PrivacyLedger(run.path / "ledger.sqlite", readonly=True) as ledger:
        assert ledger.privacy_unit == "user"
        assert ledger.histories() == dict.fromkeys(range(3), (event,))
    assert run.summary["privacy_unit"] == read_statement(run.path).unit == UNITS["user"]
    assert "person" in UNITS["user"]
    assert run.summary["declared_public"][0] == "number of persons of each client"
    assert run.summary["epsilon"] == pytest.approx(3.0, rel=2e-3)
    assert run.summary["examples_per_second"] == 0  # how many there are is private


def test_clients_count_persons():
    made = experiment()
    assert sum(made.sizes) == 60
    assert [len(made.persons(client)) for client in range(3)] == made.sizes
    assert made.persons(0).most == 3


def test_a_person_more_moves_the_sum_by_the_clip_norm_at_most():
    plain = {"target_epsilon": 0.0, "private": False, "optimizer": "dp-sgd", "lr": 1.0, "sample_rate": 1.0}
    config = dataclasses.replace(CONFIG, **plain, user_examples=5)
    event = PrivacyEvent(noise_multiplier=0.0, sample_rate=1.0, steps=1, kind="poisson_gaussian_users")
    moves, whole = [], experiment(config)
    part = whole.partitions[0]
    person = PERSONS[part[0]]
    kept = part[PERSONS[part] != person]
    for own in (part, kept):
        made = dataclasses.replace(whole, partitions=[own, *whole.partitions[1:]])
        start = made.shared()
        sent = made.client_round(0, Assignment(round=1, event=event), start, None).params
        moves.append(made.sizes[0] * torch.cat([(sent[n] - start[n]).flatten() for n in start]))  # sums: C is 0.5
    assert float((moves[0] - moves[1]).norm()) <= 0.5 * (1 + 1e-4)
    assert float((moves[0] - moves[1]).norm()) > 0.1


def test_an_assignment_of_another_unit_is_refused():
    made = experiment(dataclasses.replace(CONFIG, target_epsilon=0.0, noise_multiplier=1.0))
    event = PrivacyEvent(noise_multiplier=1.0, sample_rate=0.3, steps=1)
    with pytest.raises(PrivacyError, match="unit 'example'"):
        made.client_round(0, Assignment(round=1, event=event), made.shared(), None)


def test_persons_in_several_clients_are_told(caplog):
    with caplog.at_level(logging.WARNING, logger="fed_dpsat"):
        experiment()
        assert "several clients" not in caplog.text
        experiment(dataclasses.replace(CONFIG, partition="iid", partition_by=""))
    assert "some persons have examples in several clients" in caplog.text
    assert "partition_by=patient" in caplog.text


def test_one_person_alone_is_told(caplog):
    with caplog.at_level(logging.WARNING, logger="fed_dpsat"):
        experiment(dataclasses.replace(CONFIG, num_clients=1), table(np.full(COUNT, "one")))
    assert "one person alone" in caplog.text


def test_clients_with_persons_are_not_stacked():
    assert with_stacks(CONFIG, FlatClipping(clip_norm=1.0), 100).stack_clients == 1


@pytest.mark.parametrize(
    ("patients", "says"),
    [
        (None, "user_column='patient' is not a column of the data set"),
        (np.where(np.arange(COUNT) == 7, None, PERSONS), "no value for 1 of .* the first is 7"),
        (np.where(np.arange(COUNT) == 7, np.nan, np.arange(COUNT)), "no value for 1"),
        (np.where(np.arange(COUNT) == 7, 7, PERSONS.astype(object)), "mixes types"),
        (np.zeros((COUNT, 2)), "not one person for each example"),
    ],
)
def test_refuses_columns_that_name_no_person(patients, says):
    with pytest.raises(DataError, match=says):
        experiment(dataclasses.replace(CONFIG, partition="iid", partition_by=""), table(patients))


def notes(*names):
    """Twelve texts of 3 to 36 bytes of four persons."""
    lengths = torch.arange(1, 13) * 3
    texts = Sequences(
        values=torch.arange(int(lengths.sum())) % 256,
        offsets=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        vocabulary_size=256,
        max_length=40,
    )
    columns = {"patient": np.arange(12) % 4}
    rows = Examples(inputs=dict.fromkeys(names, texts), labels=torch.arange(12) % 2, columns=columns)
    return Dataset(name="notes", train=rows, test=dataclasses.replace(rows, columns={}), class_names=("a", "b"))


ALL = {"num_clients": 1, "partition": "iid", "partition_by": "", "sample_rate": 1.0}


class Words(nn.Module):
    """The mean of two numbers for each byte of all texts."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(256, 2)

    def forward(self, **texts):
        words = torch.cat([text for name, text in texts.items() if "mask" not in name], 1)
        return self.table(words).mean(1)


def test_texts_of_persons(tmp_path):
    run = simulate(dataclasses.replace(CONFIG, **ALL), out=tmp_path / "run", dataset=notes("notes"), model=Words())
    assert run.summary["status"] == "completed"


def test_refuses_several_texts_by_name():
    with pytest.raises(SettingError, match=r"several texts of an example \(a, b\)"):
        Experiment.build(dataclasses.replace(CONFIG, **ALL), dataset=notes("a", "b"), model=Words())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"user_column": ""}, "user_column='' is not enough with privacy_unit='user'"),
        ({"validation_share": 0.1}, "validation_share=0.1 is not 0 with privacy_unit='user'"),
        ({"test_share": 0.1}, "test_share=0.1 is not 0"),
        ({"privacy_unit": "example"}, "user_examples=3 is not possible with privacy_unit='example'"),
        ({"privacy_unit": "client", "user_examples": 8, "user_gradient": "sum"}, "user_gradient='sum'"),
        ({"keep_share": 0.5}, "keep_share=0.5 is not 1 with privacy_unit='user'"),
    ],
)
def test_refuses_settings_that_exclude_each_other(changes, says):
    with pytest.raises(SettingError, match=says):
        dataclasses.replace(CONFIG, **changes)
