"""Conformance of private optimizers: two functions of public values, with nothing hidden and nothing lost."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from fed_dpsat.params import Params, zeros_like
from fed_dpsat.step.loop import train_locally
from fed_dpsat.step.optimizers.base import ASCENT, PrivateOptimizer, State, owned_update
from fed_dpsat.step.query import At, as_query, first_point
from fed_dpsat.testing.conformance import require, run_checks
from fed_dpsat.testing.problems import (
    TrainLoop,
    answer,
    copied,
    difference,
    flattened,
    kind,
    normal_like,
    walk,
)
from fed_dpsat.testing.rounds import (
    Subject,
    begun,
    physical_batches_change_nothing,
    through_bytes,
    training_is_replayed_from_private_gradients_alone,
    zero_lr_keeps_every_bit,
)

STEPS = 6
SIGNATURES = {
    "init": ("params",),
    "query_point": ("params", "state"),
    "update": ("params", "private_gradient", "state"),
}


def check_optimizer(
    factory: Callable[[], PrivateOptimizer],
    *,
    zero_lr: Callable[[], PrivateOptimizer] | None = None,
    train: TrainLoop = train_locally,
) -> list[str]:
    """Run the suite on ``() -> optimizer``; the names of the checks that were made.

    ``zero_lr`` gives the same optimizer with lr = 0, which must leave every bit of the weights. ``train`` is the
    training loop, for those who write their own. Raises ``ConformanceError``.
    """
    checks = CHECKS if zero_lr else [check for check in CHECKS if check is not zero_lr_keeps_every_bit]
    return run_checks("optimizer", checks, Subject(make=factory, make_still=zero_lr, train=train))


def signatures_take_no_data(subject: Subject) -> None:
    """``init(params)``, ``query_point(params, state)``, ``update(params, private_gradient, state)``: no more."""
    optimizer = subject.make()
    for name, wanted in SIGNATURES.items():
        method = getattr(optimizer, name)
        taken = list(inspect.signature(method).parameters.values())
        require(
            len(taken) == len(wanted) and all(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in taken),
            expected=f"{name}({', '.join(wanted)})",
            seen=f"{name}({', '.join(map(str, taken))})",
            remedy="take no batch, raw gradient or loss, not even as an option: all an optimizer computes must be "
            "post-processing of the private gradient",
        )


def state_is_named_tensors(subject: Subject) -> None:
    """State is ``{slot: {name: tensor}}``, so that it can be stored between rounds and sent."""
    for state in _states(subject):
        for slot, params in state.items():
            require(
                isinstance(params, dict) and "/" not in slot,
                expected="slots of named tensors, without '/' in the slot's name",
                seen=f"{slot!r}: {type(params).__name__}",
                remedy="keep numbers as 0-d tensors in a slot, as base.set_clock does",
            )
            for name, value in params.items():
                require(
                    type(value) is Tensor and not value.requires_grad,
                    expected="detached tensors in every slot",
                    seen=f"{slot}/{name}: {type(value).__name__}",
                    remedy="keep numbers as 0-d tensors, and detach",
                )


def points_are_like_params(subject: Subject) -> None:
    """Query points and new parameters have the names, shapes and types of ``params``: plain detached tensors.

    Points of a query that wraps the loss are of its own choosing, all alike: the wrapped loss is called there.
    """
    optimizer = subject.make()
    like = {name: kind(p) for name, p in start().items()}
    params = start()
    for state in _states(subject):
        query = as_query(optimizer.query_point(params, state))
        params, _ = optimizer.update(params, answer(query, 0), state)
        points = [("query_point", point) for _, point in query.points]
        for what, point in (*points, ("update", params)):
            own = what == "query_point" and query.loss is not None
            expected = {name: kind(p) for name, p in first_point(query).items()} if own else like
            plain = all(type(p) is Tensor and not p.requires_grad for p in point.values())
            seen = {name: kind(p) for name, p in point.items()}
            require(
                plain and seen == expected,
                expected=f"plain detached tensors {expected} from {what}",
                seen=f"{seen}" if plain else "tensors of another class, or that require a gradient",
                remedy="return one tensor like each parameter; mind 0-d tensors and float64",
            )


def inputs_are_not_changed(subject: Subject) -> None:
    """No function changes its arguments: parameters, gradient and state stay as they were, to the bit."""
    optimizer = subject.make()
    for state in _states(subject):
        gradient = answer(optimizer.query_point(start(), state), 0)
        given = {"params": start(), "private_gradient": gradient} | {f"state {slot}": p for slot, p in state.items()}
        before, slots = {what: copied(tensors) for what, tensors in given.items()}, list(state)
        for what, taken in SIGNATURES.items():
            getattr(optimizer, what)(*(given.get(name, state) for name in taken))
            changed = [f"{n}: {said}" for n, tensors in given.items() if (said := difference(before[n], tensors))]
            require(
                not changed and list(state) == slots,
                expected=f"{what} to leave its arguments as they are",
                seen="; ".join(changed) or f"slots {list(state)}, before {slots}",
                remedy="no operation in place: weights that are moved and put back drift away when a batch is split",
            )


def a_gradient_given_away_makes_the_same_step(subject: Subject) -> None:
    """``update_owned``, where there is one, gives the bits of ``update``, and writes into its gradient alone."""
    optimizer = subject.make()
    owned = owned_update(optimizer)
    for state in _states(subject):
        params, gradient = start(), answer(optimizer.query_point(start(), state), 0)
        given = {"params": params} | {f"state {slot}": p for slot, p in state.items()}
        before = {what: copied(tensors) for what, tensors in given.items()}
        outcomes = []
        for step in (optimizer.update, owned):
            torch.manual_seed(0)
            outcomes.append(_flat(*step(params, copied(gradient), state)))
        said = difference(*outcomes)
        require(
            not said,
            expected="from update_owned the parameters and state of update",
            seen=f"others: {said}",
            remedy="leave nothing in the gradient's memory that a later line of update_owned overwrites",
        )
        changed = [f"{n}: {said}" for n, tensors in given.items() if (said := difference(before[n], tensors))]
        require(
            not changed,
            expected="update_owned to leave parameters and state as they are",
            seen="; ".join(changed),
            remedy="write into the private gradient alone",
        )


def same_inputs_give_same_outputs(subject: Subject) -> None:
    """Calls in between, and another object of the same settings, change no bit: nothing is kept outside the state."""
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
                seen=f"other ones {what}: {said}",
                remedy="keep momentum and all else in the state: what hides in the object is lost between rounds, "
                "or shared by clients; draw from torch's global generator, which the loop seeds",
            )


def resumed_equals_uninterrupted(subject: Subject) -> None:
    """Stored as bytes after any step and taken up by a new object, training goes on to the same bits."""
    optimizer = subject.make()
    ends = list(walk(optimizer, start(), begun(optimizer, start()), range(STEPS)))
    for stop in range(len(ends) - 1):
        params, state, _ = ends[stop]
        resumed, state, _ = list(walk(subject.make(), params, through_bytes(state), range(stop + 1, STEPS)))[-1]
        said = difference(ends[-1][0], resumed) or difference(flattened(ends[-1][1]), flattened(state))
        require(
            not said,
            expected="the parameters and state of a run without interruption",
            seen=f"others where it was stored after step {stop + 1}: {said}",
            remedy="keep all that later steps need in the state, as tensors; an empty slot is not stored",
        )


def zero_gradient_stays_finite(subject: Subject) -> None:
    """After zero gradients, parameters, state and query point are finite: the direction 0 / 0 is 0."""
    optimizer, params = subject.make(), start()
    for state in (begun(optimizer, params), _states(subject)[-1]):
        for _ in range(2):
            zeros = zeros_like(first_point(optimizer.query_point(params, state)))
            params, state = optimizer.update(params, zeros, state)
            seen = {"params": params, **asked(optimizer.query_point(params, state)), **state}
            bad = [s for s, tensors in seen.items() if not all(bool(t.isfinite().all()) for t in tensors.values())]
            require(
                not bad,
                expected="finite values after a private gradient of zero",
                seen=f"NaN or inf in {', '.join(bad)}",
                remedy="where a norm is 0, take the direction as 0, as base.climb does",
            )


def a_direction_may_come_or_go(subject: Subject) -> None:
    """Between rounds ``ascent_memory=zero`` takes the slot "ascent" away; a direction may be any."""
    optimizer, state = subject.make(), _states(subject)[-1]
    without = {slot: params for slot, params in state.items() if slot != ASCENT}
    for changed in (without, {**without, ASCENT: normal_like(start(), 9)}):
        at = optimizer.query_point(start(), changed)
        params, _ = optimizer.update(start(), answer(at, 0), changed)
        require(
            all(bool(t.isfinite().all()) for point in (*asked(at).values(), params) for t in point.values()),
            expected=f"a step with slots {sorted(changed)}",
            seen="NaN or inf",
            remedy="read the slot by state.get(ASCENT): without a direction the query point is w",
        )


CHECKS = (
    signatures_take_no_data,
    state_is_named_tensors,
    points_are_like_params,
    inputs_are_not_changed,
    same_inputs_give_same_outputs,
    a_gradient_given_away_makes_the_same_step,
    resumed_equals_uninterrupted,
    zero_gradient_stays_finite,
    a_direction_may_come_or_go,
    training_is_replayed_from_private_gradients_alone,
    physical_batches_change_nothing,
    zero_lr_keeps_every_bit,
)


def start() -> Params:
    """Parameters of several shapes and types, of their own at every call."""
    return {
        "weight": torch.linspace(-1, 1, 6).reshape(3, 2),
        "bias": torch.linspace(0, 1, 3, dtype=torch.float64),
        "scale": torch.tensor(1.5),
    }


def asked(at: At) -> dict[str, Params]:
    """All tensors of what ``query_point`` answered, by a name for each of its points and masks."""
    query = as_query(at)
    points = {f"query_point {i} of weight {w}": point for i, (w, point) in enumerate(query.points)}
    return {**points, "active": query.active or {}}


def _states(subject: Subject) -> list[State]:
    """States before the first step and after each of three."""
    optimizer = subject.make()
    first = begun(optimizer, start())
    return [first, *(state for _, state, _ in walk(optimizer, start(), first, range(3)))]


def _outputs(optimizer: PrivateOptimizer, state: State, seed: int) -> Params:
    """All that the two functions return, under one level of names."""
    torch.manual_seed(0)
    at = optimizer.query_point(start(), state)
    return {**flattened(asked(at)), **_flat(*optimizer.update(start(), answer(at, seed), state))}


def _flat(params: Params, state: State) -> Params:
    return flattened({"params": params, **{f"state {slot}": p for slot, p in state.items()}})
