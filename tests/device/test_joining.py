"""A device waits for its server: for one that does not respond, and for the end of a connection that was killed."""

from __future__ import annotations

import subprocess

import httpx
import pytest

from fed_dpsat.device import joining
from fed_dpsat.device.joining import Refused, ServerError, alone, private_key, wait_until_admitted
from fed_dpsat.device.policy import PolicyError

NODE = 2**63 + 5


class Server:
    """A server with a clock: it replies with what ``answers`` has next, and notes what it was asked at which time."""

    def __init__(self, answers, known=True):
        self.answers, self.known, self.asked, self.seconds = list(answers), known, [], 0.0

    def admit(self):
        self.asked.append(("admit", self.seconds))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def sign_off(self, node):
        self.asked.append(("sign off", node))

    def knows(self, node):
        self.asked.append(("knows", node))
        return self.known

    def sleep(self, seconds):
        self.seconds += seconds


@pytest.fixture
def wait(device, monkeypatch):
    def waited(*answers, known=True):
        server = Server(answers, known)
        monkeypatch.setattr(joining.time, "sleep", server.sleep)
        try:
            wait_until_admitted(server, device.policy)
        finally:
            waited.asked = server.asked
        return server.asked

    return waited


def test_an_admitted_device_signs_off_for_its_supernode_and_remembers_its_node(wait, device):
    assert wait(NODE) == [("admit", 0.0), ("sign off", NODE)]
    assert (device.folder / "node").read_text() == str(NODE)
    assert "admits this device" in device.log()[-1]


def test_a_device_that_was_killed_waits_for_the_end_of_its_last_connection(wait, device):
    wait(NODE)
    signed_off = [("admit", 0.0), ("knows", NODE), ("sign off", NODE)]
    assert wait(Refused(), NODE) == [*signed_off, ("admit", 30.0), ("sign off", NODE)]
    assert "waiting 30 s: the last process of this device did not sign off" in device.log()[-2]
    assert "this device joins by itself" in device.log()[-2]


def test_a_key_that_another_process_uses_is_told_after_the_wait(wait):
    wait(NODE)
    with pytest.raises(ServerError, match="another process is connected by private_key"):
        wait(Refused(), Refused())
    assert [what for what, _ in wait.asked].count("admit") == 2


@pytest.mark.parametrize("before", [True, False])
def test_a_key_that_is_not_registered_or_no_longer_is_told_at_once(wait, before):
    if before:
        wait(NODE)
    with pytest.raises(ServerError, match=r"does not admit private_key=.*flwr supernode register"):
        wait(Refused(), known=False)
    assert wait.asked == [("admit", 0.0), ("knows", NODE)][: 1 + before]


def test_a_server_that_is_down_is_asked_until_it_is_up_and_that_is_said_once(wait, device):
    down = httpx.ConnectError("connection refused")
    assert wait(down, down, down, NODE) == [*(("admit", 5.0 * i) for i in range(4)), ("sign off", NODE)]
    assert sum("does not respond (connection refused)" in line for line in device.log()) == 1
    wait(down, httpx.ConnectError("certificate verify failed"), NODE)
    assert "does not respond (certificate verify failed)" in device.log()[-2]  # another reason is said too


def test_one_process_of_a_machine_runs_a_device(device):
    with (
        alone(device.policy),
        pytest.raises(ServerError, match="another process runs the device in folder="),
        alone(device.policy),
    ):
        pass
    with alone(device.policy):
        pass  # the lock ends with the block


def test_a_private_key_is_of_ssh_keygen(device, tmp_path):
    policy = dict(device.policy.__dict__)

    def keyed(path):
        return private_key(type(device.policy)(**{**policy, "private_key": str(path)}))

    subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", tmp_path / "key"], check=True)
    assert keyed(tmp_path / "key").key_size == 384
    subprocess.run(["ssh-keygen", "-q", "-t", "rsa", "-N", "", "-f", tmp_path / "rsa"], check=True)
    (tmp_path / "text").write_text("no key")
    for name in ("none", "rsa", "text"):
        with pytest.raises(PolicyError, match=r"private_key=.* is not a private key of ssh-keygen -t ecdsa"):
            keyed(tmp_path / name)
