"""Conformance of strategies, in the ``PrivateStrategy`` that wraps them in a run, on a grid in this process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from flwr.serverapp.strategy import Strategy

from fed_dpsat.flower.inner import capture_state, restore_state
from fed_dpsat.testing.conformance import require, run_checks
from fed_dpsat.testing.federation import (
    EVENT,
    NUM_CLIENTS,
    Federation,
    Handed,
    Model,
    averaged,
    backwards,
    quiet,
    start,
    still,
    together,
)
from fed_dpsat.testing.replies import BAD, fail, from_bad_client, nan

Make = Callable[[], Strategy]


def check_strategy(factory: Make, *, averaging: bool = False) -> list[str]:
    """Run the suite on ``() -> flwr.serverapp.strategy.Strategy``; the names of the checks that were made.

    ``averaging`` says that it returns a weighted mean of the replies, with weights that do not depend on their
    values: then the weights are probed. Raises ``ConformanceError``.
    """
    checks = CHECKS if averaging else [check for check in CHECKS if check not in AVERAGING]
    with quiet():
        return run_checks("strategy", checks, factory)


def charges_are_exactly_for_what_was_asked(make: Make) -> None:
    """Every client is asked at most once a round, after it is charged, and charged for nothing else."""
    federation = Federation(make(), cohort_size=3)
    federation.rounds(3)
    asked = Counter(client for client, _ in federation.answered.elements())
    charged = federation.ledger.rounds_by_client()
    require(
        asked == charged and max(federation.answered.values(), default=0) <= 1 and not federation.uncharged,
        expected="each client to be charged once for each time it is asked, and before",
        seen=f"asked {dict(sorted(asked.items()))}, charged {charged}, asked before charged {federation.uncharged}",
        remedy="return messages from configure_train and let the loop send them: a strategy does not use the grid",
    )
    histories = {client: (replace(EVENT, steps=EVENT.steps * rounds),) for client, rounds in asked.items()}
    require(
        federation.ledger.histories() == histories,
        expected=f"an event {EVENT} for each",
        seen=str(federation.ledger.histories()),
        remedy="leave the task of a message as it is",
    )


def model_keeps_names_shapes_and_types(make: Make) -> None:
    """Whole numbers, float64 and 0-d arrays come out as they went in."""
    model = Federation(make(), move=together).rounds(2)
    expected, seen = ({n: f"{a.dtype}{list(a.shape)}" for n, a in m.items()} for m in (start(), model))
    require(seen == expected, expected=str(expected), seen=str(seen), remedy="np.asarray what a reduction returns")


def zero_update_stays_finite(make: Make) -> None:
    """Replies that are the model itself, round after round, leave a model of numbers: C / 0 is no scale."""
    _require_finite(Federation(make(), move=still).rounds(3), "from updates of zero", "where a norm is 0, scale by 1")


def equal_replies_move_that_way(make: Make) -> None:
    """Where all clients move one way, the model does not move the other."""
    before, after = start(), Federation(make(), move=together).round()
    along = sum(float(np.sum(after[n].astype(float) - before[n].astype(float))) for n in ("w", "matrix", "scale"))
    require(
        along > 0,
        expected="a step along the clients' common update",
        seen=f"{along:.3g} along it",
        remedy="an update is a client's model minus the global one; mind the sign of the server's step",
    )


def reply_order_changes_nothing(make: Make) -> None:
    """Replies that arrive in another order give the same model: to the bit through the wrapper, 1e-4 without it."""
    forwards = Federation(make()).rounds(3)
    shuffled = Federation(make())
    shuffled.backwards = True
    said = _apart(forwards, shuffled.rounds(3))
    require(not said, expected="the same model", seen=said, remedy="keep state by client, not by arrival")
    turned = Federation(Handed(make(), backwards))
    said = _apart(forwards, turned.rounds(3), tolerance=1e-4)
    require(
        not said,
        expected="the same model when the last client's reply is the first",
        seen=said,
        remedy="treat all replies of a round alike: not the first as a reference, not the last as the winner",
    )


def bad_replies_do_not_spread(make: Make) -> None:
    """A reply with NaN, of a wrong shape, type or size, or without its event counts as one that never came."""
    without = Federation(make(), tamper=from_bad_client(fail)).rounds(2)
    _require_finite(without, "where one client failed", "aggregate what there is")
    for what, spoil in BAD.items():
        seen = Federation(make(), tamper=from_bad_client(spoil)).rounds(2)
        said = _apart(without, seen)
        require(
            not said,
            expected=f"a reply with {what} to count as none",
            seen=said,
            remedy="use no reply but those that aggregate_train is given",
        )


def empty_rounds_keep_the_model(make: Make) -> None:
    """A round without a valid reply leaves the model, and the next goes on; so does one with a single reply."""
    federation = Federation(make(), tamper=lambda client, number, reply: nan(reply) if number == 2 else reply)
    before, after = federation.round(), federation.round()
    said = _apart(before, after)
    require(not said, expected="the model to stay in a round without replies", seen=said, remedy="change nothing")
    _require_finite(federation.round(), "after an empty round", "expect rounds without replies")
    single = Federation(make(), tamper=lambda client, number, reply: nan(reply) if client else reply)
    _require_finite(single.rounds(2), "from a single reply", "with too few replies, return (None, None)")


def state_survives_checkpoint_and_resume(make: Make) -> None:
    """A new strategy that takes up the state of round 2 ends where one ends that was never interrupted."""
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
        remedy="keep all that later rounds need in attributes of numbers and arrays, or define state_dict and "
        "load_state_dict",
    )


def new_strategies_agree(make: Make) -> None:
    """Two strategies of one factory do the same: nothing is left over from a run, nothing is drawn without a seed."""
    said = _apart(Federation(make()).rounds(2), Federation(make()).rounds(2))
    require(
        not said, expected="the same model from a second run", seen=said, remedy="seed what is drawn, share nothing"
    )


def weights_are_not_negative_and_sum_to_one(make: Make) -> None:
    """Clients that send unit vectors find their weights in the mean."""
    zeros: Model = {n: np.zeros_like(a) for n, a in start().items()}

    def unit(client: int, number: int, model: Model) -> Model:
        return {**model, "w": np.eye(NUM_CLIENTS, dtype=np.float32)[client]}

    for tamper in (None, from_bad_client(fail)):
        weights = Federation(make(), move=unit, tamper=tamper, model=zeros).round()["w"].astype(float)
        require(
            bool((weights >= 0).all()) and abs(weights.sum() - 1) < 1e-5,
            expected="weights that are not negative and sum to one",
            seen=f"{np.round(weights, 5).tolist()}, sum {weights.sum():.6g}",
            remedy="divide by the sum of the weights of the replies that came",
        )


def only_mean_is_true(make: Make) -> None:
    """A strategy that declares ``only_mean`` does with the mean of the replies what it does with all of them."""
    if not getattr(make(), "only_mean", False):
        return
    every, mean = (Federation(Handed(make(), turn)).rounds(3) for turn in (list, averaged))
    said = _apart(every, mean, tolerance=1e-4)
    require(
        not said,
        expected="one reply, their mean weighted by num-examples, to give the model that all replies give",
        seen=said,
        remedy="leave only_mean unset: this strategy looks at single replies",
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
    """What sets ``a`` apart from ``b`` first, in words; empty within ``tolerance``."""
    for name, array in a.items():
        away = float(np.abs(array.astype(float) - b[name].astype(float)).max())
        if not away <= tolerance:
            return f"{name} differs, by up to {away:.3g}"
    return ""


def _require_finite(model: Model, when: str, remedy: str) -> None:
    bad = [name for name, array in model.items() if not np.isfinite(array.astype(float)).all()]
    require(not bad, expected=f"a finite model {when}", seen=f"NaN or inf in {bad}", remedy=remedy)
