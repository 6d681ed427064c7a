"""On a device, an extractor of features is code: the policy lists it, and its cache is in the folder of the device."""

from __future__ import annotations

import json

import pytest
import torch

from fed_dpsat.client.form import form_of
from fed_dpsat.device.client import _experiment, num_examples
from fed_dpsat.device.journal import Refusal
from fed_dpsat.device.policy import Policy

EXTRACTOR = """
def doubled(factor = 2.0):
    return lambda x: factor * x.flatten(1)

def leaky():
    def extract(x):
        if len(x) > 8:
            raise ValueError(f"secret {x.sum()}")
        return x.flatten(1)
    return extract
"""


@pytest.fixture
def features(device):
    """The device allows its own extractors; a function gives the settings that name one of them."""
    (device.path / "own.py").write_text(EXTRACTOR)
    device.write(features=f'["{device.path}/own.py:doubled", "{device.path}/own.py:leaky"]')

    def named(name="doubled", **changes):
        return {"features": f"{device.path}/own.py:{name}", **changes}

    return named


def test_an_extractor_that_the_policy_does_not_list_is_refused_before_it_is_imported(device, tmp_path):
    (tmp_path / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    reply = device.ask(changes={"features": f"{tmp_path}/theirs.py:anything"})
    assert "theirs.py:anything' is not allowed on this device; choose one of none" in reply.error.reason
    assert "features='scattering' is not allowed" in device.ask(changes={"features": "scattering"}).error.reason
    assert not (tmp_path / "ran").exists()


def test_arguments_of_an_extractor_are_listed_as_written(device, features):
    reply = device.ask(changes=features(features_args="factor = 3.0"))
    assert "features_args='factor = 3.0' is not allowed on this device; choose one of none" in reply.error.reason


def test_a_listed_extractor_trains_on_features_and_caches_them_in_the_folder_of_the_device(device, features):
    params = {"1.weight": torch.zeros(2, 2), "1.bias": torch.zeros(2)}
    reply = device.ask(params=params, changes=features(cache_dir="/nowhere"))
    assert reply.has_content(), reply.error
    assert list((device.folder / "cache").glob("pixels-features-*"))


def test_another_extractor_than_the_servers_is_refused(device, features, settings):
    policy = Policy.load(device.policy_path)
    given = {**settings, **features()}
    data = _experiment(policy, policy.admit(7, given)).dataset
    assert num_examples(policy, 7, given, form_of(data)) == 20
    theirs = {**form_of(data), "features": json.dumps("0" * 64)}
    with pytest.raises(Refusal, match=r"^features: the run has .*; use the same extractor"):
        num_examples(policy, 7, given, theirs)
    with pytest.raises(Refusal, match=r"^features_sha256='1' is not"):
        num_examples(policy, 7, {**given, "features_sha256": "1"})


def test_what_an_extractor_says_of_an_example_stays_on_the_device(device, features):
    reply = device.ask(changes=features("leaky"))
    assert reply.has_error()
    assert "secret" not in reply.error.reason
