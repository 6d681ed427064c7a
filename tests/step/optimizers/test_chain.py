"""``base_optimizer = "disk+adam"``: names become optimizers over optimizers, or an error that says which and why."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fed_dpsat.accounting.event import PrivacyEvent
from fed_dpsat.client.assignment import Assignment
from fed_dpsat.client.build import Experiment
from fed_dpsat.params import trainable
from fed_dpsat.plugins import PluginError
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.step.optimizers.base import ASCENT, BASE
from fed_dpsat.step.optimizers.chain import build_optimizer, described
from fed_dpsat.step.optimizers.dpsat import DPSAT
from fed_dpsat.step.optimizers.dpsgd import DPSGD
from fed_dpsat.testing.problems import step_info

PLUGINS = """
from dataclasses import dataclass
from typing import Any
import torch

@dataclass(frozen=True, kw_only=True)
class Halving:
    base: Any
    share: float = 0.5
    def init(self, params): return self.base.init(params)
    def query_point(self, params, state, info): return self.base.query_point(params, state, info)
    def update(self, params, private_gradient, state, info):
        return self.base.update(params, {n: self.share * g for n, g in private_gradient.items()}, state, info)

@dataclass(frozen=True, kw_only=True)
class Sign:
    lr: float
    power: float = 0.0
    def init(self, params): return {}
    def query_point(self, params, state, info): return params
    def update(self, params, private_gradient, state, info):
        return {n: p - self.lr * private_gradient[n].sign() for n, p in params.items()}, state

def anything(base, **more): return Halving(base=base, share=more["portion"])
"""


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(PLUGINS)
    return lambda name: f"{path}:{name}"


def built(optimizer, base_optimizer="dp-sgd", arguments="", **settings):
    settings = {**RunConfig(noise_multiplier=1.0, **settings).settings(), "total_steps": 10}
    return build_optimizer(optimizer, base_optimizer, settings, arguments)


def test_the_default_is_what_it_was():
    assert built("dp-sat", rho=0.5, lr=3.0, momentum=0.5) == DPSAT(
        base=DPSGD(lr=3.0, momentum=0.5, total_steps=10), rho=0.5
    )
    assert built("dp-sgd") == DPSGD(lr=2.0, total_steps=10)


def test_each_is_built_over_the_next(mine):
    optimizer = built("dp-sat", f"{mine('Halving')} + {mine('Sign')}", lr=0.25, rho=10.0)
    assert [type(o).__name__ for o in (optimizer, optimizer.base, optimizer.base.base)] == ["DPSAT", "Halving", "Sign"]
    params, gradient = {"a": torch.tensor([1.0])}, {"a": torch.tensor([-4.0])}
    moved, state = optimizer.update(params, gradient, optimizer.init(params), step_info())
    assert moved["a"] == 1.25
    assert optimizer.query_point(moved, state, step_info())["a"] == 1.25 - 10


def test_the_last_that_wants_a_base_stands_on_dp_sgd(mine):
    assert built("dp-sat", mine("Halving")).base.base == DPSGD(lr=2.0, total_steps=10)


def test_an_argument_goes_to_whoever_names_it(mine):
    optimizer = built("dp-sat", f"{mine('Halving')}+{mine('Sign')}", "share = 0.125, power = 2.0")
    assert (optimizer.base.share, optimizer.base.base.power) == (0.125, 2.0)
    assert built(mine("anything"), arguments="portion = 0.75").share == 0.75


@pytest.mark.parametrize(
    ("optimizer", "base", "arguments", "says"),
    [
        ("dp-sta", "dp-sgd", "", "optimizer='dp-sta' is not a built-in optimizer; did you mean .*dp-sat"),
        ("dp-sat", "dp-sdg", "", "base_optimizer='dp-sdg': optimizer='dp-sdg' is not .* did you mean .*dp-sgd"),
        ("dp-sat", "Halving+dp-sdg", "", r"base_optimizer='.*Halving\+dp-sdg': optimizer='dp-sdg' is not"),
        ("dp-sat+Halving", "dp-sgd", "", "is one name; write optimizer='dp-sat', base_optimizer='Halving'"),
        ("dp-sgd", "Halving", "", "has nothing to be the base of: optimizer='dp-sgd' takes none; leave it at 'dp-sgd'"),
        ("dp-sat", "Sign+Halving", "", "'.*Sign' takes no base, so '.*Halving' is none for it; put it last"),
        ("dp-sat", "dp-sgd+Halving", "", "'dp-sgd' takes no base, so '.*Halving' is none for it; put it last"),
        ("dp-sat", "Halving++Sign", "", r"has an empty name; write names with one \+ between them"),
        ("dp-sat", "", "", r"base_optimizer='' has an empty name"),
        ("dp-sat", "dp-sat", "", "names 'dp-sat' twice; name it once"),
        ("dp-sat", "Halving+Sign+Halving", "", "names '.*Halving' twice"),
        ("dp-sat", "Halving", "shar = 0.1", "over .*Halving over dp-sgd takes no 'shar'; did you mean share"),
        ("dp-sgd", "dp-sgd", "zzz = 1", "dp-sgd takes no 'zzz'; it takes none"),
        ("dp-sat", "Halving", "lr = 0.1", "optimizer_args='lr = 0.1': 'lr' is a setting of its own; set it as that"),
        ("dp-sat", "Halving", "base = 1", "'base' is a setting of its own"),
        ("dp-sat", "Halving", "share 0.1", "optimizer_args='share 0.1' are no arguments .*write a = 1, b = 'text'"),
    ],
)
def test_a_chain_that_makes_no_sense_says_what_to_do(optimizer, base, arguments, says, mine):
    optimizer, base = (
        text.replace("Halving", mine("Halving")).replace("Sign", mine("Sign"))
        if ":" not in text and not text.startswith("dp-sat+")
        else text
        for text in (optimizer, base)
    )
    with pytest.raises(PluginError, match=says):
        built(optimizer, base, arguments, momentum=0.5)


def test_two_that_keep_one_name_keep_it_apart():
    """dp-sat climbs g, 10 of (3, 4) / 5 = (6, 8); below it dp-sat-momentum climbs w_prev - w = g / 4, to (6, 8) too."""
    optimizer = built("dp-sat", "dp-sat-momentum", lr=0.25, rho=10.0)
    params, gradient = {"a": torch.tensor([1.0, 2.0])}, {"a": torch.tensor([3.0, 4.0])}
    moved, state = optimizer.update(params, gradient, optimizer.init(params), step_info())
    assert moved["a"].tolist() == [0.25, 1.0]
    assert state[ASCENT]["a"].tolist() == [3, 4]
    assert state[BASE][ASCENT]["a"].tolist() == [0.75, 1]
    assert optimizer.query_point(moved, state, step_info())["a"].tolist() == [0.25 + 12, 1 + 16]


def test_building_draws_nothing(mine):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    built("dp-sat", mine("Halving"))
    assert torch.equal(torch.rand(1), expected)


def test_a_chain_in_words():
    assert described("dp-sat", "dp-sgd") == "dp-sat"
    assert described("dp-sat", "disk+ adam") == "dp-sat over disk over adam"


def test_a_run_uses_the_chain_at_the_same_event(mine):
    config = RunConfig(noise_multiplier=1.0, num_clients=4, local_steps=2)
    assignment = Assignment(round=1, event=PrivacyEvent(noise_multiplier=1.0, sample_rate=0.5, steps=2))
    results = []
    for share in (1.0, 0.5):
        chain = {"base_optimizer": mine("Halving"), "optimizer_args": f"share = {share}"}
        experiment = Experiment.build(dataclasses.replace(config, **chain))
        start = trainable(experiment.loss_fn.module)
        results.append(experiment.client_round(0, assignment, start, None))
        assert results[-1].event == PrivacyEvent(noise_multiplier=1.0, sample_rate=0.5, steps=2)
    plain = Experiment.build(config).client_round(0, assignment, start, None)
    assert all(torch.equal(results[0].params[name], p) for name, p in plain.params.items())
    assert any(not torch.equal(results[1].params[name], p) for name, p in plain.params.items())
