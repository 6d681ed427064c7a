"""check_optimizer passes every shipped optimizer and catches each broken one, and each broken training loop."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from fed_dpsat import plugins
from fed_dpsat.params import zeros_like
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.step.gradients.per_example import clipped_gradient_sum
from fed_dpsat.step.loop import LocalResult, train_locally
from fed_dpsat.step.optimizers import DPSAT, DPSGD
from fed_dpsat.step.optimizers.base import ASCENT, climb
from fed_dpsat.step.optimizers.chain import build_optimizer
from fed_dpsat.step.query import Query
from fed_dpsat.testing import check_optimizer
from fed_dpsat.testing.problems import step_info


def shipped(name, lr=0.1):
    settings = {
        **RunConfig(target_epsilon=3.0).settings(),
        "lr": lr,
        "momentum": 0.9,
        "weight_decay": 0.01,
        "total_steps": 50,
        "steps_per_round": 4,
        "private": name != "sam",
    }
    return build_optimizer(name, "dp-sgd", settings)


def step(params, slope, lr=0.1):
    return {name: torch.add(p, slope[name], alpha=-lr) for name, p in params.items()}


class WantsTheBatch(DPSGD):
    """Momentum of the raw gradient needs the data, so it does not fit the signature."""

    def update(self, params, private_gradient, state, info, batch):
        return super().update(params, private_gradient, state, info)


class TakesTheBatchIfGiven(DPSGD):
    def update(self, params, private_gradient, state, info, batch=None):
        return super().update(params, private_gradient, state, info)


class TakesAnything(DPSGD):
    def query_point(self, *args, **anything):
        return args[0]


class PerturbsInPlace(DPSAT):
    """Moves the weights and puts them back, as the official code does."""

    def query_point(self, params, state, info):
        there = super().query_point(params, state, info)
        for name, p in params.items():
            p.copy_(there[name])
        return params


class WritesIntoTheGradient(DPSGD):
    def update(self, params, private_gradient, state, info):
        for name, g in private_gradient.items():
            g.add_(params[name], alpha=0.1)
        return super().update(params, private_gradient, state, info)


class WritesIntoTheState(DPSGD):
    def update(self, params, private_gradient, state, info):
        slope = state.setdefault("momentum", zeros_like(params))
        for name, g in private_gradient.items():
            slope[name].mul_(0.9).add_(g)
        return step(params, slope), state


class OverwritesItsMomentum(DPSGD):
    """Leaves its momentum in the memory that it then writes the parameters into."""

    def update(self, params, private_gradient, state, info):
        return step(params, private_gradient), {**state, "momentum": private_gradient}

    def update_owned(self, params, private_gradient, state, info):
        out = {name: torch.add(p, private_gradient[name], alpha=-0.1) for name, p in params.items()}
        return {name: private_gradient[name].copy_(p) for name, p in out.items()}, {
            **state,
            "momentum": private_gradient,
        }


class OwnsTheWeightsToo(DPSGD):
    def update(self, params, private_gradient, state, info):
        return step(params, private_gradient), state

    def update_owned(self, params, private_gradient, state, info):
        return {name: p.sub_(private_gradient[name], alpha=0.1) for name, p in params.items()}, state


class HidesMomentum:
    """Keeps it in the object, which lives for one round: reset every round, or shared by clients."""

    def __init__(self):
        self.slope = None

    def init(self, params):
        return {}

    def query_point(self, params, state, info):
        return params

    def update(self, params, private_gradient, state, info):
        old = self.slope or zeros_like(private_gradient)
        self.slope = {name: torch.add(g, old[name], alpha=0.9) for name, g in private_gradient.items()}
        return step(params, self.slope), state


class TellsByIdentity(DPSGD):
    """Knows that it goes on by the object that it left, which storage does not give back."""

    def update(self, params, private_gradient, state, info):
        moved = step(params, private_gradient, 1.0 if state.get("left") is params else 0.1)
        return moved, {**state, "left": moved}


class KeepsANumber(DPSGD):
    def update(self, params, private_gradient, state, info):
        moved, state = super().update(params, private_gradient, state, info)
        return moved, {**state, "norms": {"last": 1.0}}


class KeepsAList(DPSGD):
    def init(self, params):
        return {**super().init(params), "history": []}


class NamesByNumber(DPSGD):
    def init(self, params):
        return {**super().init(params), 1: zeros_like(params)}


class NamesNothing(DPSGD):
    def init(self, params):
        return {**super().init(params), "": zeros_like(params)}


class CarriesAWord(DPSGD):
    carries = "momentum"


class CarriesATypo(DPSGD):
    carries = ("momentun",)

    def init(self, params):
        return {"momentum": zeros_like(params)}


class SharesItsSlots(DPSAT):
    """Keeps its direction among what its base keeps."""

    def init(self, params):
        return self.base.init(params)

    def query_point(self, params, state, info):
        return climb(params, state.get(ASCENT), self.rho)

    def update(self, params, private_gradient, state, info):
        moved, after = self.base.update(params, private_gradient, state, info)
        return moved, {**after, ASCENT: private_gradient}


class Casts(DPSGD):
    def query_point(self, params, state, info):
        return {name: p.float() for name, p in params.items()}


class Flattens(DPSGD):
    def update(self, params, private_gradient, state, info):
        moved, state = super().update(params, private_gradient, state, info)
        return {name: p.reshape(-1) if p.ndim == 0 else p for name, p in moved.items()}, state


class HooksTheRawGradient(DPSGD):
    """Would see the raw gradient through a leaf."""

    def query_point(self, params, state, info):
        return {name: p.detach().requires_grad_() for name, p in params.items()}


class DividesByTheNorm(DPSAT):
    def query_point(self, params, state, info):
        if ASCENT not in state:
            return params
        norm = torch.sqrt(sum(g.double().square().sum() for g in state[ASCENT].values()))
        return {name: p + (0.03 * state[ASCENT][name] / norm).to(p) for name, p in params.items()}


class NeedsItsDirection(DPSAT):
    """Climbs in a round's first step what it does not carry into the round."""

    carries = ()

    def query_point(self, params, state, info):
        return climb(params, state[ASCENT] if info.index > 0 else None, self.rho)


class StepsFromTheQueryPoint(DPSAT):
    """Comes back by the way it went, which rounds."""

    def update(self, params, private_gradient, state, info):
        up = climb(zeros_like(params), state.get(ASCENT), self.rho)
        moved, after = super().update({name: p + up[name] for name, p in params.items()}, private_gradient, state, info)
        return {name: m - up[name] for name, m in moved.items()}, after


class CastsOnePoint(DPSGD):
    def query_point(self, params, state, info):
        return Query(points=((0.5, {name: p.float() for name, p in params.items()}), (0.5, params)))


class MasksByAGeneratorOfItsOwn(DPSGD):
    """Nobody else could know the mask, and a run that resumes has another."""

    def query_point(self, params, state, info):
        return Query(points=((1.0, params),), active={"bias": torch.rand(3, generator=OWN) < 0.5})


OWN = torch.Generator().manual_seed(0)


class MasksAPointInPlace(DPSGD):
    def query_point(self, params, state, info):
        params["bias"][2] = 0
        return Query(points=((1.0, params),), active={"bias": torch.tensor([True, True, False])})


class KeepsWhatItsLossSaw(DPSGD):
    """A wrapped loss sees examples; what it keeps is no post-processing of private gradients."""

    def query_point(self, params, state, info):
        def wrap(loss):
            def seeing(p, inputs, targets):
                SEEN["mean"] = torch._C._functorch.get_unwrapped(inputs).mean()
                return loss(p, inputs, targets)

            return seeing

        return Query(points=((1.0, params),), loss=wrap)

    def update(self, params, private_gradient, state, info):
        moved, state = super().update(params, private_gradient, state, info)
        return {name: p + SEEN.get("mean", 0) for name, p in moved.items()}, state


SEEN = {}


def made(kind):
    return lambda: kind(base=DPSGD(lr=0.1), rho=0.03) if issubclass(kind, DPSAT) else kind(lr=0.1)


OWNED = "a_gradient_given_away_makes_the_same_step"
BROKEN = {
    "un-noised momentum wants the batch": (made(WantsTheBatch), "signatures_take_no_data"),
    "takes the batch if given": (made(TakesTheBatchIfGiven), "signatures_take_no_data"),
    "takes anything": (made(TakesAnything), "signatures_take_no_data"),
    "perturbs in place (official DP-SAT)": (made(PerturbsInPlace), "inputs_are_not_changed"),
    "writes into the gradient": (made(WritesIntoTheGradient), "inputs_are_not_changed"),
    "writes into the state": (made(WritesIntoTheState), "inputs_are_not_changed"),
    "a momentum that is overwritten": (made(OverwritesItsMomentum), OWNED),
    "weights taken for its own": (made(OwnsTheWeightsToo), OWNED),
    "momentum in the object, reset each round": (HidesMomentum, "same_inputs_give_same_outputs"),
    "an object that is known again": (made(TellsByIdentity), "resumed_equals_uninterrupted"),
    "a number in the state": (made(KeepsANumber), "state_is_named_tensors"),
    "a list in the state": (made(KeepsAList), "state_is_named_tensors"),
    "a number as a name": (made(NamesByNumber), "state_is_named_tensors"),
    "an empty name": (made(NamesNothing), "state_is_named_tensors"),
    "a word of what is carried": (made(CarriesAWord), "state_is_named_tensors"),
    "a name that no state has": (made(CarriesATypo), "state_is_named_tensors"),
    "a name that no state of its base has": (
        lambda: DPSAT(base=CarriesATypo(lr=0.1), rho=0.03),
        "state_is_named_tensors",
    ),
    "slots among those of the base": (made(SharesItsSlots), "state_of_a_base_has_its_own_place"),
    "casts": (made(Casts), "points_are_like_params"),
    "flattens a scalar": (made(Flattens), "points_are_like_params"),
    "hooks the raw gradient": (made(HooksTheRawGradient), "points_are_like_params"),
    "casts a point of a query": (made(CastsOnePoint), "points_are_like_params"),
    "a mask that nobody else knows": (made(MasksByAGeneratorOfItsOwn), "same_inputs_give_same_outputs"),
    "masks the weights in place": (made(MasksAPointInPlace), "inputs_are_not_changed"),
    "keeps what its loss saw": (made(KeepsWhatItsLossSaw), "training_is_replayed_from_private_gradients_alone"),
    "0 / 0": (made(DividesByTheNorm), "zero_gradient_stays_finite"),
    "needs its direction": (made(NeedsItsDirection), "a_round_begins_with_what_is_carried"),
}


def loop(params, batches, *, optimizer, sampler, local_steps, streams, physical_batch_size=100, mistake="", **more):
    """A training loop in short, right unless told otherwise."""
    mechanism, state, loss = more["mechanism"], more["state"], more["loss_fn"]
    if mistake == "reset":
        state = optimizer.init(params)
    sampling, noise = streams.generator("sampling"), streams.generator("noise")
    torch.manual_seed(streams.torch_seed())
    for number, indices in enumerate(sampler.batches(local_steps, sampling)):
        info = step_info(more["first_step"] + number, mechanism.noise_std, streams.round)
        inputs, targets = batches(indices)
        total, at, before = zeros_like(params), optimizer.query_point(params, state, info), params
        pieces = list(zip(inputs.split(physical_batch_size), targets.split(physical_batch_size), strict=True))
        for part, piece in enumerate(pieces):
            if mistake == "restore on the last" and part:
                before, at = at, optimizer.query_point(at, state, info)
            chunk, _ = clipped_gradient_sum(loss, at, piece, more["clipping"])
            total = {name: t + chunk[name] for name, t in total.items()}
        params = before  # moved as often as there were pieces, put back once
        private = mechanism.privatize(total, noise)
        params, state = optimizer.update(params, total if mistake == "raw" else private, state, info)
    event = mechanism.event(sample_rate=sampler.sample_rate, steps=local_steps)
    return LocalResult(params=params, state=state, event=event, nonfinite_examples=0)


REPLAY = "training_is_replayed_from_private_gradients_alone"
LOOPS = {"reset": REPLAY, "raw": REPLAY, "restore on the last": "physical_batches_change_nothing"}


@pytest.mark.by_default("dp-sat", "random-freeze")
@pytest.mark.parametrize("name", plugins.builtin("optimizer"))
def test_every_shipped_optimizer_conforms(name):
    assert len(check_optimizer(lambda: shipped(name), zero_lr=lambda: shipped(name, lr=0.0))) == 13


def test_without_zero_lr_that_check_is_left_out():
    assert "zero_lr_keeps_every_bit" not in check_optimizer(lambda: DPSGD(lr=0.1))


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_optimizer_is_caught(case, caught):
    factory, check = BROKEN[case]
    assert caught(check_optimizer, factory) == check


def test_a_way_there_and_back_is_caught_at_lr_zero(caught):
    found = caught(
        check_optimizer,
        lambda: StepsFromTheQueryPoint(base=DPSGD(lr=0.1), rho=30),
        zero_lr=lambda: StepsFromTheQueryPoint(base=DPSGD(lr=0), rho=30),
    )
    assert found == "zero_lr_keeps_every_bit"


@dataclass(frozen=True, kw_only=True)
class Peeks(DPSGD):
    """Reads what somebody left for it: a way around the signature."""

    def update(self, params, private_gradient, state, info):
        return super().update(params, LEFT.get("raw") or private_gradient, state, info)


LEFT = {}


def leaving(params, batches, **more):
    def leave(indices):
        inputs, targets = batches(indices)
        LEFT["raw"] = {"weight": inputs[:, :6].sum(0).reshape(3, 2), "bias": inputs[:, 6:].sum(0)}
        return inputs, targets

    try:
        return train_locally(params, leave, **more)
    finally:
        LEFT.clear()


def test_a_raw_gradient_by_another_way_is_caught(caught):
    assert caught(check_optimizer, lambda: Peeks(lr=0.1), train=leaving) == REPLAY


def test_a_loop_of_your_own_joins_too():
    assert REPLAY in check_optimizer(lambda: shipped("dp-sat"), train=loop)


@pytest.mark.parametrize("mistake", LOOPS)
def test_a_broken_loop_is_caught(mistake, caught):
    def broken(*args, **settings):
        return loop(*args, **settings, mistake=mistake)

    assert caught(check_optimizer, lambda: shipped("dp-sat"), train=broken) == LOOPS[mistake]
