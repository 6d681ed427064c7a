"""The mean comes from a tree that depends on the number of clients alone: the same bits, whoever adds up what."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from flwr.app import Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedMedian, FedProx, FedYogi, Krum

from fed_dpsat.flower import compat, records, sums
from fed_dpsat.flower.replies import Failure


def reply(client, params, size):
    compat.identify_process()
    content = RecordDict(
        {records.ARRAYS: records.to_arrays(params), records.METRICS: MetricRecord({records.NUM_EXAMPLES: size})}
    )
    return Message(content, reply_to=Message(RecordDict(), client + 2, MessageType.TRAIN))


def singles(count, seed=0):
    draw = torch.Generator().manual_seed(seed)
    params = [{"w": torch.randn(50, generator=draw), "v": torch.randn(3, generator=draw)} for _ in range(count)]
    sizes = torch.randint(1, 1000, (count,), generator=draw).tolist()
    made = [reply(c, p, n) for c, (p, n) in enumerate(zip(params, sizes, strict=True))]
    return [sums.part_of(c, r, {records.NUM_EXAMPLES: n}) for c, (r, n) in enumerate(zip(made, sizes, strict=True))], (
        params,
        sizes,
    )


def tree(parts):
    return sums.merge(sums.merge(block) for block in sums.blocks(parts)).mean()


@pytest.mark.parametrize("count", [1, 2, 64, 65, 200])
def test_the_mean_is_the_one_of_float64(count):
    parts, (params, sizes) = singles(count)
    exact = sum(n * p["w"].double() for p, n in zip(params, sizes, strict=True)) / sum(sizes)
    np.testing.assert_allclose(tree(parts)["w"], exact, rtol=1e-5, atol=1e-6)


def test_blocks_may_travel_and_be_cut_and_the_bits_stay(same_bits):
    parts, _ = singles(200)
    expected = tree(parts)
    sent = [pickle.loads(pickle.dumps(sums.merge(block))) for block in sums.blocks(parts)]
    assert same_bits(sums.merge(sent).mean(), expected)
    cut = [sums.merge([pickle.loads(pickle.dumps(part)) for part in block]) for block in sums.blocks(parts)]
    assert same_bits(sums.merge(cut).mean(), expected)


def test_another_tree_would_show(same_bits):
    parts, _ = singles(200)
    assert not same_bits(sums.merge(parts).mean(), tree(parts))


def test_a_single_reply_is_the_mean_to_the_bit(same_bits):
    params = {"w": torch.tensor([0.1, 1e-30, 3.0]), "count": torch.tensor(7), "half": torch.tensor([0.1]).half()}
    lost = sums.Part(failed={1: Failure(reason="no reply")})
    part = sums.part_of(0, reply(0, params, 3), {records.NUM_EXAMPLES: 3})
    assert same_bits(sums.merge([lost, part, lost]).mean(), params)


def test_whole_numbers_and_half_precision_are_added_up_without_overflow():
    params = {"count": torch.tensor(2**40), "half": torch.full((2,), 60000.0).half()}
    parts = [sums.part_of(c, reply(c, params, 5), {records.NUM_EXAMPLES: 5}) for c in range(3)]
    mean = sums.merge(parts).mean()
    assert mean["count"] == 2**40
    assert torch.equal(mean["half"], torch.full((2,), 60000.0))


def test_what_is_added_up_is_not_changed(same_bits):
    parts, (params, _) = singles(3)
    before = [{n: t.clone() for n, t in p.items()} for p in params]
    tree(parts)
    assert all(same_bits(p, b) for p, b in zip(params, before, strict=True))


def test_failures_are_named_and_weigh_nothing():
    parts, _ = singles(2)
    merged = sums.merge([parts[0], sums.part_of(5, None, Failure(reason="NaN")), parts[1]])
    assert merged.failed == {5: Failure(reason="NaN")}
    assert merged.weight == parts[0].weight + parts[1].weight
    assert sums.merge([]).mean() is None


@pytest.mark.parametrize("count", [1, 7, 64, 65, 1000])
def test_blocks_are_few_and_hold_everybody_in_order(count):
    cut = [list(block) for block in sums.blocks(range(count))]
    assert [item for block in cut for item in block] == list(range(count))
    assert len(cut) == min(count, len(cut)) <= sums.MAX_BLOCKS


STOCK = [FedAvg, FedAvgM, FedAdagrad, FedAdam, FedYogi, lambda: FedProx(proximal_mu=0.1)]


@pytest.mark.parametrize("make", STOCK)
def test_stock_strategies_of_the_mean_say_the_same_of_it_as_of_the_replies(make):
    parts, (params, sizes) = singles(9)
    replies = [reply(c, p, n) for c, (p, n) in enumerate(zip(params, sizes, strict=True))]
    arrays = records.to_arrays(params[0])
    of_all, of_mean = make(), make()
    assert sums.only_mean(of_mean)
    for strategy in (of_all, of_mean):
        strategy.current_arrays = arrays if isinstance(strategy, FedAvgM) else {k: a.numpy() for k, a in arrays.items()}
    expected, _ = of_all.aggregate_train(1, replies)
    seen, _ = of_mean.aggregate_train(1, [reply(0, tree(parts), sum(sizes))])
    for name, array in expected.items():
        np.testing.assert_allclose(seen[name].numpy(), array.numpy(), rtol=1e-4, atol=1e-5)


def test_a_strategy_that_needs_each_reply_gets_each():
    class Mine(FedAvg):
        pass

    class Declared(FedAvg):
        only_mean = True

    assert not any(map(sums.only_mean, [Mine(), FedMedian(), Krum(), FedAvg(weighted_by_key="other")]))
    assert sums.only_mean(Declared())
