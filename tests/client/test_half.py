"""The client's half of a strategy: what it is given, what it costs, and that it changes no clipping and no noise."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from flwr.serverapp.strategy import FedAvg

from fed_dpsat.accounting.plans import make_plans
from fed_dpsat.client.assignment import Assignment
from fed_dpsat.client.build import Experiment
from fed_dpsat.client.half import HALF, ClientHalf, Finished, check_models, half_of, received_by, sent_by, with_half
from fed_dpsat.client.half_round import OfHalf
from fed_dpsat.client.train import OPTIMIZER, Request
from fed_dpsat.errors import SettingError
from fed_dpsat.params import subtract, zeros_like
from fed_dpsat.plugins import PluginError
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.step.mechanism import GaussianMechanism, normals_like
from fed_dpsat.step.noise import derive_generator
from fed_dpsat.step.optimizers.proximal import pulled
from fed_dpsat.step.query import Query
from fed_dpsat.step.unchecked import unchecked

CONFIG = RunConfig(
    noise_multiplier=1.0,
    delta=1e-4,
    model="mlp",
    optimizer="dp-sgd",
    num_clients=40,
    num_rounds=3,
    local_steps=2,
    sample_rate=1.0,
    lr=0.5,
    clip_norm=0.1,
)


def experiment(strategy, **changes):
    return Experiment.build(with_half(dataclasses.replace(CONFIG, strategy=strategy, **changes)))


def assigned(built, round=1):
    return Assignment.of(make_plans(built.config)[0], round=round)


def trained(built, params, state=None, *, round=1, client=0, records=None):
    return built.client_round(client, assigned(built, round), params, state, records=records)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], p) for name, p in b.items())


def close(a, b):
    return a.keys() == b.keys() and all(torch.allclose(a[name], p, atol=2e-6) for name, p in b.items())


@pytest.fixture(scope="module")
def plain():
    return Experiment.build(CONFIG)


@pytest.fixture(scope="module")
def ditto():
    return experiment("ditto", strategy_args="mu = 0.5")


@pytest.fixture(scope="module")
def scaffold():
    return experiment("dp-scaffold")


# What it costs.


def test_ditto_pays_for_two_models_and_is_calibrated_to_both():
    """Twice the steps in plan, charge and calibration: its noise is that of FedAvg with twice the steps."""
    budget = {"noise_multiplier": 0.0, "target_epsilon": 3.0, "sample_rate": 0.5}
    found = make_plans(with_half(dataclasses.replace(CONFIG, strategy="ditto", **budget)))[0].event
    twice = make_plans(dataclasses.replace(CONFIG, **{**budget, "local_steps": 4}))[0].event
    once = make_plans(dataclasses.replace(CONFIG, **budget))[0].event
    assert found == twice
    assert found.steps == 4
    assert found.noise_multiplier > 1.2 * once.noise_multiplier


@pytest.mark.parametrize("strategy", ["mr-mtl", "dp-scaffold"])
def test_one_model_costs_what_it_costs_without(strategy):
    built = experiment(strategy)
    assert built.config.local_models == 1
    assert make_plans(built.config) == make_plans(CONFIG)


def test_the_event_that_runs_is_the_charged_one_and_each_step_of_it_is_one_private_sum(ditto, monkeypatch):
    sums, privatize = [], GaussianMechanism.privatize

    def counted(self, total, generator):
        sums.append(total)
        return privatize(self, total, generator)

    monkeypatch.setattr(GaussianMechanism, "privatize", counted)
    result = trained(ditto, ditto.shared())
    assert result.event == assigned(ditto).event
    assert result.event.steps == len(sums) == 4


def test_steps_that_no_models_share_are_refused(ditto):
    event = dataclasses.replace(assigned(ditto).event, steps=3)
    with pytest.raises(SettingError, match="steps=3 is not a multiple of 2"):
        ditto.client_round(0, Assignment(round=1, event=event), ditto.shared(), None)


# That it is post-processing.


def clipped_and_noised(built, params, client, step_noise):
    """The private gradient at ``params`` by autograd in float64, one example at a time, with this noise."""
    module = built.loss_fn.module
    start = {n: p.double() for n, p in params.items()}
    total = {n: torch.zeros_like(p) for n, p in start.items()}
    indices = torch.from_numpy(built.partitions[client])
    inputs, labels = built.dataset.train.batch(indices)
    for x, y in zip(inputs.double(), labels, strict=True):
        leaves = {n: p.clone().requires_grad_() for n, p in start.items()}
        loss = torch.nn.functional.cross_entropy(torch.func.functional_call(module, leaves, (x[None],)), y[None])
        grads = torch.autograd.grad(loss, list(leaves.values()))
        norm = torch.sqrt(sum((g**2).sum() for g in grads))
        for n, g in zip(leaves, grads, strict=True):
            total[n] += g * min(1.0, CONFIG.clip_norm / float(norm))
    return {n: (t + CONFIG.clip_norm * step_noise[n].double()) / len(indices) for n, t in total.items()}


def check_ditto_by_hand(ditto):
    """Both models, step by step: the term of mu is added to the noised gradient, and changes no factor of clipping."""
    generator = derive_generator(CONFIG.seed, purpose="noise", client=1, round=1)
    noises = [normals_like(ditto.shared(), generator) for _ in range(4)]
    shared = {n: p.double() for n, p in ditto.shared().items()}
    own, anchor = dict(shared), dict(shared)
    own = {n: p + 1.0 for n, p in own.items()}
    state = {"own": {n: p.float() for n, p in own.items()}}
    base = {"0": {}, "1": {}}
    result = trained(ditto, ditto.shared(), {OPTIMIZER: base, HALF: state}, client=1)
    for step in range(4):
        model = shared if step < 2 else own
        gradient = clipped_and_noised(ditto, model, 1, noises[step])
        if step >= 2:
            gradient = {n: g + 0.5 * (model[n] - anchor[n]) for n, g in gradient.items()}
        model.update({n: p - CONFIG.lr * gradient[n] for n, p in model.items()})
    assert close(result.params, {n: p.float() for n, p in shared.items()})
    assert close(result.state[HALF]["own"], {n: p.float() for n, p in own.items()})


def test_ditto_is_two_private_trainings_and_a_term_after_the_noise(ditto):
    check_ditto_by_hand(ditto)


def test_a_term_within_the_clipped_loss_is_found(ditto, monkeypatch):
    """The wrong place for the term of mu: in the loss of an example it would change what clipping bounds."""
    anchor = ditto.shared()

    def of_loss(loss):
        def proximal(params, inputs, targets):
            distance = sum(((p - anchor[n]) ** 2).sum() for n, p in params.items())
            return loss(params, inputs, targets) + 0.25 * distance

        return proximal

    def in_the_loss(self, params, state, info):
        own = info.index - self.first_step >= self.steps
        return Query(points=((1.0, params),), loss=of_loss) if own else params

    monkeypatch.setattr("strategies.ditto.pulled", lambda gradient, params, anchor, mu: gradient)
    monkeypatch.setattr(OfHalf, "query_point", in_the_loss)
    with pytest.raises(AssertionError), unchecked():
        check_ditto_by_hand(ditto)


def test_a_second_training_without_noise_is_found(ditto, monkeypatch):
    """The own model is never sent, but the strategy says that it may be: noise is on both."""
    privatize, calls = GaussianMechanism.privatize, []

    def first_model_alone(self, total, generator):
        calls.append(1)
        private = privatize(self, total, generator)
        if len(calls) <= 2:
            return private
        return {n: t / self.expected_batch_size for n, t in total.items()}

    monkeypatch.setattr(GaussianMechanism, "privatize", first_model_alone)
    with pytest.raises(AssertionError):
        check_ditto_by_hand(ditto)


def test_no_hook_is_given_anything_that_holds_an_example(plain, monkeypatch):
    """By construction: a hook sees tensors of the shapes of parameters, and numbers; walk all that it is given."""
    seen = []

    def walk(value):
        if isinstance(value, dict):
            for part in value.values():
                walk(part)
        elif isinstance(value, list | tuple):
            for part in value:
                walk(part)
        elif dataclasses.is_dataclass(value):
            walk(vars(value))
        else:
            seen.append(value)

    class Curious(ClientHalf):
        models = 2

        def start(self, received, state):
            walk([received, state])
            return super().start(received, state)

        def correct(self, *arguments):
            walk(list(arguments))
            return super().correct(*arguments)

        def finish(self, *arguments):
            walk(list(arguments))
            return Finished(params=arguments[1][0].params, state={"mean": arguments[1][1].mean_gradient})

    built = Experiment.build(dataclasses.replace(CONFIG, local_models=2), half=Curious())
    params, state = built.shared(), None
    for round in (1, 2):
        result = trained(built, params, state, round=round)
        params, state = result.params, result.state
    shapes = {tuple(p.shape) for p in params.values()}
    assert {type(value) for value in seen} == {torch.Tensor, int}
    assert {tuple(value.shape) for value in seen if isinstance(value, torch.Tensor)} == shapes
    assert {value for value in seen if isinstance(value, int)} == {0, 1}


class Spy(torch.Tensor):
    """Keeps the shapes of what it is computed with."""

    seen: list = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        Spy.seen += [tuple(t.shape) for t in args if type(t) is torch.Tensor]
        return super().__torch_function__(func, types, args, kwargs or {})


def as_spies(params):
    return {name: p.as_subclass(Spy) for name, p in params.items()}


class StartsAtSpies(ClientHalf):
    def start(self, received, state):
        return [as_spies(received.params)]


class CorrectsBySpies(ClientHalf):
    def correct(self, model, private_gradient, params, received, state):
        return as_spies(private_gradient)


@pytest.mark.parametrize("half", [StartsAtSpies, CorrectsBySpies])
def test_no_class_of_a_halfs_own_meets_a_batch(half):
    """torch would call it with the batch: the loop refuses such a point before the loss has it."""
    Spy.seen.clear()
    built = Experiment.build(dataclasses.replace(CONFIG, local_models=1), half=half())
    with pytest.raises(SettingError, match="plain tensors"):
        trained(built, built.shared(), None, round=1)
    own = {tuple(p.shape) for p in built.shared().values()} | {()}
    assert set(Spy.seen) <= own


def test_what_a_half_declares_is_asked_of_a_copy():
    class Counts(ClientHalf):
        calls = 0

        def sends(self, params):
            self.calls += 1
            return {"count": {"n": torch.zeros(self.calls)}}

    half = Counts()
    assert [sent_by(half, {})["count"]["n"].shape for _ in range(2)] == [(1,), (1,)]


# What each example does.


def test_the_shared_model_of_ditto_is_that_of_fedavg_with_the_same_noise(ditto, plain):
    result, alone = trained(ditto, ditto.shared()), trained(plain, plain.shared())
    assert equal(result.params, alone.params)
    own = result.state[HALF]["own"]
    assert not equal(own, result.params)
    assert equal(ditto.own_model(result.params, result.state), own)
    assert equal(ditto.own_model(result.params, None), result.params)


def test_mr_mtl_continues_from_its_own_model_and_is_pulled_to_the_mean():
    built = experiment("mr-mtl", strategy_args="mu = 0.3", local_steps=1)
    plain = experiment("fedavg", local_steps=1)
    first = trained(built, built.shared())
    mean = {n: p + 0.1 for n, p in built.shared().items()}
    second = trained(built, mean, first.state, round=2)
    free = trained(plain, first.params, None, round=2)
    slope = subtract(first.params, free.params)
    expected = pulled(slope, first.params, mean, 0.3 * CONFIG.lr)
    assert close(second.params, {n: first.params[n] - e for n, e in expected.items()})
    assert equal(second.state[HALF]["own"], second.params)
    assert equal(built.own_model(mean, second.state), second.params)


def test_scaffold_keeps_the_mean_private_gradient_and_corrects_the_next_round_by_it(plain, scaffold):
    zero = {"control": zeros_like(scaffold.shared())}
    first = trained(scaffold, scaffold.shared(), records=zero)
    alone = trained(plain, plain.shared())
    assert equal(first.params, alone.params)
    drift = subtract(plain.shared(), alone.params)
    control = {n: d / (2 * CONFIG.lr) for n, d in drift.items()}
    assert close(first.records["control"], control)
    assert equal(first.state[HALF]["control"], first.records["control"])
    common = {n: torch.full_like(c, 0.01) for n, c in control.items()}
    second = trained(scaffold, first.params, first.state, round=2, records={"control": common})
    uncorrected, one = (experiment(strategy, local_steps=1) for strategy in ("fedavg", "dp-scaffold"))
    kept = {OPTIMIZER: {"0": {}}, HALF: first.state[HALF]}
    moved = trained(one, first.params, kept, round=2, records={"control": common})
    free = trained(uncorrected, first.params, None, round=2)
    expected = {n: p - CONFIG.lr * (common[n] - first.state[HALF]["control"][n]) for n, p in free.params.items()}
    assert close(moved.params, expected)
    change = subtract(second.state[HALF]["control"], first.state[HALF]["control"])
    assert equal(second.records["control"], change)


def test_the_half_sees_momentum_and_schedules_of_one_model():
    """Two models: each has a momentum of its own, and steps of the schedule of a federation of one model."""
    changes = {"momentum": 0.5, "lr_schedule": "linear"}
    built, plain = experiment("ditto", strategy_args="mu = 0.0", **changes), experiment("fedavg", **changes)
    assert built.config.total_steps == plain.config.total_steps
    params = built.shared()
    result, alone = trained(built, params), trained(plain, params)
    assert equal(result.params, alone.params)
    assert result.state[OPTIMIZER].keys() == {"0", "1"}
    assert equal(result.state[OPTIMIZER]["0"]["momentum"], alone.state[OPTIMIZER]["momentum"])
    assert not equal(result.state[OPTIMIZER]["1"]["momentum"], alone.state[OPTIMIZER]["momentum"])


@pytest.mark.parametrize("strategy", ["ditto", "mr-mtl", "dp-scaffold"])
def test_stacked_clients_train_as_alone(strategy):
    built, requests = experiment(strategy), []
    shared = built.shared()
    records = {"control": zeros_like(shared)} if strategy == "dp-scaffold" else {}
    for client in range(3):
        state = trained(built, shared, client=client, records=records).state
        requests.append(
            Request(client=client, assignment=assigned(built, 2), params=shared, state=state, records=records)
        )
    for request, stacked in zip(requests, built.client_rounds(requests), strict=True):
        alone = built.client_round(**vars(request))
        assert close(stacked.params, alone.params)
        assert stacked.state[HALF].keys() == alone.state[HALF].keys()
        for key, tensors in alone.state[HALF].items():
            assert close(stacked.state[HALF][key], tensors)
        for key, tensors in alone.records.items():
            assert close(stacked.records[key], tensors)


# What is refused.


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("privacy_unit", {"privacy_unit": "client"}),
        ("buffer_size", {"buffer_size": 2, "delay": "lognormal"}),
        ("attack", {"attack": "sign-flip", "attackers": 0.3}),
        ("personal_layers", {"personal_layers": "head"}),
        ("unfreeze_round", {"train_layers": "head-then-all", "unfreeze_round": 2}),
    ],
)
def test_settings_that_no_half_goes_with(name, changes):
    with pytest.raises(SettingError, match=f"{name}=.*is not possible with the client's half of strategy='ditto'"):
        with_half(dataclasses.replace(CONFIG, strategy="ditto", **changes))


def test_local_models_are_those_that_the_strategy_says():
    with pytest.raises(SettingError, match="local_models=1 is not 2, the models that strategy='ditto'"):
        Experiment.build(dataclasses.replace(CONFIG, strategy="ditto", local_models=1))
    with pytest.raises(SettingError, match="local_models=2 is not 0"):
        Experiment.build(dataclasses.replace(CONFIG, local_models=2))
    with pytest.raises(SettingError, match="local_models=0 is not 2"):
        check_models(CONFIG, half_of(half_with(2)))


def half_with(models):
    strategy, half = FedAvg(), ClientHalf()
    half.models = models
    strategy.client_half = half
    return strategy


def test_another_object_is_no_half():
    strategy = FedAvg()
    strategy.client_half = "mine"
    with pytest.raises(PluginError, match="client_half of FedAvg is 'mine'; make it a"):
        half_of(strategy)
    with pytest.raises(PluginError, match="models of at least 1"):
        half_of(half_with(0))
    assert half_of(FedAvg()) is None


def test_a_base_whose_gradient_is_of_other_numbers_is_refused():
    built = experiment("mr-mtl", optimizer="zeroth-order")
    with pytest.raises(SettingError, match="around a base whose private gradient"):
        trained(built, built.shared())


def test_a_client_with_a_half_carries_state(ditto):
    assert HALF in ditto.carried_state()
    assert ditto.has_own_models
    assert not experiment("dp-scaffold").has_own_models


@pytest.mark.parametrize("what", ["sends", "receives"])
def test_a_record_is_named_with_a_string(what):
    class Numbered(ClientHalf):
        pass

    setattr(Numbered, what, lambda self, params: {1: params})
    with pytest.raises(PluginError, match=f"{what} a record 1; name it with a string"):
        {"sends": sent_by, "receives": received_by}[what](Numbered(), {"w": torch.zeros(2)})
