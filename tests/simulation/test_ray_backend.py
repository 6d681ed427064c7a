"""Workers may die and cost a client one retry; nothing else is lost, and nothing hangs."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp

from fed_dpsat.flower.grid import Answers
from fed_dpsat.flower.wire import compat, records
from fed_dpsat.simulation import ray_backend, ray_pool, ray_worker


def app_that_dies(folder: Path, times: int) -> ClientApp:
    """Partition 1 kills its worker the first ``times`` times; every partition counts its rounds."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        partition = int(context.node_config["partition-id"])
        marks = sorted(folder.glob("death-*"))
        if partition == 1 and len(marks) < times:
            (folder / f"death-{len(marks)}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if partition == 2:
            raise ValueError("not today")
        state = records.load_state(context.state) or {"seen": {"times": torch.tensor(0)}}
        seen = int(state["seen"]["times"]) + 1
        records.save_state(context.state, {"seen": {"times": torch.tensor(seen)}})
        total = float(message.content["arrays"]["w"].numpy().sum())
        return Message(RecordDict({"said": ConfigRecord({"seen": seen, "total": total})}), reply_to=message)

    return app


def app_that_sees_company() -> ClientApp:
    """Each client says whether it was alone at work in its process."""
    app, at_work = ClientApp(), []

    @app.train()
    def train(message: Message, context: Context) -> Message:
        at_work.append(message)
        time.sleep(0.05)
        alone = len(at_work) == 1
        at_work.remove(message)
        return Message(RecordDict({"said": ConfigRecord({"alone": alone})}), reply_to=message)

    return app


def ask(backend, num_nodes, arrays):
    content = RecordDict({"arrays": arrays})
    messages = []
    for node in range(2, num_nodes + 2):
        message = Message(content, node, MessageType.TRAIN)
        compat.set_message_id(message, str(node))
        messages.append(message)
    answers = backend.run(messages, release_counts=None, timeout=None)
    return {reply.metadata.src_node_id - 2: reply for each in answers for reply in each.replies}


@pytest.fixture
def start(ray_cluster, tmp_path):
    backends = []

    def make(times=0, workers=2, nodes=6, app=None):
        compat.identify_process()
        backends.append(ray_backend.RayBackend(app or app_that_dies(tmp_path, times), {}, nodes, workers))
        return backends[-1]

    yield make
    for backend in backends:
        backend.close()


ARRAYS = records.to_arrays({"w": torch.arange(4.0)})


def test_replies_come_with_the_shared_model_and_kept_state(start):
    backend = start(times=0)
    ask(backend, 6, ARRAYS)
    replies = ask(backend, 6, ARRAYS)
    good = {n: dict(r.content["said"]) for n, r in replies.items() if r.has_content()}
    assert good == {n: {"seen": 2, "total": 6.0} for n in (0, 1, 3, 4, 5)}
    assert "not today" in replies[2].error.reason


def test_a_worker_killed_once_costs_a_retry(start):
    backend = start(times=1)
    replies = ask(backend, 6, ARRAYS)
    assert replies[1].content["said"]["seen"] == 1
    replies = ask(backend, 6, ARRAYS)
    assert {n for n, r in replies.items() if r.has_content()} == {0, 1, 3, 4, 5}
    assert all(r.content["said"]["seen"] == 2 for r in replies.values() if r.has_content())


@pytest.mark.slow
def test_a_client_that_kills_every_worker_is_an_error_and_the_rest_goes_on(start):
    backend = start(times=3)
    replies = ask(backend, 6, ARRAYS)
    assert "its worker died, 3 times" in replies[1].error.reason
    assert {n for n, r in replies.items() if r.has_content()} == {0, 3, 4, 5}
    assert ask(backend, 6, ARRAYS)[1].content["said"]["seen"] == 1


def test_one_worker_is_enough(start):
    replies = ask(start(times=1, workers=1), 6, ARRAYS)
    assert {n for n, r in replies.items() if r.has_content()} == {0, 1, 3, 4, 5}


def test_a_worker_that_has_two_calls_does_one_at_a_time(start):
    replies = ask(start(workers=1, nodes=8, app=app_that_sees_company()), 8, ARRAYS)
    assert [reply.content["said"]["alone"] for reply in replies.values()] == [True] * 8


def test_the_model_is_stored_once_a_round(start, monkeypatch):
    backend = start(times=0)
    stored = []
    put = ray_worker.ray.put
    monkeypatch.setattr(ray_worker.ray, "put", lambda value: stored.append(value) or put(value))
    ask(backend, 6, ARRAYS)
    assert len(stored) == 1


@pytest.mark.slow
def test_a_ray_that_was_there_before_is_left_running(start):
    start(times=0).close()
    assert ray_backend.ray.is_initialized()


def test_what_failed_is_cut_into_stacks_and_those_into_clients():
    work = ray_pool.Work(10, list(range(5)), [{}] * 5)
    assert [(w.start, list(w.messages)) for w in work.cut(2)] == [(10, [0, 1]), (12, [2, 3]), (14, [4])]
    assert [(w.start, list(w.messages)) for w in work.cut(1)] == [(10 + i, [i]) for i in range(5)]
    assert [list(w.messages) for w in work.cut(2)[1].cut(2)] == [[2], [3]]


@pytest.mark.parametrize(
    ("count", "workers", "stack", "least", "most", "sizes"),
    [
        (12, 2, 1, 1.0, 99.0, [2, 2, 2, 1, 1, 1, 1, 1, 1]),
        (20, 1, 1, 1.0, 4.5, [4, 4, 4, 4, 2, 1, 1]),
        (1000, 2, 1, 100.0, 9999.0, [128] * 4 + [64] * 7 + [40]),
        (7, 64, 3, 0.1, 0.5, [3, 3, 1]),
        (100, 3, 8, 1.0, 99.0, [16, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 4]),
    ],
)
def test_shares_are_whole_stacks_and_become_small(count, workers, stack, least, most, sizes):
    cut = list(ray_backend.shares(count, workers, stack, least, most))
    assert [end - start for start, end in cut] == sizes
    assert [start for start, _ in cut] == [0, *[end for _, end in cut[:-1]]]
    assert all(start % stack == 0 for start, _ in cut)


def test_answers_are_given_in_order_and_few_wait_for_an_earlier_one():
    message = Message(RecordDict(), 2, MessageType.TRAIN)
    work = [ray_pool.Work(start, [message], [{}]) for start in range(6)]
    round = ray_backend._Round(work, summed=False, stack=1)
    late = round.pick(2)
    for _ in range(2):
        round.put(round.pick(2), Answers())
    assert round.pick(2) is None
    assert not list(round.finished())
    round.put_back([late])
    assert round.pick(2) is late
    round.put(late, Answers())
    assert len(list(round.finished())) == 3
    assert round.waiting == 3


def test_work_waits_at_a_slow_worker_only_where_there_is_plenty_for_the_others():
    slot = ray_pool.Slot(None, None, up=True)
    assert slot.has_room(plenty=False)
    slot.add("first", ray_pool.Work(0, ["a"], [{}]))
    assert not slot.has_room(plenty=False)
    assert slot.has_room(plenty=True)
    slot.add("second", ray_pool.Work(1, ["b"], [{}]))
    assert not slot.has_room(plenty=True)
    slot.pop()
    slot.late = True
    assert not slot.has_room(plenty=True)


def test_calls_are_entered_in_the_order_of_their_numbers():
    turn, entered, together = ray_worker.InTurn(), [], []

    def enter(number):
        with turn(number):
            entered.append(number)
            together.append(number)
            time.sleep(0.01)
            together.remove(number)
            assert not together
            if number == 1:
                raise ValueError("the others go on")

    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(enter, number) for number in (3, 2, 1, 0)]
    assert entered == [0, 1, 2, 3]
    assert [type(call.exception()) for call in calls] == [type(None), type(None), ValueError, type(None)]
