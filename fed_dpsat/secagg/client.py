"""The client in secure aggregation: its reply in each phase, and the secrets that it keeps between phases.

Secrets live in the state of the context. The client deletes them when it opens shares, and refuses a second request for
the same round.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fed_dpsat.flower.wire import compat, records
from fed_dpsat.flower.wire.records import MASKED, SECURE
from fed_dpsat.secagg.fixed_point import encode, fraction_bits
from fed_dpsat.secagg.rounds import PublicKeys, Secrets, mask, open_shares, share

SECRETS = "fed_dpsat.secrets"
"""The record with the secrets of a client; it stays on the client."""

KEYS, LISTS = ("seal_key", "mask_key", "seed"), ("seal", "mask", "sealed")
"""Fields of this record that are bytes, and fields that are lists of bytes."""


def phase_reply(client: int, content: RecordDict, state: RecordDict, num_examples: int) -> RecordDict:
    """The reply in the phases keys, shares and open; raises ``ValueError`` for a phase out of order."""
    asked: dict[str, Any] = dict(content.config_records[SECURE])
    round = str(records.read_assignment(content).round)
    answers: dict[str, Callable[[], dict[str, Any]]] = {
        "keys": lambda: _keys(client, round, state, num_examples),
        "shares": lambda: _shares(client, round, state, asked),
        "open": lambda: _open(client, round, state, asked),
    }
    if asked["phase"] not in answers:
        raise ValueError(f"phase={asked['phase']!r} is not one of {', '.join(answers)}")
    return RecordDict({SECURE: ConfigRecord({"client": client, **answers[asked["phase"]]()})})


def hide(client: int, content: RecordDict, state: RecordDict, reply: RecordDict) -> RecordDict:
    """``reply`` with the masked, weighted update instead of the model.

    Raises ``ValueError`` if fewer clients than the threshold have shared: a server could open their masks.
    """
    asked: dict[str, Any] = dict(content.config_records[SECURE])
    own, kept = _kept(client, str(records.read_assignment(content).round), state)
    if "present" in kept:
        raise ValueError(f"client {client} has sent its update of round {own.round}: two under one mask reveal data")
    present, threshold = list(asked["clients"]), int(kept["threshold"])
    if len(present) < threshold or client not in present or not set(present) <= set(kept["clients"]):
        raise ValueError(f"{len(present)} clients have shared, threshold={threshold}: nothing is sent")
    records.check_arrays(reply, content.array_records[records.ARRAYS])  # nobody can check an array inside a sum
    before, after = (flat(record.array_records[records.ARRAYS]) for record in (content, reply))
    size: Any = reply.metric_records[records.METRICS][records.NUM_EXAMPLES]
    weight = float(size)
    encoded = encode(after - before, weight, fraction_bits(asked["total_examples"]))
    masked = mask(own, _roster(kept), present, encoded)
    _keep(state, {**kept, "present": present, "sealed": list(asked["sealed"])})
    return RecordDict({**reply, records.ARRAYS: ArrayRecord({MASKED: compat.Array(masked)})})


def flat(arrays: ArrayRecord) -> np.ndarray[Any, np.dtype[np.float64]]:
    """All arrays as one vector; raises ``ValueError`` for integers, which have no mean."""
    views = [compat.view(array) for array in arrays.values()]
    if wrong := [name for name, view in zip(arrays, views, strict=True) if view.dtype.kind != "f"]:
        raise ValueError(f"secure aggregation needs floating point parameters, and {wrong[0]} is not")
    return np.concatenate([view.ravel().astype(np.float64) for view in views])


def _keys(client: int, round: str, state: RecordDict, num_examples: int) -> dict[str, Any]:
    own = Secrets.new(client, round)
    _keep(state, {"round": round, "seal_key": own.seal_key, "mask_key": own.mask_key, "seed": own.seed})
    return {"seal": own.public.seal, "mask": own.public.mask, "num_examples": num_examples}


def _shares(client: int, round: str, state: RecordDict, asked: dict[str, Any]) -> dict[str, Any]:
    own, kept = _kept(client, round, state)
    if "threshold" in kept:
        raise ValueError(f"client {client} has shared its secrets of round {round} already")
    sealed = share(own, _roster(asked), asked["threshold"])
    _keep(state, {**kept, **{key: asked[key] for key in ("threshold", "clients", "seal", "mask")}})
    return {"holders": list(sealed), "sealed": list(sealed.values())}


def _open(client: int, round: str, state: RecordDict, asked: dict[str, Any]) -> dict[str, Any]:
    own, kept = _kept(client, round, state)
    if "present" not in kept:
        raise ValueError(f"client {client} has sent nothing in round {round}")
    del state[SECRETS]
    sealed = dict(zip(kept["present"], kept["sealed"], strict=True))
    opened = open_shares(own, _roster(kept), sealed, asked["arrived"], kept["threshold"])
    return {"owners": list(opened), "opened": list(opened.values())}


def _keep(state: RecordDict, values: dict[str, Any]) -> None:
    """Store bytes as text, because ``torch.load`` with ``weights_only`` accepts no bytes."""
    text = {key: [v.hex() for v in values[key]] for key in LISTS if key in values}
    text |= {key: values[key].hex() for key in KEYS}
    state[SECRETS] = ConfigRecord({**values, **text})


def _kept(client: int, round: str, state: RecordDict) -> tuple[Secrets, dict[str, Any]]:
    kept: dict[str, Any] = dict(state.config_records.get(SECRETS, ConfigRecord()))
    if kept.get("round") != round:
        raise ValueError(f"client {client} has no secrets of round {round}: it was restarted, or has replied already")
    kept |= {key: [bytes.fromhex(v) for v in kept[key]] for key in LISTS if key in kept}
    kept |= {key: bytes.fromhex(kept[key]) for key in KEYS}
    return Secrets(round=round, client=client, **{key: kept[key] for key in KEYS}), kept


def _roster(values: dict[str, Any]) -> dict[int, PublicKeys]:
    triples = zip(values["clients"], values["seal"], values["mask"], strict=True)
    return {client: PublicKeys(seal=seal, mask=mask) for client, seal, mask in triples}
