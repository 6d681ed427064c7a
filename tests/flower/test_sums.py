"""The mean comes from one tree, whoever adds up what: the same bits."""

from __future__ import annotations

import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch
from flwr.app import Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedMedian, FedProx, FedYogi, Krum

from fed_dpsat.flower import sums
from fed_dpsat.flower.judge import Failure
from fed_dpsat.flower.wire import compat, records


def reply(client, params, size):
    compat.identify_process()
    content = RecordDict(
        {records.ARRAYS: records.to_arrays(params), records.METRICS: MetricRecord({records.NUM_EXAMPLES: size})}
    )
    return Message(content, reply_to=Message(RecordDict(), client + 2, MessageType.TRAIN))


def singles(count, seed=0, alike=False):
    draw = torch.Generator().manual_seed(seed)
    params = [{"w": torch.randn(50, generator=draw), "v": torch.randn(3, generator=draw)} for _ in range(count)]
    sizes = [10] * count if alike else torch.randint(1, 1000, (count,), generator=draw).tolist()
    made = [reply(c, p, n) for c, (p, n) in enumerate(zip(params, sizes, strict=True))]
    return [sums.part_of(c, r, {records.NUM_EXAMPLES: n}) for c, (r, n) in enumerate(zip(made, sizes, strict=True))], (
        params,
        sizes,
    )


def sent(parts, cuts):
    """The parts as they come from processes that have runs of clients, which end at ``cuts``."""
    for start, end in pairwise([0, *cuts, len(parts)]):
        tree = sums.Tree(start)
        for part in parts[start:end]:
            tree.add(pickle.loads(pickle.dumps(part)))
        yield from pickle.loads(pickle.dumps(tree.nodes))


@pytest.mark.parametrize("count", [1, 2, 64, 65, 200])
def test_the_mean_is_the_one_of_float64(count):
    parts, (params, sizes) = singles(count)
    exact = sum(n * p["w"].double() for p, n in zip(params, sizes, strict=True)) / sum(sizes)
    np.testing.assert_allclose(sums.merge(parts).mean()["w"], exact, rtol=1e-5, atol=1e-6)


@pytest.mark.by_default("cuts[034]-*")
@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("cuts", [[64, 128, 192], [8, 12, 14], [3, 6, 9, 199], list(range(1, 200)), [50]])
def test_runs_of_clients_may_be_cut_anywhere_and_the_bits_stay(cuts, alike, same_bits):
    expected = sums.merge(singles(200, alike=alike)[0])
    merged = sums.merge(sent(singles(200, alike=alike)[0], cuts))
    assert same_bits(merged.mean(), expected.mean())
    assert (merged.accepted, merged.size) == (expected.accepted, 200)


def test_so_they_do_around_clients_that_fail(same_bits):
    def parts():
        made = singles(21)[0]
        for client in (0, 1, 6, 7, 20):
            made[client] = sums.Part(failed={client: Failure(reason="gone")})
        return made

    expected = sums.merge(parts())
    for cut in range(1, 21):
        merged = sums.merge(sent(parts(), [cut]))
        assert same_bits(merged.mean(), expected.mean())
        assert merged.failed == expected.failed


def test_one_after_the_other_would_show(same_bits):
    parts, (params, sizes) = singles(200)
    total = sum(n * p["w"] for p, n in zip(params, sizes, strict=True))
    assert not torch.equal(total / sum(sizes), sums.merge(parts).mean()["w"])


def test_a_run_of_a_node_is_one_sum():
    for start, count in [(0, 8), (8, 8), (24, 8), (6, 2)]:
        tree = sums.Tree(start)
        for part in singles(count)[0]:
            tree.add(part)
        assert [node.size for node in tree.nodes] == [count]


def test_few_sums_are_in_memory_however_many_clients_there_are():
    tree, held = sums.Tree(), []
    for part in singles(1000)[0]:
        tree.add(part)
        held.append(len(tree.nodes))
    assert max(held) == 9  # of 511 clients: one of each size below 512


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


@pytest.mark.parametrize("alike", [True, False])
def test_what_is_added_up_is_not_changed(alike, same_bits):
    parts, (params, _) = singles(7, alike=alike)
    before = [{n: t.clone() for n, t in p.items()} for p in params]
    sums.merge(parts).mean()
    assert all(same_bits(p, b) for p, b in zip(params, before, strict=True))


def test_a_move_is_bounded_whatever_was_judged_of_it():
    before, after = {"w": torch.ones(50), "v": torch.zeros(3)}, {"w": torch.full((50,), 2.0), "v": torch.ones(3)}
    verdict = {records.NUM_EXAMPLES: 1000}
    part = sums.part_of(0, reply(0, after, 1000), verdict, before=records.to_arrays(before), clip_norm=0.5)
    assert torch.cat(list(part.total.values())).norm() == pytest.approx(0.5, rel=1e-12)
    assert part.scale == 1.0


def test_failures_are_named_and_weigh_nothing():
    parts, _ = singles(2)
    merged = sums.merge([parts[0], sums.part_of(5, None, Failure(reason="NaN")), parts[1]])
    assert merged.failed == {5: Failure(reason="NaN")}
    assert merged.weight == parts[0].weight + parts[1].weight
    assert sums.merge([]).mean() is None


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
    seen, _ = of_mean.aggregate_train(1, [reply(0, sums.merge(parts).mean(), sum(sizes))])
    for name, array in expected.items():
        np.testing.assert_allclose(seen[name].numpy(), array.numpy(), rtol=1e-4, atol=1e-5)


def test_a_strategy_that_needs_each_reply_gets_each():
    class Mine(FedAvg):
        pass

    class Declared(FedAvg):
        only_mean = True

    assert not any(map(sums.only_mean, [Mine(), FedMedian(), Krum(), FedAvg(weighted_by_key="other")]))
    assert sums.only_mean(Declared())
