"""Nothing hangs: a wrong address, an empty pool, a full store and late clients each end in words."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
import warnings
from concurrent import futures

import grpc
import pytest
import ray
import torch
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from ray.exceptions import ObjectStoreFullError, OutOfMemoryError, RayError

from fed_dpsat.errors import RunError, SettingError
from fed_dpsat.flower.wire import compat, records
from fed_dpsat.simulation import cluster, ray_backend, ray_pool, ray_worker
from fed_dpsat.step.gradients import compiled


@pytest.fixture
def no_ray(monkeypatch):
    """As if no Ray ran yet: the session's is not touched."""
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.mark.parametrize("address", ["the cluster", "127.0.0.1:port", ":6379", "ray://127.0.0.1:10001", "host:"])
def test_an_address_of_another_form_is_refused(no_ray, address):
    with pytest.raises(SettingError, match=r"is not 'auto' or host:port; `ray status`"):
        cluster.connect(address, 1)


def test_an_address_where_nothing_is_ends_at_once(no_ray, monkeypatch):
    nowhere = f"127.0.0.1:{free_port()}"
    with pytest.raises(RunError, match=r"nothing responds there.*ray start --head"):
        cluster.connect(nowhere, 1)
    with pytest.raises(RunError, match="nothing responds there"):
        cluster.connect("127.0.0.1:99999", 1)
    monkeypatch.setenv("RAY_ADDRESS", nowhere)
    with pytest.raises(RunError, match=rf":{nowhere.split(':')[1]}': nothing responds there"):
        cluster.connect("auto", 1)


def test_an_address_of_something_else_ends_before_ray_tries_for_minutes(no_ray, monkeypatch):
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 0.5)
    monkeypatch.setattr(cluster.ray, "init", lambda **_: pytest.fail("Ray would try for minutes"))
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(RunError, match=r"there is not a Ray cluster \(DEADLINE_EXCEEDED\); `ray status`"):
            cluster.connect(f"127.0.0.1:{silent.getsockname()[1]}", 1)
    other = grpc.server(futures.ThreadPoolExecutor(1))
    port = other.add_insecure_port("127.0.0.1:0")
    other.start()
    with pytest.raises(RunError, match="not a Ray cluster"):
        cluster.connect(f"127.0.0.1:{port}", 1)
    other.stop(0)


def test_a_ray_that_does_not_let_us_in_is_one_line(no_ray, monkeypatch):
    def init(**_):
        raise RuntimeError("versions differ:\n  2.55 and\n  2.56")

    monkeypatch.setattr(cluster, "_check_reachable", lambda address: None)
    monkeypatch.setattr(cluster.ray, "init", init)
    with pytest.raises(RunError, match=r"no Ray cluster to join \(versions differ: 2.55 and 2.56\)"):
        cluster.connect("127.0.0.1:6379", 1)


def test_joining_says_nothing_of_its_own(no_ray, monkeypatch, recwarn):
    monkeypatch.setattr(cluster, "_check_reachable", lambda address: None)
    monkeypatch.setattr(cluster.ray, "init", lambda **_: warnings.warn("in future versions of Ray", FutureWarning, 2))
    cluster.connect("127.0.0.1:6379", 1)
    assert not recwarn.list


def test_without_an_address_nobody_elses_cluster_is_joined(no_ray, monkeypatch):
    seen = []
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    monkeypatch.setattr(cluster.ray, "init", lambda *address, **_: seen.extend(address))
    cluster.connect("", 1)
    assert seen == ["local"]


@pytest.mark.slow
def test_a_cluster_that_is_there_is_found_reachable(ray_cluster):
    cluster._check_reachable(ray.get_runtime_context().gcs_address)


def test_what_ray_says_of_memory_is_one_line_with_a_remedy():
    with (
        pytest.raises(RunError, match=r"memory ran out; lower workers .*\(1 worker was killed\)$"),
        cluster.explained(),
    ):
        raise OutOfMemoryError("1 worker was killed\nand much more")
    with pytest.raises(RunError, match=r"^Ray failed: a page of words$"), cluster.explained():
        raise RayError("a page\n  of words")


def app(folder):
    """Clients say who answered; client 3 hangs if the folder holds ``hang``, all die if it holds ``die``."""
    made = ClientApp()

    @made.train()
    def train(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        (folder / f"pid-{os.getpid()}").touch()
        if (folder / "die").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        if client == 3 and (folder / "hang").exists():
            time.sleep(3600)
        time.sleep(0.05)
        return Message(RecordDict({"said": ConfigRecord({"client": client})}), reply_to=message)

    return made


def messages(count):
    compat.identify_process()
    content = RecordDict({records.ARRAYS: records.to_arrays({})})
    made = [Message(content, node, MessageType.TRAIN) for node in range(2, count + 2)]
    for number, message in enumerate(made):
        compat.set_message_id(message, str(number))
    return made


def ask(backend, count, timeout=None):
    answers = backend.run(messages(count), release_counts=None, timeout=timeout)
    return [reply for each in answers for reply in each.replies]


@pytest.fixture
def start(ray_cluster, tmp_path):
    backends = []

    def make(**settings):
        backends.append(ray_backend.RayBackend(app(tmp_path), {}, 300, 2, **settings))
        return backends[-1]

    yield make
    for backend in backends:
        backend.close()


def said(replies):
    return [r.content["said"]["client"] if r.has_content() else r.error.reason for r in replies]


@pytest.mark.slow
def test_workers_killed_again_and_again_cost_their_clients_a_retry_and_nothing_else(start, tmp_path):
    backend = start()
    stop = threading.Event()
    killed = []

    def kill():
        while not stop.is_set() and len(killed) < 4:
            for path in tmp_path.glob("pid-*"):
                pid = int(path.name.removeprefix("pid-"))
                path.unlink()
                time.sleep(0.3)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
            time.sleep(0.1)

    killer = threading.Thread(target=kill)
    killer.start()
    replies = ask(backend, 150)
    stop.set()
    killer.join()
    assert said(replies) == list(range(150))  # each once, in order
    assert len(killed) >= 2


@pytest.mark.slow
def test_workers_that_die_of_whatever_they_do_end_the_run(start, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_backend, "MORE_DEATHS", 0)  # each costs the start of a worker
    monkeypatch.setattr(ray_backend, "MAX_TRIES", 1)
    backend = start()
    (tmp_path / "die").touch()
    with pytest.raises(RunError, match=r"workers died 3 times without a result in between.*lower workers"):
        ask(backend, 200)


@pytest.mark.slow
def test_a_client_that_hangs_is_given_up_and_the_rest_is_there(start, tmp_path):
    (tmp_path / "hang").touch()
    replies = said(ask(start(client_timeout=1.0), 100))
    assert replies[3] == "no reply within client_timeout=1 s"
    assert replies[:3] + replies[4:] == [0, 1, 2, *range(4, 100)]


@pytest.mark.slow
def test_a_round_ends_after_its_time_whoever_hangs(start, tmp_path):
    (tmp_path / "hang").touch()
    backend = start()
    while not all(slot.up for slot in backend._pool.slots):
        backend._pool.look_after()
        time.sleep(0.1)
    replies = said(ask(backend, 5, timeout=3.0))
    assert replies == [0, 1, 2, "no reply within reply_timeout=3 s", 4]
    (tmp_path / "hang").unlink()
    assert said(ask(backend, 5, timeout=60.0)) == [0, 1, 2, 3, 4]


@pytest.mark.slow
def test_a_pool_that_gets_no_cpu_ends_in_words(start, monkeypatch):
    start()._pool._wait_for_one()  # holds both CPUs
    monkeypatch.setattr(ray_pool, "START_TIMEOUT", 2.0)
    with pytest.raises(RunError, match=r"no Ray worker within 2 s; 0 CPUs are free"):
        start()


@pytest.mark.slow
def test_workers_that_have_a_cpu_may_take_longer(start, monkeypatch):
    """The first seconds are for a CPU; what a worker imports takes more of them on a busy machine."""
    while ray_pool._free_cpus() < 2:  # of the pool before this one
        time.sleep(0.1)
    monkeypatch.setattr(ray_pool, "START_TIMEOUT", 1.5)
    assert said(ask(start(), 2, timeout=60.0)) == [0, 1]


def all_up(backend):
    deadline = time.monotonic() + 50
    while not all(slot.up for slot in backend._pool.slots) and time.monotonic() < deadline:
        backend._pool.look_after()
        time.sleep(0.1)
    return all(slot.up for slot in backend._pool.slots)


@pytest.mark.slow
def test_workers_start_a_few_at_a_time_and_work_begins_with_the_first(start, monkeypatch):
    monkeypatch.setattr(ray_pool, "AT_ONCE", 1)
    backend = start()
    slots = backend._pool.slots
    assert len(slots) == 1
    assert said(ask(backend, 5)) == [0, 1, 2, 3, 4]
    backend._pool.look_after()  # the first is up, or nobody had answered
    assert [slot.up for slot in slots] in ([True, False], [True, True])
    assert all_up(backend)
    backend._pool.look_after()
    assert len(slots) == 2


@pytest.mark.slow
def test_two_workers_share_a_card_and_a_third_one_that_gets_none_ends_in_words(start, monkeypatch, tmp_path):
    backend = start(gpus_per_worker=0.5)
    assert all_up(backend)
    assert ray.available_resources().get("GPU", 0) == 0
    monkeypatch.setattr(ray_pool, "START_TIMEOUT", 2.0)
    with pytest.raises(RunError, match=r"gpus_per_worker=0.5: no Ray worker within 2 s; 0 CPUs and 0 GPUs are"):
        start(gpus_per_worker=0.5)


@pytest.mark.slow
def test_half_a_card_is_not_enough_for_a_whole_one(start, monkeypatch):
    start(gpus_per_worker=0.5)
    monkeypatch.setattr(ray_pool, "START_TIMEOUT", 2.0)
    with pytest.raises(RunError, match=r"gpus_per_worker=1: .* GPUs are free: free some, lower gpus_per_worker or"):
        start(gpus_per_worker=1.0)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="it is about a host without a card")
def test_a_worker_where_torch_sees_no_card_ends_the_run_in_words(ray_cluster, tmp_path):
    with pytest.raises(RunError, match=r"^on .*: device='cuda' is not there: torch .* sees 0 cards"):
        ray_backend.RayBackend(app(tmp_path), {"device": "cuda"}, 4, 2, gpus_per_worker=0.5)


def test_a_worker_without_the_kernels_of_the_run_ends_it_in_words(monkeypatch, tmp_path):
    """It would compute other bits than its neighbours."""
    monkeypatch.setattr(compiled, "refusal", lambda: "no C compiler")
    here = ray_worker.Worker.__ray_metadata__.modified_class
    worker = here(app(tmp_path), {"kernels": "compiled"}, 4, tmp_path, None)
    with pytest.raises(RunError, match=r"^on .*: kernels='compiled' is not possible here: no C compiler"):
        worker.ready()


@pytest.mark.slow
def test_workers_that_all_die_and_do_not_start_again_end_the_run(start, monkeypatch, tmp_path):
    backend = start()
    monkeypatch.setattr(ray_pool, "START_TIMEOUT", 2.0)
    slots = backend._pool.slots
    blocker = ray.remote(num_cpus=2)(lambda: time.sleep(3600)).remote()
    for slot in slots:
        ray.kill(slot.actor)
    with pytest.raises(RunError, match="no Ray worker is left"):
        ask(backend, 4)
    ray.cancel(blocker, force=True)


@pytest.mark.slow
def test_a_full_object_store_ends_the_run_in_words(start, monkeypatch):
    backend = start()

    def full(value):
        raise ObjectStoreFullError("full")

    monkeypatch.setattr("fed_dpsat.simulation.ray_worker.ray.put", full)
    with pytest.raises(RunError, match=r"object store is full.*lower workers"):
        ask(backend, 2)


@pytest.mark.slow
def test_a_worker_that_does_not_see_the_states_ends_the_run(start, tmp_path):
    backend = start(state_folder=tmp_path / "state")
    for slot in backend._pool.slots:
        slot.up = False
    backend._pool.slots[0].ready = ray.put(("far-away", False))
    with pytest.raises(RunError, match="far-away does not see the states of clients"):
        ask(backend, 1)
