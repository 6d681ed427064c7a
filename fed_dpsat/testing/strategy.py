"""Conformance of strategies, inside the ``PrivateStrategy`` of a run, on a grid in this process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from flwr.serverapp.strategy import Strategy

from fed_dpsat.client.half import ClientHalf, half_of, sent_by
from fed_dpsat.flower.inner import capture_state, restore_state
from fed_dpsat.flower.wire import records
from fed_dpsat.testing.conformance import require, run_checks
from fed_dpsat.testing.federation import (
    EVENT,
    NUM_CLIENTS,
    Federation,
    Handed,
    Model,
    as_record,
    averaged,
    backwards,
    quiet,
    start,
    still,
    together,
)
from fed_dpsat.testing.half import HALF_CHECKS
from fed_dpsat.testing.replies import BAD, BAD_RECORDS, fail, from_bad_client, nan

Make = Callable[[], Strategy]


def check_strategy(factory: Make, *, averaging: bool = False) -> list[str]:
    """Run the suite on ``() -> flwr.serverapp.strategy.Strategy``; returns the names of the checks.

    Set ``averaging`` for a strategy that returns a weighted mean of the replies with weights independent of their
    values; then the suite checks the weights. A strategy with a client's half has further checks of that. Raises
    ``ConformanceError``.
    """
    checks = CHECKS if averaging else [check for check in CHECKS if check not in AVERAGING]
    with quiet():
        made = run_checks("strategy", checks, factory)
        if half_of(factory()) is None:
            return made
        return [*made, *run_checks("strategy", HALF_CHECKS, lambda: _half(factory))]


def _half(factory: Make) -> ClientHalf:
    half = half_of(factory())
    assert half is not None
    return half


def charges_are_exactly_for_what_was_asked(make: Make) -> None:
    """A client receives at most one message per round, after its charge, and pays for nothing else."""
    federation = Federation(make(), cohort_size=3)
    federation.rounds(3)
    asked = Counter(client for client, _ in federation.answered.elements())
    charged = federation.ledger.rounds_by_client()
    require(
        asked == charged and max(federation.answered.values(), default=0) <= 1 and not federation.uncharged,
        expected="one charge before each message",
        seen=f"asked {dict(sorted(asked.items()))}, charged {charged}, asked before charged {federation.uncharged}",
        remedy="return messages from configure_train and let the loop send them: a strategy must not use the grid",
    )
    histories = {client: (replace(EVENT, steps=EVENT.steps * rounds),) for client, rounds in asked.items()}
    require(
        federation.ledger.histories() == histories,
        expected=f"an event {EVENT} for each",
        seen=str(federation.ledger.histories()),
        remedy="do not change the assignment in a message",
    )


def model_keeps_names_shapes_and_types(make: Make) -> None:
    """Integers, float64 and 0-d arrays keep their types and shapes."""
    model = Federation(make(), move=together).rounds(2)
    expected, seen = ({n: f"{a.dtype}{list(a.shape)}" for n, a in m.items()} for m in (start(), model))
    require(seen == expected, expected=str(expected), seen=str(seen), remedy="np.asarray what a reduction returns")


def zero_update_stays_finite(make: Make) -> None:
    """Updates of zero give a finite model: C / 0 is not a scale."""
    _require_finite(Federation(make(), move=still).rounds(3), "from updates of zero", "for a norm of 0, scale by 1")


def equal_replies_move_that_way(make: Make) -> None:
    """If all clients move in one direction, the model does not move in the opposite one."""
    before, after = start(), Federation(make(), move=together).round()
    along = sum(float(np.sum(after[n].astype(float) - before[n].astype(float))) for n in ("w", "matrix", "scale"))
    require(
        along > 0,
        expected="a step along the clients' common update",
        seen=f"{along:.3g} along it",
        remedy="an update is the model of a client minus the global model; check the sign of the server's step",
    )


def reply_order_changes_nothing(make: Make) -> None:
    """Another order of replies gives the same model: to the bit with the wrapper, within 1e-4 without it."""
    forwards = Federation(make()).rounds(3)
    shuffled = Federation(make())
    shuffled.backwards = True
    said = _apart(forwards, shuffled.rounds(3))
    require(not said, expected="the same model", seen=said, remedy="keep state by client, not by arrival")
    turned = Federation(Handed(make(), backwards))
    said = _apart(forwards, turned.rounds(3), tolerance=1e-4)
    require(
        not said,
        expected="the same model for replies in reverse order",
        seen=said,
        remedy="treat all replies of a round alike: the first and the last are not special",
    )


def bad_replies_do_not_spread(make: Make) -> None:
    """A reply with NaN, a wrong shape, type or size, or without its event counts as missing."""
    without = Federation(make(), tamper=from_bad_client(fail)).rounds(2)
    _require_finite(without, "after a failed client", "aggregate the other replies")
    sends = sent_by(half_of(make()), records.to_params(as_record(start())))
    for what, spoil in {**BAD, **(BAD_RECORDS if sends else {})}.items():
        seen = Federation(make(), tamper=from_bad_client(spoil)).rounds(2)
        said = _apart(without, seen)
        require(
            not said,
            expected=f"a reply with {what} to count as missing",
            seen=said,
            remedy="use only the replies that aggregate_train receives",
        )


def empty_rounds_keep_the_model(make: Make) -> None:
    """A round without a valid reply keeps the model, and the next round works; so does a round with one reply."""
    federation = Federation(make(), tamper=lambda client, number, reply: nan(reply) if number == 2 else reply)
    before, after = federation.round(), federation.round()
    said = _apart(before, after)
    require(not said, expected="the model to stay in a round without replies", seen=said, remedy="change nothing")
    _require_finite(federation.round(), "after an empty round", "expect rounds without replies")
    single = Federation(make(), tamper=lambda client, number, reply: nan(reply) if client else reply)
    _require_finite(single.rounds(2), "from a single reply", "with too few replies, return (None, None)")


def state_survives_checkpoint_and_resume(make: Make) -> None:
    """A new strategy with the state of round 2 ends like a strategy without interruption."""
    federation = Federation(make())
    middle = federation.rounds(2)
    state = capture_state(federation.private.inner)
    end = federation.rounds(2)
    restore_state(resumed := make(), state)
    said = _apart(end, Federation(resumed, model=middle, after=2).rounds(2))
    require(
        not said,
        expected="the model of a run without interruption",
        seen=said,
        remedy="keep all values that later rounds need in attributes of numbers and arrays, or define state_dict and "
        "load_state_dict",
    )


def new_strategies_agree(make: Make) -> None:
    """Two strategies of one factory give the same model: they share no state and draw only with a seed."""
    said = _apart(Federation(make()).rounds(2), Federation(make()).rounds(2))
    require(not said, expected="the same model from a second run", seen=said, remedy="seed each draw, share no state")


def weights_are_not_negative_and_sum_to_one(make: Make) -> None:
    """With unit vectors as updates, the mean shows the weights."""
    zeros: Model = {n: np.zeros_like(a) for n, a in start().items()}

    def unit(client: int, number: int, model: Model) -> Model:
        return {**model, "w": np.eye(NUM_CLIENTS, dtype=np.float32)[client]}

    for tamper in (None, from_bad_client(fail)):
        weights = Federation(make(), move=unit, tamper=tamper, model=zeros).round()["w"].astype(float)
        require(
            bool((weights >= 0).all()) and abs(weights.sum() - 1) < 1e-5,
            expected="weights that are not negative and sum to one",
            seen=f"{np.round(weights, 5).tolist()}, sum {weights.sum():.6g}",
            remedy="divide by the sum of the weights of the received replies",
        )


def only_mean_is_true(make: Make) -> None:
    """A strategy with ``only_mean`` gives the same model from the mean of the replies as from all replies."""
    if not getattr(make(), "only_mean", False):
        return
    every, mean = (Federation(Handed(make(), turn)).rounds(3) for turn in (list, averaged))
    said = _apart(every, mean, tolerance=1e-4)
    require(
        not said,
        expected="the same model from one reply with the mean, weighted by num-examples",
        seen=said,
        remedy="leave only_mean unset: this strategy uses single replies",
    )


CHECKS: tuple[Callable[[Make], None], ...] = (
    model_keeps_names_shapes_and_types,
    charges_are_exactly_for_what_was_asked,
    zero_update_stays_finite,
    equal_replies_move_that_way,
    new_strategies_agree,
    only_mean_is_true,
    reply_order_changes_nothing,
    bad_replies_do_not_spread,
    empty_rounds_keep_the_model,
    state_survives_checkpoint_and_resume,
    weights_are_not_negative_and_sum_to_one,
)
AVERAGING = (weights_are_not_negative_and_sum_to_one,)


def _apart(a: Model, b: Model, tolerance: float = 0.0) -> str:
    """The first difference of ``a`` and ``b`` as text; empty within ``tolerance``."""
    for name, array in a.items():
        away = float(np.abs(array.astype(float) - b[name].astype(float)).max())
        if not away <= tolerance:
            return f"{name} differs, by up to {away:.3g}"
    return ""


def _require_finite(model: Model, when: str, remedy: str) -> None:
    bad = [name for name, array in model.items() if not np.isfinite(array.astype(float)).all()]
    require(not bad, expected=f"a finite model {when}", seen=f"NaN or inf in {bad}", remedy=remedy)
