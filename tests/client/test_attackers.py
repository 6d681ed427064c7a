"""Who attacks, what they train on, and that nobody else is touched."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fed_dpsat import RunConfig, simulate
from fed_dpsat.accounting.event import PrivacyEvent
from fed_dpsat.client.assignment import Assignment
from fed_dpsat.client.build import Experiment
from fed_dpsat.errors import SettingError
from fed_dpsat.lab.attacks import choose_attackers
from fed_dpsat.params import subtract, trainable

CONFIG = RunConfig(num_clients=5, num_rounds=2, noise_multiplier=1.0, attack="sign-flip", attackers=0.4)
HONEST = dataclasses.replace(CONFIG, attack="", attackers=0.0)
ASSIGNMENT = Assignment(round=1, event=PrivacyEvent(noise_multiplier=1.0, sample_rate=0.5, steps=1))


def updates(config: RunConfig) -> list[dict[str, torch.Tensor]]:
    experiment = Experiment.build(config)
    params = trainable(experiment.loss_fn.module)
    return [subtract(experiment.client_round(c, ASSIGNMENT, params, None).params, params) for c in range(5)]


def test_the_share_is_rounded_drawn_from_the_seed_and_at_least_one():
    assert len(choose_attackers(10, 0.2, seed=0)) == 2
    assert len(choose_attackers(10, 0.01, seed=0)) == 1
    assert choose_attackers(100, 0.3, seed=1) == choose_attackers(100, 0.3, seed=1)
    assert choose_attackers(100, 0.3, seed=1) != choose_attackers(100, 0.3, seed=2)


def test_attackers_send_what_they_forge_and_the_others_what_they_trained():
    attackers = Experiment.build(CONFIG).attackers.clients
    assert len(attackers) == 2
    for client, (honest, sent) in enumerate(zip(updates(HONEST), updates(CONFIG), strict=True)):
        for name, update in honest.items():
            factor = -4.0 if client in attackers else 1.0
            assert torch.allclose(sent[name], factor * update, atol=1e-5)


def test_only_attackers_labels_are_poisoned_and_never_the_test_split():
    honest, attacked = (Experiment.build(dataclasses.replace(c)) for c in (HONEST, CONFIG))
    assert torch.equal(honest.dataset.train.labels, attacked.dataset.train.labels)
    flipped = Experiment.build(dataclasses.replace(CONFIG, attack="label-flip"))
    for client, indices in enumerate(flipped.partitions):
        own, true = (e.dataset.train.labels[torch.from_numpy(indices)] for e in (flipped, honest))
        assert torch.equal(own, 9 - true if client in flipped.attackers.clients else true)
    assert torch.equal(flipped.dataset.test.labels, honest.dataset.test.labels)


def test_colluders_are_all_attackers_and_send_the_same_but_for_rounding():
    config = dataclasses.replace(CONFIG, attack="little-is-enough")
    first, second = (updates(config)[c] for c in Experiment.build(config).attackers.clients)
    for name, update in first.items():
        assert torch.allclose(update, second[name], atol=1e-5)


def test_a_run_with_attackers_charges_them_like_the_others(tmp_path):
    summaries = [simulate(config, tmp_path / name) for name, config in (("a", CONFIG), ("h", HONEST))]
    assert summaries[0]["epsilon"] == summaries[1]["epsilon"]
    assert summaries[0]["test_accuracy"] != summaries[1]["test_accuracy"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attack": ""}, "attackers=0.4 is not possible with attack=''"),
        ({"attackers": 0.0}, "attackers=0.0 is not possible with attack='sign-flip'"),
        ({"noise_source": "system"}, "attack='sign-flip' is not possible with noise_source='system'"),
    ],
)
def test_half_an_attack_is_refused(changes, message):
    with pytest.raises(SettingError, match=message):
        dataclasses.replace(CONFIG, **changes)
