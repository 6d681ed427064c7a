"""Real federations on loopback: TLS, keys, SuperNodes, ``flwr run``; with devices and servers that do not behave."""

from __future__ import annotations

import json
import signal
import socket
import ssl
import subprocess
import threading
import time
from contextlib import closing

import pytest

from fed_dpsat.accounting import PrivacyLedger, epsilon
from fed_dpsat.device.release import CLIENT, ledger_path
from simulations.deploy_local import Deployment, make_certificates, make_device

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def deployment(tmp_path_factory):
    """A SuperLink with three registered devices that run."""
    with Deployment(tmp_path_factory.mktemp("deployment")) as made:
        made.start_superlink()
        for client in range(3):
            made.register(client)
            made.start_device(client)
        yield made


def spent(deployment, client):
    with PrivacyLedger(ledger_path(deployment.device_folder(client) / "ledger"), readonly=True) as ledger:
        ledger.verify()
        return ledger.history(CLIENT)


def rounds(out):
    return [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]


def wait_for(condition, seconds=90.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.2)


def has_round(out, round):
    return lambda: (out / "rounds.jsonl").exists() and any(line["round"] >= round for line in rounds(out))


def test_a_federation_runs_to_its_end_both_sides_agree_on_its_cost_and_no_code_comes_to_a_device(deployment):
    out = deployment.submit({"num_rounds": 3})
    summary = deployment.wait(out)
    assert summary["status"] == "completed"
    assert summary["test_accuracy"] > 0.6
    assert [line["accepted"] for line in rounds(out)[1:]] == [3, 3, 3]
    for client in range(3):
        assert epsilon(spent(deployment, client), 1e-4) == pytest.approx(summary["epsilon"])
        told = json.loads(
            deployment.call("fed-dpsat", "device", "status", deployment.device_folder(client) / "policy.toml", "--json")
        )
        assert told["epsilon_spent"] == pytest.approx(summary["epsilon"])
        assert (told["rounds"], told["integrity"]) == (3, "unbroken")
        assert "round 3" in told["last_contact"]
    assert (deployment.folder / "flwr" / "apps").is_dir()  # where the server's own side is: no device has its code
    for client in range(3):
        assert not list((deployment.device_folder(client) / "ledger").rglob("*.py"))


def test_a_run_that_the_policies_refuse_says_why_at_the_server(deployment):
    before = [spent(deployment, client) for client in range(3)]
    out = deployment.submit({"noise_source": "seeded", "join_timeout": 5.0}, "seeded")
    assert deployment.wait(out)["status"] == "failed"
    assert "only from the operating system: set noise_source=system" in deployment.run_log("seeded")
    assert [spent(deployment, client) for client in range(3)] == before
    assert "refused: noise_source='seeded'" in (deployment.device_folder(0) / "ledger" / "device.log").read_text()


def test_killed_and_stalled_devices_and_a_killed_server_are_taken_back_as_they_are(deployment):
    """Device 0 is killed with all its processes, device 1 stands still too long, then the server dies."""
    before = {client: len_of(spent(deployment, client)) for client in range(3)}
    settings = {
        "num_rounds": 8, "reply_timeout": 20.0, "join_timeout": 150.0, "local_steps": 2, "noise_multiplier": 2.0,
        "target_epsilon": 0.0,
    }  # fmt: skip
    out = deployment.submit(settings, "faults")
    wait_for(has_round(out, 1))
    deployment.kill("device0")
    wait_for(has_round(out, 2))
    deployment.start_device(0)
    deployment.signal("device1", signal.SIGSTOP)
    wait_for(has_round(out, 4))
    deployment.kill("superlink")
    deployment.signal("device1", signal.SIGCONT)  # not before: a handshake with a dying server ends it
    done = rounds(out)[-1]["round"]
    (out / "summary.json").unlink(missing_ok=True)
    deployment.start_superlink()
    summary = deployment.wait(deployment.submit({**settings, "resume": True}, "faults"), 240)
    lines = rounds(out)[1:]
    assert (summary["status"], summary["rounds_completed"]) == ("completed", 8)
    assert [line["round"] for line in lines] == list(range(1, 9))
    assert {client for line in lines[:done] for client in line["dropped"]} == {"0", "1"}
    assert all(line["accepted"] >= 1 for line in lines)  # it goes on
    assert [line["accepted"] for line in lines[done:]] == [3] * (8 - done)  # both are back
    for client in range(3):
        asked = sum(client in line["asked"] for line in lines)
        answered = sum(client in line["asked"] and str(client) not in line["dropped"] for line in lines)
        charged = (len_of(spent(deployment, client)) - before[client]) // 2
        assert answered <= charged <= asked + 1  # no answer without a charge; the round that was cut off is asked again


def test_a_killed_device_that_comes_back_within_a_minute_waits_and_joins_by_itself(deployment):
    """It is one process from its start to the end of the run, and takes part again."""
    settings = {
        "num_rounds": 30,
        "local_steps": 1,
        "noise_multiplier": 2.0,
        "target_epsilon": 0.0,
        "reply_timeout": 40.0,
    }
    out = deployment.submit(settings, "rejoined")
    wait_for(has_round(out, 1))
    deployment.kill("device2")
    returned = deployment.start_device(2)
    log = deployment.device_folder(2) / "ledger" / "device.log"
    wait_for(lambda: "the last process of this device did not sign off" in log.read_text())
    wait_for(lambda: rounds(out)[-1]["round"] >= 3 and 2 not in rounds(out)[-1]["asked"])  # the others go on
    missed = rounds(out)[-1]["round"]
    wait_for(lambda: 2 in rounds(out)[-1]["asked"] and "2" not in rounds(out)[-1]["dropped"], 150)
    assert rounds(out)[-1]["round"] > missed
    assert returned.poll() is None
    assert all(line["accepted"] >= 2 for line in rounds(out)[1:])
    deployment.stop("rejoined")


def len_of(history):
    return sum(event.steps for event in history)


BF16 = {"update_codec": "bf16", "noise_multiplier": 1.0, "target_epsilon": 0.0}
MODEL = """
from torch import nn
def model(input_shape, num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 140_000), nn.Tanh(), nn.Linear(140_000, num_classes))
"""


def test_a_model_of_40_mb_goes_there_and_back(deployment):
    source = deployment.folder / "large.py"
    source.write_text(MODEL)
    for client in range(3):
        policy = deployment.device_folder(client) / "policy.toml"
        policy.write_text(policy.read_text().replace("models = [", f'models = ["{source}:model", '))
    settings = {
        "model": f"{source}:model",
        "num_rounds": 1,
        "local_steps": 1,
        "sample_rate": 0.01,
        "lr": 0.01,
        "rho": 0.0,
    }
    summary = deployment.wait(deployment.submit({**settings, **BF16}, "large"))
    assert summary["status"] == "completed"
    assert rounds(deployment.folder / "large")[-1]["accepted"] == 3
    sent = summary["bytes_per_round"]
    assert sent["down"] > 3 * 40e6
    assert sent["up"] == pytest.approx(sent["down"] / 2, rel=0.001)
    assert (deployment.folder / "large" / "checkpoint").exists()


def test_a_key_that_is_not_registered_cannot_join(deployment):
    make_device(deployment.device_folder(3), 3, deployment.port, "function")
    stranger = deployment.start_device(3)
    wait_for(lambda: stranger.poll() is not None)
    assert stranger.returncode != 0
    assert "does not admit private_key=" in deployment.log("device3")
    assert "flwr supernode register" in deployment.log("device3")


def test_a_server_with_another_certificate_is_not_talked_to(deployment, tmp_path):
    make_certificates(tmp_path, "other")
    policy = deployment.device_folder(0) / "policy.toml"
    elsewhere = policy.with_name("elsewhere.toml")
    elsewhere.write_text(policy.read_text().replace('"../ca.crt"', f'"{tmp_path / "other.crt"}"'))
    command = ["fed-dpsat", "device", "run", str(elsewhere)]
    done = subprocess.run(command, env=deployment.environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "does not show a certificate of root_certificates" in done.stderr
    assert "nothing was sent" in done.stderr


def test_a_certificate_for_another_name_is_not_talked_to(deployment, tmp_path):
    make_certificates(tmp_path, "ca", "DNS:elsewhere.example")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "ca-server.pem", tmp_path / "ca-server.key")
    received = []
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:

        def serve():
            raw, _ = listener.accept()
            with closing(raw):
                try:
                    with context.wrap_socket(raw, server_side=True) as secure:
                        received.append(secure.recv(1000))
                except ssl.SSLError as error:
                    received.append(error)

        thread = threading.Thread(target=serve)
        thread.start()
        policy = deployment.device_folder(0) / "policy.toml"
        port = listener.getsockname()[1]
        changed = policy.read_text().replace(f":{deployment.port}", f":{port}")
        elsewhere = policy.with_name("elsewhere.toml")  # beside the key and the ledger of the device
        elsewhere.write_text(changed.replace("../ca.crt", str(tmp_path / "ca.crt")))
        command = ["fed-dpsat", "device", "run", str(elsewhere)]
        done = subprocess.run(command, env=deployment.environment, capture_output=True, text=True, timeout=60)
        thread.join(10)
    assert done.returncode == 1
    assert "does not show a certificate" in done.stderr
    assert all(isinstance(item, ssl.SSLError) for item in received)
