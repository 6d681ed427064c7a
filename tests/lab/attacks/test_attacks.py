"""What each attack sends, of updates that a reader can compute with."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fed_dpsat import plugins
from fed_dpsat.lab.attacks import Attack, Scene

OWN = {"w": torch.tensor([3.0, -4.0])}
OTHER = {"w": torch.tensor([1.0, 0.0])}


def scene(update=OWN, colluders=(OWN, OTHER), num_clients=10) -> Scene:
    return Scene(
        update=update,
        colluders=lambda: list(colluders),
        num_clients=num_clients,
        num_attackers=len(colluders),
        generator=np.random.default_rng(0),
    )


def forged(name: str, arguments: str = "", **settings: object) -> list[float]:
    return plugins.build("attack", name, {}, arguments).forge(scene(**settings))["w"].tolist()


def test_sign_flip_goes_the_other_way():
    assert forged("sign-flip", "strength = 2.0") == [-6.0, 8.0]


def test_scaling_shouts():
    assert forged("scaling", "factor = 10.0") == [30.0, -40.0]


def test_model_replacement_makes_up_for_the_honest():
    assert forged("model-replacement") == [15.0, -20.0]  # ten clients, two attackers


def test_little_is_enough_hides_in_the_spread():
    """Means 2 and -2, standard deviations 1 and 2."""
    assert forged("little-is-enough", "z = 1.5") == [0.5, -5.0]
    assert forged("little-is-enough", "z = 1.5", colluders=[OWN]) == [3.0, -4.0]


def test_gaussian_has_the_norm_it_says():
    big = {"a": torch.ones(100, 50), "b": torch.ones(5000)}
    found = plugins.build("attack", "gaussian", {}, "factor = 3.0").forge(scene(update=big))
    flat = torch.cat([u.flatten() for u in found.values()])
    assert flat.norm() == pytest.approx(300, rel=0.03)
    assert flat.dtype == torch.float32
    assert abs(float(flat.mean())) < 0.1


@pytest.mark.parametrize("name", ["label-flip", "model-replacement"])
def test_labels_are_flipped(name):
    labels = torch.tensor([0, 1, 9])
    assert plugins.build("attack", name, {}).poison(labels, 10).tolist() == [9, 8, 0]


@pytest.mark.parametrize("name", sorted(plugins.builtin("attack").keys() - {"label-flip", "model-replacement"}))
def test_the_others_keep_their_labels(name):
    labels = torch.tensor([0, 1, 9])
    assert plugins.build("attack", name, {}).poison(labels, 10) is labels


def test_an_attack_as_it_stands_is_honest():
    assert Attack().forge(scene()) is OWN
