"""Conformance of private optimizers: functions of public values, with all state in their arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fed_dpsat.params import Params, flatten, zeros_like
from fed_dpsat.step.loop import train_locally
from fed_dpsat.step.optimizers.base import (
    ASCENT,
    BASE,
    PrivateOptimizer,
    State,
    next_round,
    owned_update,
    unknown_carried,
)
from fed_dpsat.step.query import At, as_query, first_point
from fed_dpsat.testing.conformance import require, run_checks
from fed_dpsat.testing.problems import (
    TrainLoop,
    copied,
    difference,
    kind,
    made_up_gradient,
    normal_like,
    step_info,
    walk,
)
from fed_dpsat.testing.rounds import (
    Subject,
    physical_batches_change_nothing,
    through_bytes,
    training_is_replayed_from_private_gradients_alone,
    zero_lr_keeps_every_bit,
)

STEPS = 6
SIGNATURES = {
    "init": ("params",),
    "query_point": ("params", "state", "info"),
    "update": ("params", "private_gradient", "state", "info"),
}


def check_optimizer(
    factory: Callable[[], PrivateOptimizer],
    *,
    zero_lr: Callable[[], PrivateOptimizer] | None = None,
    train: TrainLoop = train_locally,
) -> list[str]:
    """Run the suite on ``() -> optimizer``; returns the names of the checks.

    ``zero_lr`` gives the same optimizer with lr = 0, which must keep every bit of the weights. ``train`` replaces the
    training loop. Raises ``ConformanceError``.
    """
    checks = CHECKS if zero_lr else [check for check in CHECKS if check is not zero_lr_keeps_every_bit]
    return run_checks("optimizer", checks, Subject(make=factory, make_still=zero_lr, train=train))


def signatures_take_no_data(subject: Subject) -> None:
    """``init(params)``, ``query_point(params, state, info)``, ``update(params, private_gradient, state, info)``."""
    optimizer = subject.make()
    for name, wanted in SIGNATURES.items():
        method = getattr(optimizer, name)
        taken = list(inspect.signature(method).parameters.values())
        require(
            len(taken) == len(wanted) and all(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in taken),
            expected=f"{name}({', '.join(wanted)})",
            seen=f"{name}({', '.join(map(str, taken))})",
            remedy="take no batch, raw gradient or loss, not even as an option: an optimizer may only post-process the "
            "private gradient",
        )


def state_is_named_tensors(subject: Subject) -> None:
    """State is a tree of named tensors, which a client can store and send; ``carries`` is a tuple of its names."""
    for state in _states(subject):
        for path, value in _leaves(state):
            require(
                type(value) is Tensor and not value.requires_grad,
                expected="detached tensors, or trees of them",
                seen=f"{path}: {type(value).__name__}",
                remedy="store numbers as 0-d tensors, use strings as names, and detach",
            )
    optimizer = subject.make()
    carries = getattr(optimizer, "carries", ())
    require(
        isinstance(carries, tuple) and all(isinstance(name, str) and name != BASE for name in carries),
        expected="carries, a tuple of names",
        seen=repr(carries),
        remedy="name the state that a client keeps for its next round, as in ('momentum',); a base names its own",
    )
    unknown = unknown_carried(optimizer, _states(subject))
    require(
        not unknown,
        expected="names in carries that init or one of the first 3 steps makes",
        seen=unknown,
        remedy="correct the name, or begin it in init",
    )


def _leaves(tree: Any, path: str = "state") -> Iterator[tuple[str, Any]]:
    """The leaves of ``tree`` with their paths; a dict with a key that is not a name is a leaf."""
    if type(tree) is not dict or not all(type(name) is str and name for name in tree):
        yield path, tree
        return
    for name, value in tree.items():
        yield from _leaves(value, f"{path}/{name}")


def state_of_a_base_has_its_own_place(subject: Subject) -> None:
    """An optimizer over a ``base`` keeps the state of the base under "base"."""
    optimizer = subject.make()
    base = getattr(optimizer, "base", None)
    if base is None:
        return
    seen = optimizer.init(start()).get(BASE)
    require(
        isinstance(seen, dict) and seen.keys() == base.init(start()).keys(),
        expected=f"the state of {type(base).__name__} under {BASE!r}",
        seen=f"slots {sorted(optimizer.init(start()))}",
        remedy="extend fed_dpsat.step.optimizers.base.Over: two optimizers with one name would share state",
    )


def points_are_like_params(subject: Subject) -> None:
    """Query points and new parameters have the names, shapes and types of ``params``: plain detached tensors.

    A query that wraps the loss, or asks for slopes, may choose other shapes, equal for all its points.
    """
    optimizer = subject.make()
    like = {name: kind(p) for name, p in start().items()}
    params = start()
    for state in _states(subject):
        query = as_query(optimizer.query_point(params, state, step_info()))
        params, _ = optimizer.update(params, made_up_gradient(query, 0), state, step_info())
        points = [("query_point", point) for _, point in query.points]
        points += [("a slope", point) for slope in (query.slopes or {}).values() for _, point in slope.points()]
        for what, point in (*points, ("update", params)):
            own = what == "query_point" and bool(query.loss or query.slopes)
            expected = {name: kind(p) for name, p in first_point(query).items()} if own else like
            plain = all(type(p) is Tensor and not p.requires_grad for p in point.values())
            seen = {name: kind(p) for name, p in point.items()}
            require(
                plain and seen == expected,
                expected=f"plain detached tensors {expected} from {what}",
                seen=f"{seen}" if plain else "tensors of another class, or that require a gradient",
                remedy="return one tensor like each parameter, also for 0-d tensors and float64",
            )


def inputs_are_not_changed(subject: Subject) -> None:
    """No function changes its arguments: parameters, gradient and state keep their bits."""
    optimizer = subject.make()
    for state in _states(subject):
        info = step_info()
        gradient = made_up_gradient(optimizer.query_point(start(), state, info), 0)
        given = {"params": start(), "private_gradient": gradient, "state": state}
        before = {what: copied(flatten(tensors)) for what, tensors in given.items()}
        for what, taken in SIGNATURES.items():
            getattr(optimizer, what)(*(given.get(name, info) for name in taken))
            changed = [
                f"{what}: {said}" for what, tree in given.items() if (said := difference(before[what], flatten(tree)))
            ]
            require(
                not changed,
                expected=f"unchanged arguments after {what}",
                seen="; ".join(changed),
                remedy="use no operation in place: weights that move to a point and back lose bits",
            )


def a_gradient_given_away_makes_the_same_step(subject: Subject) -> None:
    """``update_owned``, if present, gives the bits of ``update`` and writes only into its gradient."""
    optimizer = subject.make()
    owned = owned_update(optimizer)
    for state in _states(subject):
        params, info = start(), step_info()
        gradient, given = made_up_gradient(optimizer.query_point(params, state, info), 0), _flat(params, state)
        before, outcomes = copied(given), []
        for step in (optimizer.update, owned):
            torch.manual_seed(0)
            outcomes.append(_flat(*step(params, copied(gradient), state, info)))
        said = difference(*outcomes)
        require(
            not said,
            expected="the parameters and state of update from update_owned",
            seen=f"a difference: {said}",
            remedy="return no tensor in the memory of the gradient that update_owned overwrites later",
        )
        said = difference(before, _flat(params, state))
        require(
            not said,
            expected="unchanged parameters and state after update_owned",
            seen=said,
            remedy="write only into the private gradient",
        )


def same_inputs_give_same_outputs(subject: Subject) -> None:
    """Other calls, and another object of the same settings, change no bit: all state is in the arguments."""
    optimizer = subject.make()
    states = _states(subject)
    for state in states:
        first = _outputs(optimizer, state, 0)
        _outputs(optimizer, states[-1], 1)
        optimizer.init(start())
        for what, again in (
            ("after other calls", _outputs(optimizer, state, 0)),
            ("from a new object", _outputs(subject.make(), state, 0)),
        ):
            said = difference(first, again)
            require(
                not said,
                expected="the same outputs for the same params, private gradient and state",
                seen=f"a difference {what}: {said}",
                remedy="keep momentum and other values in the state: attributes of the object are lost between rounds, "
                "or shared by clients; draw from the global generator of torch, which the loop seeds",
            )


def resumed_equals_uninterrupted(subject: Subject) -> None:
    """After any step, a new object with the stored state continues to the same bits."""
    optimizer = subject.make()
    ends = list(walk(optimizer, start(), optimizer.init(start()), range(STEPS)))
    for stop in range(len(ends) - 1):
        params, state, _ = ends[stop]
        resumed, state, _ = list(walk(subject.make(), params, through_bytes(state), range(stop + 1, STEPS)))[-1]
        said = difference(ends[-1][0], resumed) or difference(flatten(ends[-1][1]), flatten(state))
        require(
            not said,
            expected="the parameters and state of a run without interruption",
            seen=f"a difference with a state stored after step {stop + 1}: {said}",
            remedy="keep all values that later steps need in the state, as tensors",
        )


def zero_gradient_stays_finite(subject: Subject) -> None:
    """After zero gradients, parameters, state and query point are finite: the direction 0 / 0 is 0."""
    optimizer, params = subject.make(), start()
    for state in (optimizer.init(params), _states(subject)[-1]):
        for index in range(2):
            zeros = zeros_like(first_point(optimizer.query_point(params, state, step_info(index))))
            params, state = optimizer.update(params, zeros, state, step_info(index))
            seen = flatten({"params": params, **asked(optimizer.query_point(params, state, step_info())), **state})
            bad = [path for path, tensor in seen.items() if not bool(tensor.isfinite().all())]
            require(
                not bad,
                expected="finite values after a private gradient of zero",
                seen=f"NaN or inf in {', '.join(bad)}",
                remedy="for a norm of 0, use the direction 0, as base.climb does",
            )


def a_round_begins_with_what_is_carried(subject: Subject) -> None:
    """A round starts with the state that ``carries`` names and the rest from ``init``; any direction is possible."""
    optimizer, last = subject.make(), _states(subject)[-1]
    state = next_round(optimizer, start(), last)
    states = [state, {**state, ASCENT: normal_like(start(), 9)} if ASCENT in last else state]
    for begun in states:
        at = optimizer.query_point(start(), begun, step_info(3, round=2))
        params, _ = optimizer.update(start(), made_up_gradient(at, 0), begun, step_info(3, round=2))
        require(
            all(bool(t.isfinite().all()) for point in (*asked(at).values(), params) for t in point.values()),
            expected=f"a step from a state of {sorted(begun)}",
            seen="NaN or inf",
            remedy="name in carries the state that later rounds need; without a direction the query point is w",
        )


CHECKS = (
    signatures_take_no_data,
    state_is_named_tensors,
    state_of_a_base_has_its_own_place,
    points_are_like_params,
    inputs_are_not_changed,
    same_inputs_give_same_outputs,
    a_gradient_given_away_makes_the_same_step,
    resumed_equals_uninterrupted,
    zero_gradient_stays_finite,
    a_round_begins_with_what_is_carried,
    training_is_replayed_from_private_gradients_alone,
    physical_batches_change_nothing,
    zero_lr_keeps_every_bit,
)


def start() -> Params:
    """New parameters of several shapes and types."""
    return {
        "weight": torch.linspace(-1, 1, 6).reshape(3, 2),
        "bias": torch.linspace(0, 1, 3, dtype=torch.float64),
        "scale": torch.tensor(1.5),
    }


def asked(at: At) -> dict[str, Params]:
    """All tensors of a query, with a name for each of its points and masks."""
    query = as_query(at)
    points = {f"query_point {i} of weight {w}": point for i, (w, point) in enumerate(query.points)}
    for name, slope in (query.slopes or {}).items():
        points |= {f"slope {name}, point {i} of weight {w}": point for i, (w, point) in enumerate(slope.points())}
    return {**points, "active": query.active or {}}


def _states(subject: Subject) -> list[State]:
    """The state before the first step, and after each of three steps."""
    optimizer = subject.make()
    first = optimizer.init(start())
    return [first, *(state for _, state, _ in walk(optimizer, start(), first, range(3)))]


def _outputs(optimizer: PrivateOptimizer, state: State, seed: int) -> Params:
    """All results of the two functions, with one level of names."""
    torch.manual_seed(0)
    at = optimizer.query_point(start(), state, step_info())
    return {**flatten(asked(at)), **_flat(*optimizer.update(start(), made_up_gradient(at, seed), state, step_info()))}


def _flat(params: Params, state: State) -> Params:
    return flatten({"params": params, "state": state})
