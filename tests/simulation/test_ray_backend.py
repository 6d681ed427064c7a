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

NODES = 6


def app_that_dies(folder: Path) -> ClientApp:
    """Partition 1 kills its worker once for each file ``death-*``; every partition counts its rounds.

    Each says whether it was alone at work in its process, and takes its time there if the file ``slow`` is there;
    partition 2 raises an error.
    """
    app, at_work = ClientApp(), []

    @app.train()
    def train(message: Message, context: Context) -> Message:
        partition = int(context.node_config["partition-id"])
        if partition == 1:
            for death in sorted(folder.glob("death-*"))[:1]:
                death.unlink()
                os.kill(os.getpid(), signal.SIGKILL)
        if partition == 2:
            raise ValueError("not today")
        at_work.append(message)
        time.sleep(0.05 if (folder / "slow").exists() else 0)
        alone = len(at_work) == 1
        at_work.remove(message)
        state = records.load_state(context.state) or {"seen": {"times": torch.tensor(0)}}
        seen = int(state["seen"]["times"]) + 1
        records.save_state(context.state, {"seen": {"times": torch.tensor(seen)}})
        total = float(message.content["arrays"]["w"].numpy().sum())
        said = ConfigRecord({"seen": seen, "total": total, "alone": alone})
        return Message(RecordDict({"said": said}), reply_to=message)

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


class Backends:
    """One backend at a time, for the cluster has two CPUs: one that tests share, or one of a test's own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.backend, self.is_shared = folder, None, False

    def shared(self) -> ray_backend.RayBackend:
        """With two workers, and whatever states earlier tests left."""
        if not self.is_shared:
            self.start()
            self.is_shared = True
        return self.backend

    def start(self, deaths: int = 0, workers: int = 2) -> ray_backend.RayBackend:
        self.close()
        compat.identify_process()
        self.die(deaths)
        self.backend = ray_backend.RayBackend(app_that_dies(self.folder), {}, NODES, workers)
        return self.backend

    def die(self, times: int) -> None:
        for path in self.folder.glob("death-*"):
            path.unlink()
        for number in range(times):
            (self.folder / f"death-{number}").touch()

    def close(self) -> None:
        if self.backend:
            self.backend.close()
        self.backend, self.is_shared = None, False


@pytest.fixture(scope="module")
def backends(ray_cluster, tmp_path_factory):
    made = Backends(tmp_path_factory.mktemp("deaths"))
    yield made
    made.close()


@pytest.fixture
def shared(backends):
    return backends.shared()


@pytest.fixture
def start(backends):
    """A backend of the test's own, closed after it."""
    yield backends.start
    backends.close()


ARRAYS = records.to_arrays({"w": torch.arange(4.0)})
GOOD = [n for n in range(NODES) if n != 2]


def seen(replies):
    """How often each client has been asked, of those that replied."""
    return {n: r.content["said"]["seen"] for n, r in replies.items() if r.has_content()}


def test_replies_come_with_the_shared_model_and_kept_state(shared):
    before, after = ask(shared, NODES, ARRAYS), ask(shared, NODES, ARRAYS)
    assert list(seen(before)) == list(seen(after)) == GOOD
    assert all(seen(after)[n] == seen(before)[n] + 1 for n in GOOD)
    assert {after[n].content["said"]["total"] for n in GOOD} == {6.0}
    assert "not today" in after[2].error.reason


def test_a_worker_that_has_two_calls_does_one_at_a_time(shared, backends):
    (backends.folder / "slow").touch()
    for _ in range(3):  # what was quick has its successor wait at the worker
        replies = ask(shared, NODES, ARRAYS)
        assert [replies[n].content["said"]["alone"] for n in GOOD] == [True] * len(GOOD)
    (backends.folder / "slow").unlink()


def test_the_model_is_stored_once_a_round(shared, monkeypatch):
    stored = []
    put = ray_worker.ray.put
    monkeypatch.setattr(ray_worker.ray, "put", lambda value: stored.append(value) or put(value))
    ask(shared, NODES, ARRAYS)
    assert len(stored) == 1


def test_a_worker_killed_once_costs_a_retry(shared, backends):
    before = seen(ask(shared, NODES, ARRAYS))
    backends.die(1)
    killed, after = seen(ask(shared, NODES, ARRAYS)), seen(ask(shared, NODES, ARRAYS))
    assert not list(backends.folder.glob("death-*"))
    assert killed == {n: before[n] + 1 for n in GOOD}
    assert after == {n: before[n] + 2 for n in GOOD}


@pytest.mark.slow
def test_a_client_that_kills_every_worker_is_an_error_and_the_rest_goes_on(start):
    backend = start(deaths=3)
    replies = ask(backend, NODES, ARRAYS)
    assert "its worker died, 3 times" in replies[1].error.reason
    assert list(seen(replies)) == [n for n in GOOD if n != 1]
    assert seen(ask(backend, NODES, ARRAYS))[1] == 1


@pytest.mark.slow
def test_one_worker_is_enough(start):
    assert list(seen(ask(start(deaths=1, workers=1), NODES, ARRAYS))) == GOOD


@pytest.mark.slow
def test_a_ray_that_was_there_before_is_left_running(start):
    start().close()
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
