"""The client's half in the suite of strategies: rounds of two clients on made-up examples, and their replay."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fed_dpsat.client.half import ClientHalf, Finished, Received, received_by, sent_by
from fed_dpsat.client.half_round import AT, MODELS, OfHalf, fresh
from fed_dpsat.params import Params, flatten
from fed_dpsat.step.clipping import FlatClipping
from fed_dpsat.step.loop import Streams, train_locally
from fed_dpsat.step.optimizers.base import State
from fed_dpsat.step.optimizers.dpsgd import DPSGD
from fed_dpsat.step.sampling import PoissonSampler
from fed_dpsat.testing.conformance import require
from fed_dpsat.testing.problems import copied, difference, filled, normal_like, quadratic, step_info
from fed_dpsat.testing.rounds import EXAMPLES, RATE, SHAPES, Recording, through_bytes

MakeHalf = Callable[[], ClientHalf]

STEPS, ROUNDS, CLIENTS = 2, 3, (0, 1)
Kept = tuple[State, State]
"""What a client keeps: of the half, and of the optimizer by model."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """One round of a client: the private gradients, and what the half made of them."""

    released: Sequence[Params]
    finished: Finished
    kept: Kept


def half_sends_what_it_declares(make: MakeHalf) -> None:
    """Each round ends with a finite model, the declared records, and a state of tensors that can be stored."""
    for (client, round), done in _all_rounds(make).items():
        parts = {"params": done.finished.params, **done.finished.records, "state": flatten(done.finished.state)}
        wrong = [name for name, found in parts.items() if not all(bool(t.isfinite().all()) for t in found.values())]
        require(
            not wrong,
            expected=f"finite numbers after round {round} of client {client}",
            seen=f"NaN or inf in {', '.join(wrong)}",
            remedy="for a norm of 0, scale by 1",
        )


def half_is_replayed_from_private_gradients_alone(make: MakeHalf) -> None:
    """Private gradients and messages give each reply and state to the bit, for clients in another order.

    The check fails for random numbers, for a global variable, and for whatever else does not come from the arguments.
    """
    rounds = _all_rounds(make)
    for client in reversed(CLIENTS):
        kept: Kept | None = None
        for round in range(1, ROUNDS + 1):
            expected = rounds[client, round]
            torch.manual_seed(1000 + 7 * round + client)
            again = _replayed(make(), expected.released, _received(make(), round), kept, round)
            kept = again.kept
            said = _apart(expected.finished, again.finished)
            require(
                not said,
                expected=f"round {round} of client {client} again, from its private gradients and its state",
                seen=said,
                remedy="compute from the arguments alone: draw no random numbers, and keep all in Finished.state",
            )


def half_changes_nothing_in_place(make: MakeHalf) -> None:
    """The message and the state have their bits after a round, because other clients start with them."""
    kept: Kept | None = None
    for round in (1, 2):
        received = _received(make(), round)
        before = {"the message": _flat(received), "the state": copied(flatten(kept[0])) if kept else {}}
        done = _round(make(), received, kept, 0, round)
        after = {"the message": _flat(received), "the state": flatten(kept[0]) if kept else {}}
        said = [f"{name}: {d}" for name in before if (d := difference(before[name], after[name]))]
        require(not said, expected="unchanged inputs", seen="; ".join(said), remedy="make new tensors: add, not add_")
        kept = through_bytes(done.kept[0]), through_bytes(done.kept[1])


def half_has_a_model_for_each_client(make: MakeHalf) -> None:
    """``own_model`` has the names, shapes and types of the global model, also before a client's first round."""
    half = make()
    params, states = _start(1), [{}, *(done.finished.state for done in _all_rounds(make).values())]
    for state in states:
        own = fresh(half).own_model(copied(params), state)
        seen, expected = ({n: f"{t.dtype}{list(t.shape)}" for n, t in p.items()} for p in (own, params))
        require(
            seen == expected,
            expected=str(expected),
            seen=str(seen),
            remedy="return the parameters of one whole model, for an empty state the global one",
        )


HALF_CHECKS: tuple[Callable[[MakeHalf], None], ...] = (
    half_sends_what_it_declares,
    half_is_replayed_from_private_gradients_alone,
    half_changes_nothing_in_place,
    half_has_a_model_for_each_client,
)


def records_of(half: ClientHalf | None, before: Params, after: Params) -> dict[str, Params]:
    """Made-up records of a reply: the update where a declared tensor is like the model's, else zeros."""
    return {
        key: {
            name: (after[name] - before[name]).to(like)
            if name in before and before[name].shape == like.shape
            else torch.zeros_like(like)
            for name, like in tensors.items()
        }
        for key, tensors in sent_by(half, before).items()
    }


def _all_rounds(make: MakeHalf) -> dict[tuple[int, int], Round]:
    """Rounds by client and number; the clients take turns, each with a half of its own."""
    found: dict[tuple[int, int], Round] = {}
    halves = {client: make() for client in CLIENTS}
    for round in range(1, ROUNDS + 1):
        for client in CLIENTS:
            last = found.get((client, round - 1))
            kept = (through_bytes(last.kept[0]), through_bytes(last.kept[1])) if last else None
            found[client, round] = _round(halves[client], _received(halves[client], round), kept, client, round)
    return found


def _round(half: ClientHalf, received: Received, kept: Kept | None, client: int, round: int) -> Round:
    of, mechanism = _of(half, received, round), _mechanism()
    state = of.begin(*(kept or ({}, None)))
    rows = torch.randn(EXAMPLES, 9, generator=torch.Generator().manual_seed(client)) + client
    settings: dict[str, Any] = {"local_steps": STEPS * half.models, "first_step": of.first_step}
    result = train_locally(
        state[MODELS]["0"][AT],
        lambda indices: (rows[indices], torch.zeros(len(indices))),
        loss_fn=quadratic,
        optimizer=of,
        state=state,
        sampler=PoissonSampler(num_examples=EXAMPLES, sample_rate=RATE),
        clipping=FlatClipping(clip_norm=1.0),
        mechanism=mechanism,
        streams=Streams(seed=0, client=client, round=round),
        **settings,
    )
    finished, bases = of.finished(result.state)
    return Round(released=mechanism.released, finished=finished, kept=(finished.state, bases))


def _replayed(half: ClientHalf, released: Sequence[Params], received: Received, kept: Kept | None, round: int) -> Round:
    of = _of(half, received, round)
    state = of.begin(*(kept or ({}, None)))
    params = state[MODELS]["0"][AT]
    for step, private_gradient in enumerate(released):
        info = step_info(of.first_step + step, _mechanism().noise_std, round)
        params, state = of.update(params, copied(private_gradient), state, info)
    finished, bases = of.finished(state)
    return Round(released=released, finished=finished, kept=(through_bytes(finished.state), through_bytes(bases)))


def _of(half: ClientHalf, received: Received, round: int) -> OfHalf:
    first = (round - 1) * STEPS * half.models
    return OfHalf(base=DPSGD(lr=0.1, momentum=0.5), half=half, received=received, first_step=first, steps=STEPS)


def _received(half: ClientHalf, round: int) -> Received:
    params = _start(round)
    records = {name: normal_like(like, 100 + round) for name, like in received_by(half, params).items()}
    return Received(params=params, records=records)


def _start(round: int) -> Params:
    return normal_like(filled(SHAPES), round)


def _mechanism() -> Recording:
    return Recording(noise_multiplier=1.0, clip_norm=1.0, expected_batch_size=EXAMPLES * RATE)


def _flat(received: Received) -> Params:
    named: Mapping[str, Params] = {"model": received.params, **received.records}
    return {f"{key}/{name}": t.clone() for key, tensors in named.items() for name, t in tensors.items()}


def _apart(a: Finished, b: Finished) -> str:
    parts = {"params": (a.params, b.params), "state": (flatten(a.state), flatten(b.state))}
    parts |= {name: (tensors, b.records[name]) for name, tensors in a.records.items()}
    return "; ".join(f"{name}: {said}" for name, pair in parts.items() if (said := difference(*pair)))
