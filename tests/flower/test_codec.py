"""Updates on the wire: what each codec keeps, what it costs, and that a lie about it is a dropped client."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fed_dpsat.config import RunConfig
from fed_dpsat.flower import codec, records
from fed_dpsat.simulation import simulate

START = {"w": torch.arange(60.0).view(6, 10), "b": torch.full((40,), -3.0)}
CHANGE = {"w": torch.linspace(-1, 1, 60).view(6, 10), "b": torch.linspace(0.001, 0.01, 40)}
LIKE = records.to_arrays(START)


def content(round: int = 1) -> RecordDict:
    event = {"client": 3, "round": round, "attempt": 0, "noise_multiplier": 1.0, "sample_rate": 0.1, "steps": 1}
    return RecordDict(
        {
            records.ARRAYS: records.to_arrays({name: START[name] + CHANGE[name] for name in START}),
            records.EVENT: ConfigRecord({**event, "kind": "poisson_gaussian"}),
        }
    )


def there_and_back(name: str, share: float = 0.1, round: int = 1):
    sent = codec.encode(content(round), START, name, share)
    full = codec.decode(sent, LIKE)
    records.check_arrays(full, LIKE)
    got = records.to_read(full.array_records[records.ARRAYS])
    return codec.num_bytes(sent), torch.cat([(got[n] - START[n]).flatten() for n in START])


EXACT = torch.cat([CHANGE[n].flatten() for n in START])


def test_fp32_is_what_it_was():
    size, change = there_and_back("fp32")
    assert size == 400
    torch.testing.assert_close(change, EXACT, atol=1e-5, rtol=0)


def test_bf16_halves_the_bytes_and_rounds_the_change_not_the_weights():
    size, change = there_and_back("bf16")
    assert size == 200
    torch.testing.assert_close(change, EXACT, atol=1e-5, rtol=2**-8)


def test_top_k_keeps_the_largest_changes():
    size, change = there_and_back("top-k", 0.1)
    assert size == 10 * 8
    largest = EXACT.abs().topk(10).indices
    assert set(change.nonzero().flatten().tolist()) == set(largest.tolist())
    torch.testing.assert_close(change[largest], EXACT[largest], atol=1e-5, rtol=0)


def test_random_k_is_unbiased_and_takes_other_coordinates_each_round():
    size, _ = there_and_back("random-k", 0.1)
    assert size == 10 * 4
    found = torch.stack([there_and_back("random-k", 0.25, round)[1] for round in range(1, 2001)])
    spread = EXACT.abs() * (4 - 1) ** 0.5 / 2000**0.5
    assert bool(((found.mean(0) - EXACT).abs() < 5 * spread + 1e-5).all())
    assert (found[0] != found[1]).any()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({codec.UPDATE: ConfigRecord({"codec": "zip", "share": 0.1})}, "none of this version's"),
        ({codec.UPDATE: ConfigRecord({"codec": "top-k", "share": 2.0})}, "no codec and share"),
        ({codec.UPDATE: ConfigRecord({"codec": "top-k", "share": float("nan")})}, "no codec and share"),
        ({codec.UPDATE: ConfigRecord({"codec": "top-k"})}, "no codec and share"),
        ({codec.UPDATE: ConfigRecord({"codec": "bf16", "share": 0.1})}, "values is"),
        ({records.ARRAYS: ArrayRecord({"values": Array(np.zeros(10, dtype=np.float32))})}, "without indices"),
    ],
)
def test_a_lie_about_the_codec_is_told(change, says):
    sent = RecordDict({**codec.encode(content(), START, "top-k", 0.1), **change})
    with pytest.raises(records.RecordError, match=says):
        codec.decode(sent, LIKE)


def test_indices_out_of_bounds_are_told():
    sent = codec.encode(content(), START, "top-k", 0.1)
    arrays = sent.array_records[records.ARRAYS]
    arrays["indices"] = Array(np.full(10, 100, dtype=np.uint32))
    with pytest.raises(records.RecordError, match="index 100 of an update with 100 coordinates"):
        codec.decode(sent, LIKE)


@pytest.mark.parametrize(("name", "up"), [("fp32", 2600), ("bf16", 1300), ("top-k", 520), ("random-k", 260)])
def test_a_run_says_what_its_rounds_sent(tmp_path, name, up):
    config = RunConfig(noise_multiplier=2.0, num_clients=3, num_rounds=2, update_codec=name, delta=1e-4)
    summary = simulate(config, tmp_path / "run")
    assert summary["bytes_per_round"] == {"down": 3 * 2600, "up": 3 * up}
    assert summary["update_codec"] == name
    again = simulate(dataclasses.replace(config), tmp_path / "again")
    assert again["test_loss"] == summary["test_loss"]
