"""DP-SAM asks twice and steps once; SAM is that without noise, and says so."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from fed_dpsat.accounting import epsilon
from fed_dpsat.accounting.event import PrivacyEvent
from fed_dpsat.accounting.plans import make_plans
from fed_dpsat.client.assignment import Assignment
from fed_dpsat.client.build import Experiment
from fed_dpsat.client.train import Request
from fed_dpsat.errors import SettingError
from fed_dpsat.params import global_norm, subtract, trainable
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.simulation import simulate
from fed_dpsat.step.optimizers.dpsam import CLIMB, DPSAM, SAM
from fed_dpsat.step.optimizers.dpsgd import DPSGD
from fed_dpsat.testing.problems import step_info

PARAMS = {"a": torch.tensor([1.0]), "b": torch.tensor([2.0])}
GRADIENT = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
SECOND = {"a": torch.tensor([-1.0]), "b": torch.tensor([1.0])}
CONFIG = RunConfig(optimizer="dp-sam", noise_multiplier=1.0, num_clients=4, num_rounds=4)
ASSIGNMENT = Assignment(round=1, event=PrivacyEvent(noise_multiplier=1.0, sample_rate=0.5, steps=1))


def values(params):
    return [p.item() for p in params.values()]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_by_hand():
    """g = (3, 4) of norm 5: stay, ask at w + 10 g / 5 = w + (6, 8), then step along what came from there."""
    optimizer = DPSAM(base=DPSGD(lr=0.25), rho=10)
    state = optimizer.init(PARAMS)
    for _ in range(2):
        assert values(optimizer.query_point(PARAMS, state, step_info())) == [1, 2]
        params, state = optimizer.update(PARAMS, GRADIENT, state, step_info())
        assert values(params) == [1, 2]
        assert values(optimizer.query_point(params, state, step_info())) == [7, 10]
        params, state = optimizer.update(params, SECOND, state, step_info())
        assert values(params) == [1.25, 1.75]


def test_against_an_oracle(walk, vectors):
    """Park et al. 2023, Section 4: w <- w - lr * g(w + rho * g(w) / |g(w)|), in numpy."""
    seen = walk(DPSAM(base=DPSGD(lr=0.1), rho=0.3), vectors)
    w = vectors[0]
    for t in range(0, 50, 2):
        np.testing.assert_allclose(seen[t][0], w, rtol=1e-12)
        np.testing.assert_array_equal(seen[t][1], seen[t][0])
        first, second = vectors[1 + t], vectors[2 + t]
        np.testing.assert_allclose(seen[t + 1][0], w + 0.3 * first / math.sqrt(first @ first), rtol=1e-12)
        w = w - 0.1 * second
        np.testing.assert_allclose(seen[t + 1][1], w, rtol=1e-12)


@pytest.mark.parametrize("make", [DPSAM, lambda **of: SAM(**of, private=False)])
def test_without_a_radius_it_is_sgd_at_half_the_pace(make, walk, vectors):
    base = DPSGD(lr=0.1, momentum=0.9, weight_decay=0.1)
    ours = walk(make(base=base, rho=0), vectors)
    theirs = walk(base, vectors[[0, *range(2, 51, 2)]])
    for t in range(25):
        np.testing.assert_array_equal(ours[2 * t + 1][0], ours[2 * t][0])
        np.testing.assert_array_equal(ours[2 * t + 1][1], theirs[t][1])


def test_a_zero_gradient_is_no_direction():
    optimizer = DPSAM(base=DPSGD(lr=1), rho=10)
    zero = {name: torch.zeros(1) for name in PARAMS}
    params, state = optimizer.update(PARAMS, zero, optimizer.init(PARAMS), step_info())
    assert values(optimizer.query_point(params, state, step_info())) == [1, 2]


def test_a_schedule_counts_calls():
    """A schedule over the calls of a run ends with its last call."""
    optimizer = DPSAM(base=DPSGD(lr=1.0, lr_schedule="linear", total_steps=4), rho=0.1)
    params, state = PARAMS, optimizer.init(PARAMS)
    moved = []
    for call in range(4):
        before = params
        params, state = optimizer.update(params, {n: torch.ones(1) for n in PARAMS}, state, step_info(call))
        moved.append((before["a"] - params["a"]).item())
    assert moved == [0, 0.75, 0, 0.25]


@pytest.mark.parametrize("rho", [-0.1, math.nan, math.inf])
def test_a_radius_outside_its_bounds_is_refused(rho):
    with pytest.raises(SettingError, match=r"^rho=.* is not in \[0, inf\); "):
        DPSAM(base=DPSGD(lr=1), rho=rho)


def test_each_call_is_an_event():
    """A descent costs what two steps of DP-SGD cost: local_steps counts calls."""
    config = dataclasses.replace(CONFIG, local_steps=2)
    experiment = Experiment.build(config)
    assignment = dataclasses.replace(ASSIGNMENT, event=dataclasses.replace(ASSIGNMENT.event, steps=2))
    result = experiment.client_round(0, assignment, trainable(experiment.loss_fn.module), None)
    assert result.event == assignment.event == make_plans(config)[0].event
    sgd = dataclasses.replace(ASSIGNMENT, event=dataclasses.replace(ASSIGNMENT.event, steps=1))
    assert epsilon([result.event], 1e-5) == pytest.approx(epsilon([sgd.event, sgd.event], 1e-5))


def test_a_step_that_a_round_cut_in_two_goes_on_in_the_next():
    """One call a round: the first leaves the model, the second climbs the first one's gradient from the new w."""
    experiment = Experiment.build(CONFIG)
    params = trainable(experiment.loss_fn.module)
    first = experiment.client_round(0, ASSIGNMENT, params, None)
    assert same(first.params, params)
    assert CLIMB in first.state["optimizer"]
    elsewhere = {name: p + 1 for name, p in params.items()}
    second = experiment.client_round(0, dataclasses.replace(ASSIGNMENT, round=2), elsewhere, first.state)
    assert not same(second.params, elsewhere)
    assert CLIMB not in second.state["optimizer"]
    assert (
        CLIMB
        in experiment.client_round(0, dataclasses.replace(ASSIGNMENT, round=2), elsewhere, None).state["optimizer"]
    )


@pytest.mark.parametrize(("local_steps", "carried"), [(1, {CLIMB}), (2, set()), (3, {CLIMB}), (4, set())])
def test_what_is_carried_into_the_next_round(local_steps, carried):
    config = dataclasses.replace(CONFIG, local_steps=local_steps, ascent_memory="zero")
    assert Experiment.build(config).carried_state() == carried


def test_clients_at_different_halves_train_together(monkeypatch):
    """Two clients stand before their second call, two before their first: two stacks, the results of each alone."""
    experiment = Experiment.build(dataclasses.replace(CONFIG, stack_clients=4))
    params, second = trainable(experiment.loss_fn.module), dataclasses.replace(ASSIGNMENT, round=2)
    states = [experiment.client_round(client, ASSIGNMENT, params, None).state for client in (0, 1)] + [None, None]
    requests = [Request(client=c, assignment=second, params=params, state=state) for c, state in enumerate(states)]
    for request, result in zip(requests, experiment.client_rounds(requests), strict=True):
        alone = experiment.client_round(**vars(request))
        assert result.state["optimizer"].keys() == alone.state["optimizer"].keys()
        for name, p in alone.params.items():
            torch.testing.assert_close(result.params[name], p, rtol=1e-5, atol=1e-6)


def test_sam_refuses_a_private_run():
    with pytest.raises(SettingError, match=r"private=True is not false with optimizer 'sam'.*dp-sat .*dp-sam"):
        Experiment.build(dataclasses.replace(CONFIG, optimizer="sam"))
    with pytest.raises(SettingError, match="private=True is not false"):
        Experiment.build(dataclasses.replace(CONFIG, optimizer="dp-sat", base_optimizer="sam"))


def test_where_the_clients_change_is_bounded_sam_is_its_local_training():
    """DP-FedSAM: local gradients have no noise, so there is no event of a step that SAM would spend twice."""
    unit = dataclasses.replace(CONFIG, optimizer="sam", privacy_unit="client")
    experiment = Experiment.build(unit)
    assignment = Assignment.of(make_plans(dataclasses.replace(unit, local_steps=2))[0], round=1)
    start = trainable(experiment.loss_fn.module)
    result = experiment.client_round(0, assignment, start, None)
    assert float(global_norm(subtract(result.params, start))) <= unit.clip_norm * (1 + 1e-6)
    assert result.event == assignment.event


@pytest.mark.parametrize("optimizer", ["sam", "dp-sgd"])
def test_fedsam_and_fedavg_report_that_they_are_not_private(optimizer, tmp_path):
    """Full batches without clipping: FedSAM (Qu et al. 2022) is SAM with fedavg; so is FedAvg dp-sgd."""
    config = RunConfig(
        optimizer=optimizer, private=False, clip_norm=math.inf, sample_rate=1.0, num_clients=3, num_rounds=3,
        local_steps=2, rho=0.05, lr=0.5,
    )  # fmt: skip
    summary = simulate(config, tmp_path / "run")
    assert math.isinf(summary["epsilon"])
    assert summary["test_accuracy"] > 0.7


def test_sam_descends_along_the_gradient_at_the_top(tmp_path):
    """One client, full batch, no clipping: the round is that of Foret et al., by autograd."""
    config = RunConfig(
        optimizer="sam", private=False, clip_norm=math.inf, sample_rate=1.0, num_clients=1, local_steps=2,
        rho=0.5, lr=0.1,
    )  # fmt: skip
    experiment = Experiment.build(config)
    start = trainable(experiment.loss_fn.module)
    assignment = Assignment(round=1, event=PrivacyEvent(noise_multiplier=0.0, sample_rate=1.0, steps=2))
    ours = experiment.client_round(0, assignment, start, None).params
    inputs, targets = experiment.dataset.train.batch(torch.from_numpy(experiment.partitions[0]))

    def gradient(params):
        leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
        loss = experiment.loss_fn(leaves, inputs, targets).mean()
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    up = gradient(start)
    norm = torch.sqrt(sum(g.square().sum() for g in up.values()))
    top = gradient({n: p + 0.5 * up[n] / norm for n, p in start.items()})
    for name, p in start.items():
        torch.testing.assert_close(ours[name], p - 0.1 * top[name], rtol=1e-4, atol=1e-6)
