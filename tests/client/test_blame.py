"""Errors of a trial are blamed on the object that they come from, by frames and by what functions declare."""

from __future__ import annotations

import pytest

from fed_dpsat.client.blame import MARKED, TrialError, blamed_on, told
from fed_dpsat.client.build import Experiment
from fed_dpsat.flower.wire import codec
from fed_dpsat.settings.config import RunConfig


@pytest.fixture(scope="module")
def experiment():
    return Experiment.build(RunConfig(noise_multiplier=1.0, num_clients=2, update_codec="bf16"))


def fails():
    raise ValueError("no room\nand more")


@blamed_on("codec")
def declared():
    fails()


def test_a_declared_function_is_blamed_on_its_kind_whatever_its_name(experiment):
    said = r"^codec='bf16' fails on made-up examples of digits: ValueError: no room; set update_codec=fp32 \("
    with pytest.raises(TrialError, match=said), told(experiment):
        declared()
    assert {MARKED[function.__code__] for function in (codec.encode, codec.decode)} == {"codec"}


def test_an_error_of_no_object_is_blamed_on_the_run(experiment):
    said = r"^the run fails on made-up examples of digits: ValueError: no room \("
    with pytest.raises(TrialError, match=said), told(experiment):
        fails()
