import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fed_dpsat.params import global_norm, subtract
from fed_dpsat.step.optimizers import DPSAT, DPSGD
from fed_dpsat.step.optimizers.base import (
    ASCENT,
    BASE,
    Over,
    carried_names,
    climb,
    next_round,
    owned_update,
    unknown_carried,
)
from fed_dpsat.testing.problems import step_info

PARAMS = {"a": torch.tensor([1.0]), "b": torch.tensor([2.0, 0.0])}


def per_tensor(params, direction, rho):
    """Wrong: each tensor climbs by rho."""
    return {name: p + rho * direction[name] / direction[name].norm() for name, p in params.items()}


def test_by_hand_over_all_parameters_together():
    """The direction (3; 4, 0) has norm 5; tensor by tensor it would climb 5 in each."""
    direction = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0, 0.0])}
    there = {"a": torch.tensor([4.0]), "b": torch.tensor([6.0, 0.0])}
    torch.testing.assert_close(climb(PARAMS, direction, 5), there)
    wrong = per_tensor(PARAMS, direction, 5)
    assert [wrong["a"].item(), wrong["b"][0].item()] == [6, 7]


def test_without_a_direction_nothing_moves(same_bits):
    zero = {"a": torch.zeros(1), "b": torch.zeros(2)}
    assert same_bits(climb(PARAMS, None, 0.1), PARAMS)
    assert same_bits(climb(PARAMS, zero, 0.1), PARAMS)


def test_without_a_radius_nothing_moves(same_bits):
    nowhere = {"a": torch.tensor([float("nan")]), "b": torch.ones(2)}
    assert same_bits(climb(PARAMS, nowhere, 0), PARAMS)


@given(st.lists(st.floats(-1, 1, width=32), min_size=3, max_size=3), st.sampled_from([1e-12, 1e-6, 1.0, 1e6, 1e15]))
def test_the_way_is_rho_long_whatever_the_length_of_the_direction(direction, scale):
    d = torch.tensor(direction).where(torch.tensor(direction).abs() > 1e-3, 0) * scale
    origin = {"a": torch.zeros(1), "b": torch.zeros(2)}
    there = climb(origin, {"a": d[:1], "b": d[1:]}, 0.03)
    assert float(global_norm(there)) == pytest.approx(0.03 if d.any() else 0, rel=1e-5)


def test_nothing_is_changed_in_place(same_bits):
    direction = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0, 0.0])}
    before = [{name: t.clone() for name, t in d.items()} for d in (PARAMS, direction)]
    there = climb(PARAMS, direction, 5)
    assert same_bits(PARAMS, before[0])
    assert same_bits(direction, before[1])
    assert global_norm(subtract(there, PARAMS)) == 5


def test_types_are_kept():
    params = {"a": torch.zeros(1, dtype=torch.float64), "b": torch.zeros(2)}
    there = climb(params, {name: torch.ones_like(p) for name, p in params.items()}, 0.1)
    assert [p.dtype for p in there.values()] == [torch.float64, torch.float32]


class Quiet(Over):
    """Says nothing of what it carries."""


def chain(memory):
    return DPSAT(base=DPSAT(base=DPSGD(lr=1, momentum=0.5), rho=0, ascent_memory="zero"), rho=0, ascent_memory=memory)


@pytest.mark.parametrize("memory", ["client", "zero"])
def test_each_link_says_what_it_carries(memory, same_bits):
    """Of three links the inner direction never goes into the next round, the momentum always."""
    optimizer = chain(memory)
    _, last = optimizer.update(PARAMS, PARAMS, optimizer.init(PARAMS), step_info())
    assert same_bits(last[BASE][ASCENT], PARAMS)
    state = next_round(optimizer, PARAMS, last)
    assert (ASCENT in state) == (memory == "client")
    assert ASCENT not in state[BASE]
    assert same_bits(state[BASE][BASE]["momentum"], PARAMS)
    assert carried_names(optimizer) == {"momentum"} | ({ASCENT} if memory == "client" else set())


def test_what_is_not_carried_begins_as_at_first(same_bits):
    class Forgets(DPSGD):
        carries = ()

    optimizer = Forgets(lr=1, momentum=0.5)
    _, last = optimizer.update(PARAMS, PARAMS, optimizer.init(PARAMS), step_info())
    assert same_bits(next_round(optimizer, PARAMS, last)["momentum"], optimizer.init(PARAMS)["momentum"])


def test_who_does_not_say_carries_all():
    optimizer = Quiet(base=DPSGD(lr=1))
    last = {**optimizer.init(PARAMS), "mine": PARAMS}
    assert next_round(optimizer, PARAMS, last) == last
    assert carried_names(optimizer) == {"all of Quiet"}


class OwnUpdate(DPSGD):
    def update(self, params, private_gradient, state, info):
        return params, state


class Both(OwnUpdate):
    def update(self, params, private_gradient, state, info):
        return params, state

    def update_owned(self, params, private_gradient, state, info):
        return params, state


class OwnedAlone(DPSGD):
    def update_owned(self, params, private_gradient, state, info):
        return params, state


class Silent(Both):
    pass


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (DPSGD, "update_owned"),
        (Both, "update_owned"),
        (Silent, "update_owned"),
        (OwnUpdate, "update"),
        (OwnedAlone, "update"),
    ],
)
def test_a_gradient_is_given_away_to_who_wrote_both_updates(kind, name):
    optimizer = kind(lr=0.1)
    assert owned_update(optimizer) == getattr(optimizer, name)


def test_a_gradient_is_not_given_away_to_who_keeps_it():
    optimizer = DPSAT(base=DPSGD(lr=0.1), rho=0.1)
    assert owned_update(optimizer) == optimizer.update


def test_a_carried_name_is_looked_for_in_all_states_of_its_own_link():
    """DP-SAT has its direction after a step, and the momentum belongs to the base."""
    optimizer = DPSAT(base=DPSGD(lr=0.1, momentum=0.9), rho=0.1)
    first = optimizer.init(PARAMS)
    assert unknown_carried(optimizer, [{**first, "ascend": PARAMS}]) == (
        "'ascent', which no state of DPSAT has (did you mean 'ascend'?)"
    )
    assert unknown_carried(optimizer, [first]) == ""
    assert unknown_carried(optimizer, [first, {**first, ASCENT: PARAMS}]) == ""
    assert unknown_carried(optimizer, [{ASCENT: PARAMS, BASE: {"momentun": PARAMS}}]) == (
        "'momentum', which no state of DPSGD has (did you mean 'momentun'?)"
    )
