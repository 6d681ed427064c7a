"""Who attacks, what they train on, and that nobody else is touched."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from fed_dpsat import RunConfig, simulate
from fed_dpsat.accounting.event import PrivacyEvent
from fed_dpsat.client.assignment import Assignment
from fed_dpsat.client.build import Experiment
from fed_dpsat.errors import SettingError
from fed_dpsat.lab.attacks import Attack, Attackers, choose_attackers
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


WRONG_UPDATES = {
    "another shape": (lambda u: {**u, "a": u["a"][:1]}, r"returns a as torch.float32\[1\], not torch.float32\[2\]"),
    "another type": (lambda u: {**u, "a": u["a"].double()}, r"returns a as torch.float64\[2\], not torch.float32\[2\]"),
    "a name too few": (lambda u: {"a": u["a"]}, r"returns tensors \['a'\], not \['a', 'b'\]"),
    "no tensor": (lambda u: {**u, "b": 0.0}, "returns b as a float, not a tensor"),
    "nothing": (lambda u: None, "returns a NoneType, not a dict of tensors"),
    "NaN": (lambda u: {**u, "b": u["b"] * torch.nan}, "returns NaN or inf in b"),
}


class Forges(Attack):
    def __init__(self, forge):
        self.of = forge

    def forge(self, scene):
        return self.of(scene.update)


def forged(forge, update):
    attackers = Attackers(attack=Forges(forge), clients=(0,))
    return attackers.forged(0, update, lambda client: update, num_clients=2, generator=np.random.default_rng(0))


@pytest.mark.parametrize("case", WRONG_UPDATES)
def test_an_update_of_another_form_is_refused_and_the_attack_blamed(case):
    forge, seen = WRONG_UPDATES[case]
    with pytest.raises(SettingError, match=f"attack='Forges' is not one whose forge .*: it {seen}; return finite"):
        forged(forge, {"a": torch.ones(2), "b": torch.tensor(1.0)})


def test_the_order_of_names_is_that_of_the_update_and_a_model_that_diverged_is_not_the_attacks_fault():
    update = {"a": torch.ones(2), "b": torch.tensor(torch.inf)}
    sent = forged(lambda u: {"b": -u["b"], "a": -u["a"]}, update)
    assert list(sent) == ["a", "b"]
    assert sent["b"] == -torch.inf


def test_an_attack_that_overrides_no_method_is_refused(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from fed_dpsat.lab.attacks import Attack\nclass Typo(Attack):\n    def forg(self, scene): return {}\n"
    )
    with pytest.raises(SettingError, match=r"mine.py:Typo' is not .* neither forge nor poison, .*; override forge"):
        Experiment.build(dataclasses.replace(CONFIG, attack=f"{path}:Typo"))


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
