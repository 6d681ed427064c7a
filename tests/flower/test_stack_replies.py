"""Replies of a stack: judged as single ones, and added up to the bits of the tree of single ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import Message, MessageType, RecordDict

from fed_dpsat.accounting.event import PrivacyEvent
from fed_dpsat.client.assignment import Assignment
from fed_dpsat.flower.judge import Failure, judge, judge_stack
from fed_dpsat.flower.sums import Part, Tree, part_of, stack_parts
from fed_dpsat.flower.wire import compat, records
from fed_dpsat.flower.wire.records import RecordError
from fed_dpsat.step.loop import LocalResult

EVENT = PrivacyEvent(noise_multiplier=1.0, sample_rate=0.1, steps=2)
ASSIGNMENT = Assignment(event=EVENT, round=3, attempt=1)
EDGE = float(np.float32(records.MOST))


@pytest.fixture(autouse=True, scope="module")
def identified():
    compat.identify_process()


def content(like):
    return RecordDict(
        {records.ARRAYS: records.to_arrays(like), records.ASSIGNMENT: records.assignment_record(ASSIGNMENT)}
    )


def stack(count, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = {"w": torch.randn(count, 3, 5, generator=generator), "b": torch.randn(count, generator=generator)}
    return {name: (100 * p).to(dtype) for name, p in made.items()}


def replies(params, asked, sizes):
    """By the way of single clients."""
    made = []
    for client, size in enumerate(sizes):
        own = {name: p[client].clone() for name, p in params.items()}
        result = LocalResult(params=own, state={}, event=EVENT, nonfinite_examples=0)
        message = Message(asked, dst_node_id=client + 1, message_type=MessageType.TRAIN)
        made.append(Message(records.reply_content(client, ASSIGNMENT, result, size), reply_to=message))
    return made


def both(params, asked, sizes):
    """The verdicts of the stack and of single replies."""
    metrics = [{records.NUM_EXAMPLES: size} for size in sizes]
    single = [
        judge(reply, asked, client, release_counts=False) for client, reply in enumerate(replies(params, asked, sizes))
    ]
    return judge_stack(params, asked, list(range(len(sizes))), metrics), single


BAD = [float("nan"), float("inf"), -float("inf"), 2e14, -2e14, EDGE, 1e14, -1e14, 9e13]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("name", ["w", "b"])
@pytest.mark.parametrize("bad", BAD)
def test_verdicts_are_those_on_single_replies(dtype, name, bad):
    """The refused client is named by its verdict, and no other is refused; also at the last number that is accepted."""
    params = stack(4, dtype)
    params[name].view(4, -1)[2, -1] = bad
    asked = content({n: p[0] for n, p in stack(4, dtype).items()})
    stacked, single = both(params, asked, [5, 9, 5, 1])
    assert stacked == single
    assert not any(isinstance(verdict, Failure) for k, verdict in enumerate(stacked) if k != 2)


def test_a_number_just_below_and_just_above_the_bound():
    inside, outside = (np.nextafter(np.float32(records.MOST), np.float32(to)) for to in (0, np.inf))
    params = stack(2)
    params["b"][0], params["b"][1] = float(inside), float(outside)
    stacked, single = both(params, content({n: p[0] for n, p in params.items()}), [1, 1])
    assert stacked == single
    assert [isinstance(verdict, Failure) for verdict in stacked] == [False, True]


def changed(params, how):
    return {
        "name": {"v": params["w"], "b": params["b"]},
        "order": dict(reversed(params.items())),
        "missing": {"w": params["w"]},
        "more": {**params, "c": params["b"]},
        "shape": {**params, "w": params["w"].transpose(1, 2)},
        "type": {**params, "b": params["b"].double()},
    }[how]


@pytest.mark.parametrize("how", ["name", "order", "missing", "more", "shape", "type"])
def test_another_model_is_refused(how):
    params = stack(4)
    with pytest.raises(RecordError, match="other parameters"):
        judge_stack(changed(params, how), content({n: p[0] for n, p in params.items()}), range(4), [{}] * 4)


def test_a_question_without_a_model_is_refused():
    with pytest.raises(RecordError, match="to train from"):
        judge_stack(stack(2), RecordDict(), range(2), [{}] * 2)


def total(parts, start, before=()):
    tree = Tree()
    for part in (*before, *parts):
        tree.add(part)
    assert tree._end == start + sum(part.size for part in parts)
    return tree.total()


def earlier(start, dtype):
    """Parts at the positions before ``start``."""
    params = stack(max(start, 1), dtype, seed=9)
    return [
        Part(accepted={100 + k: {records.NUM_EXAMPLES: 5}}, total={n: p[k] for n, p in params.items()}, scale=5)
        for k in range(start)
    ]


SIZES = {"equal": lambda k: 7, "unequal": lambda k: 1 + k % 3}


@pytest.mark.parametrize("refused", [(), (1,), (0, 2)], ids=["valid", "one refused", "two refused"])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("start", [0, 2, 3, 4, 8])
@pytest.mark.parametrize("count", [2, 3, 4, 8])
def test_parts_have_the_bits_of_the_tree(count, start, sizes, refused, same_bits):
    for dtype in (torch.float32, torch.float64, torch.float16):
        params = stack(count, dtype)
        for client in set(refused) & set(range(count)):
            params["w"][client, 0, 0] = float("nan")
        asked = content({n: p[0] for n, p in params.items()})
        weights = [SIZES[sizes](k) for k in range(count)]
        stacked, single = both(params, asked, weights)
        kept = {name: p.clone() for name, p in params.items()}
        found = total(stack_parts(params, list(range(count)), stacked, start), start, earlier(start, dtype))
        alone = [
            part_of(client, reply, verdict)
            for client, (reply, verdict) in enumerate(zip(replies(params, asked, weights), single, strict=True))
        ]
        expected = total(alone, start, earlier(start, dtype))
        assert (found.size, found.accepted, found.failed) == (expected.size, expected.accepted, expected.failed)
        assert found.failed.keys() == set(refused) & set(range(count))
        assert (found.weight, found.scale) == (expected.weight, expected.scale)
        mean, other = found.mean(), expected.mean()
        assert (mean is None) == (other is None)
        assert mean is None or same_bits(mean, other)
        assert same_bits(params, kept)


@pytest.mark.parametrize("start", [0, 4, 8])
def test_an_aligned_stack_is_one_node(start):
    params = stack(4)
    (node,) = stack_parts(params, [3, 1, 2, 9], [{records.NUM_EXAMPLES: 7}] * 4, start)
    assert (node.size, list(node.accepted), node.weight, node.scale) == (4, [3, 1, 2, 9], 28, 7)
    assert node.total["w"].data_ptr() != params["w"].data_ptr()
