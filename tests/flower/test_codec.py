"""Updates on the wire: what each codec keeps, what it costs, and that a lie about it is a dropped client."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fed_dpsat.accounting.event import PrivacyEvent
from fed_dpsat.client.assignment import Assignment
from fed_dpsat.client.build import Experiment
from fed_dpsat.flower.judge import Failure, judge
from fed_dpsat.flower.wire import codec, records
from fed_dpsat.params import cut, laid_end_to_end, trainable
from fed_dpsat.run.folder import RunFolder
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.simulation import simulate
from fed_dpsat.step.subspace import Coordinates, Span, direction

pytestmark = pytest.mark.usefixtures("untried")  # the trial has tests of its own: tests/client/test_trial.py

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
    found = torch.stack([there_and_back("random-k", 0.25, round)[1] for round in range(1, 501)])
    spread = EXACT.abs() * (4 - 1) ** 0.5 / 500**0.5
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
    assert summary["bytes_per_client"] == {"down": 2600, "up": up}
    assert summary["update_codec"] == name
    again = simulate(dataclasses.replace(config), tmp_path / "again")
    assert again["test_loss"] == summary["test_loss"]


FREEZE = RunConfig(
    noise_multiplier=2.0,
    num_clients=3,
    num_rounds=4,
    delta=1e-4,
    optimizer="random-freeze",
    local_steps=2,
    momentum=0.5,
)
MASKED = Coordinates(seed=0, round=1, frozen=70)
"""Of 100 coordinates, 30 are active."""


def flat(params):
    return laid_end_to_end(params)


@pytest.mark.parametrize(
    ("name", "size", "error"),
    [("fp32", 4 * 30, 0), ("bf16", 2 * 30, 2**-8), ("top-k", 8 * 3, 1), ("random-k", 4 * 3, 9)],
)
def test_of_a_masked_round_active_coordinates_travel_and_the_rest_stays(name, size, error):
    """The values of active ones, to the bit under fp32; the others keep their bits."""
    active, before = MASKED.active(100), flat(START)
    after = flat(records.to_read(content().array_records[records.ARRAYS]))
    sent = codec.encode(content(), START, name, 0.1, MASKED)
    assert codec.num_bytes(sent) == size
    full = codec.decode(sent, LIKE, MASKED)
    records.check_arrays(full, LIKE)
    got = flat(records.to_read(full.array_records[records.ARRAYS]))
    assert torch.equal(got[~active], before[~active])
    if name == "fp32":
        assert torch.equal(got[active], after[active])
    assert bool(((got - after)[active].abs() <= error * (after - before)[active].abs() + 1e-5).all())


def test_a_round_in_a_span_travels_as_one_number_a_step():
    within = Span(seed=1, first=6, steps=2)
    end = flat(START) + 0.25 * direction(1, 6, 100) - 0.5 * direction(1, 7, 100)
    reply = RecordDict({**content(), records.ARRAYS: records.to_arrays(cut(end, START))})
    sent = codec.encode(reply, START, "fp32", 0.1, within)
    assert codec.num_bytes(sent) == 8
    assert sent.array_records[records.ARRAYS]["values"].numpy().tolist() == pytest.approx([0.25, -0.5], rel=1e-5)
    got = flat(records.to_read(codec.decode(sent, LIKE, within).array_records[records.ARRAYS]))
    torch.testing.assert_close(got, end, rtol=1e-6, atol=1e-5)


def a_reply(experiment, params, within, forge=lambda content: content):
    """What ``judge`` makes of client 0's reply to round 2, and the model in it."""
    assignment = Assignment(round=2, event=PrivacyEvent(noise_multiplier=2.0, sample_rate=0.5, steps=2))
    reply = records.reply_content(0, assignment, experiment.client_round(0, assignment, params, None), 100)
    sent = forge(codec.encode(reply, params, "fp32", 0.1, within))

    class Reply:
        def __init__(self):
            self.content = sent

        def has_error(self):
            return False

    message = Reply()
    asked = RecordDict(
        {
            records.ARRAYS: records.to_arrays(params),
            records.ASSIGNMENT: records.assignment_record(assignment),
            records.SUBSPACE: records.subspace_record(experiment.subspace(2)),
        }
    )
    verdict = judge(message, asked, 0, release_counts=False)
    return verdict, message.content


@pytest.fixture(scope="module")
def freezing():
    experiment = Experiment.build(FREEZE)
    return experiment, trainable(experiment.loss_fn.module)


def test_a_reply_cannot_bring_frozen_coordinates_back_changed(freezing):
    """A client that writes by a mask of its own: what it says lands on the active coordinates of the server's mask."""
    experiment, params = freezing
    right = experiment.subspace(2)
    frozen, before = ~right.active(650), flat(params)
    other = Coordinates(seed=right.seed, round=3, frozen=right.frozen)
    for within in (right, other):
        verdict, full = a_reply(experiment, params, within)
        assert not isinstance(verdict, Failure)
        got = flat(records.to_read(full.array_records[records.ARRAYS]))
        assert torch.equal(got[frozen], before[frozen])
        assert not torch.equal(got[~frozen], before[~frozen])


def test_whole_models_and_other_sizes_are_refused_in_a_masked_round(freezing):
    experiment, params = freezing
    right = experiment.subspace(2)
    verdict, _ = a_reply(experiment, params, None)
    assert "a whole model, where the round is within a subspace" in verdict.reason
    verdict, _ = a_reply(experiment, params, Coordinates(seed=0, round=2, frozen=right.frozen - 1))
    assert "values is float32" in verdict.reason


def test_an_optimizer_that_moves_what_it_says_is_frozen_is_told(freezing):
    experiment, params = freezing

    class Drifts(type(experiment.optimizer)):
        def update(self, params, private_gradient, state, info):
            moved, state = super().update(params, private_gradient, state, info)
            return {name: p + 1e-3 for name, p in moved.items()}, state

    drifting = Drifts(**vars(experiment.optimizer))
    assignment = Assignment(round=2, event=PrivacyEvent(noise_multiplier=2.0, sample_rate=0.5, steps=2))
    with pytest.raises(RuntimeError, match="coordinates moved that the optimizer says are frozen in round 2"):
        dataclasses.replace(experiment, optimizer=drifting).client_round(0, assignment, params, None)


@pytest.mark.by_default("fedavg-random-freeze")
@pytest.mark.parametrize("optimizer", ["random-freeze", "dp-sat"])
@pytest.mark.parametrize("strategy", ["fedavg", "flwr.serverapp.strategy:FedMedian"])
def test_a_run_is_the_same_to_the_bit_whether_frozen_coordinates_travel_or_not(
    tmp_path, monkeypatch, optimizer, strategy
):
    """Rates of 0, 0.35, 0.7 and 0.7 of 650 coordinates: bytes are those of what is active. DP-SAT climbs over it."""
    config = dataclasses.replace(FREEZE, strategy=strategy)
    given = None
    if optimizer == "dp-sat":
        from fed_dpsat.step.optimizers import DPSAT

        given = DPSAT(base=Experiment.build(config).optimizer, rho=0.05)
    sparse = simulate(config, tmp_path / "sparse", optimizer=given)
    monkeypatch.setattr(Experiment, "subspace", lambda self, round: None)
    whole = simulate(config, tmp_path / "whole", optimizer=given)
    active = [650, 650 - 227, 650 - 455, 650 - 455]
    assert sparse["bytes_per_round"]["up"] == 3 * 4 * sum(active) / 4
    assert whole["bytes_per_round"]["up"] == 3 * 4 * 650
    one, other = (RunFolder(tmp_path / name, resume=True).load_checkpoint().params for name in ("sparse", "whole"))
    assert torch.equal(flat(one), flat(other))


@pytest.mark.by_default("1")
@pytest.mark.parametrize("directions", [1, 3])
def test_zeroth_order_rounds_send_one_number_a_step_and_direction(tmp_path, monkeypatch, directions):
    """8 bytes for two steps, of 2600 for the model; the model is that of whole messages, up to rounding."""
    arguments = f"directions = {directions}"
    config = dataclasses.replace(FREEZE, optimizer="zeroth-order", optimizer_args=arguments, momentum=0.0, lr=0.01)
    sparse = simulate(config, tmp_path / "sparse")
    assert sparse["bytes_per_round"]["up"] == 3 * 8 * directions
    monkeypatch.setattr(Experiment, "subspace", lambda self, round: None)
    assert simulate(config, tmp_path / "whole")["bytes_per_round"]["up"] == 3 * 2600
    one, other = (RunFolder(tmp_path / name, resume=True).load_checkpoint().params for name in ("sparse", "whole"))
    torch.testing.assert_close(flat(one), flat(other), rtol=1e-4, atol=1e-5)
    assert not torch.equal(flat(one), flat(trainable(Experiment.build(config).loss_fn.module)))


def test_a_subspace_of_other_steps_than_the_task_is_refused():
    assignment = records.assignment_record(
        Assignment(round=1, event=PrivacyEvent(noise_multiplier=1.0, sample_rate=0.1, steps=2))
    )
    asked = RecordDict(
        {records.ASSIGNMENT: assignment, records.SUBSPACE: records.subspace_record(Span(seed=0, first=0, steps=99))}
    )
    with pytest.raises(records.RecordError, match="99 steps, and 2 in"):
        records.read_within(asked)
    asked[records.SUBSPACE] = ConfigRecord({"kind": "line"})
    with pytest.raises(records.RecordError, match="describes no subspace"):
        records.read_within(asked)


def test_whole_models_travel_where_a_subspace_would_not_do(freezing):
    """Masks of secure aggregation need every coordinate."""
    experiment, _ = freezing
    assert experiment.subspace(4) == Coordinates(seed=0, round=4, frozen=455)
    assert experiment.subspace(1) is None
    secure = dataclasses.replace(experiment, config=dataclasses.replace(FREEZE, secure_aggregation=True))
    assert secure.subspace(4) is None


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["random-freeze", "zeroth-order"])
def test_workers_read_and_add_up_the_same_bits(tmp_path, optimizer):
    config = dataclasses.replace(FREEZE, optimizer=optimizer, momentum=0.0)
    here = simulate(config, tmp_path / "0")
    there = simulate(dataclasses.replace(config, workers=2), tmp_path / "2")
    assert here["bytes_per_round"] == there["bytes_per_round"]
    one, other = (RunFolder(tmp_path / name, resume=True).load_checkpoint().params for name in ("0", "2"))
    assert torch.equal(flat(one), flat(other))
