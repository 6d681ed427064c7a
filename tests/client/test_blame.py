"""Errors of a trial are blamed on the object that they come from, by frames and by what functions declare."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fed_dpsat.client.blame import MARKED, TrialError, blamed_on, optimizer_remedy, told
from fed_dpsat.client.build import Experiment
from fed_dpsat.flower.wire import codec
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.step.optimizers import DPSGD


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


@pytest.mark.parametrize(
    ("seen", "lower"), [("NaN or inf in w", True), ("w has numbers beyond 1e+14", True), ("parameters ['v']", False)]
)
def test_a_lower_lr_is_the_remedy_for_numbers_that_grow_alone(seen, lower):
    assert optimizer_remedy(seen).startswith("lower lr") == lower


class Misspells(DPSGD):
    def update(self, params, private_gradient, state, info):
        return {name: g.sgin() for name, g in private_gradient.items()}, state


def test_the_place_in_a_users_code_is_said(experiment):
    """The user's frame, also if the error comes from a function of torch; without the advice to lower lr."""
    experiment = dataclasses.replace(experiment, optimizer=Misspells(lr=0.1))
    line = Misspells.update.__code__.co_firstlineno + 1
    said = rf"update: AttributeError: .*'sgin' \(test_blame.py, line {line}\); run fed_dpsat.testing.check_opt"
    with pytest.raises(TrialError, match=said), told(experiment):
        experiment.optimizer.update({}, {"w": torch.ones(1)}, {}, None)
