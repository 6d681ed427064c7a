"""A real federation on one machine: TLS, registered keys, a SuperLink, three devices with their own data, `flwr run`.

Claims: the apps of the simulation train unchanged over a network, each device by its own policy and ledger. The
digits are dealt to three devices: one has a folder of images by class, one a Parquet file, one a function. Needs
``openssl`` and ``ssh-keygen``. Seeds: none, devices draw their noise from the system.

    python -m simulations.deploy_local FOLDER [--rounds 3]

leaves everything in FOLDER, a new or empty one: certificates, keys, policies, ledgers, logs, and the run in ``run``. It
leaves nothing running, and prints when each part is done. It takes about a minute of CPU time, most of it for ten
processes that import PyTorch or Flower: one to two minutes on two cores, longer if other work shares them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from fed_dpsat.data.digits import MEAN, STD, digits
from fed_dpsat.device.command import begin, status_text
from fed_dpsat.device.node import free_port
from fed_dpsat.device.policy import Policy
from fed_dpsat.device.status import read_status
from fed_dpsat.errors import InputError, SettingError

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
NUM_DEVICES = 3
SETTINGS: dict[str, Any] = {
    "dataset": "digits", "num_clients": NUM_DEVICES, "num_rounds": 3, "local_steps": 5, "sample_rate": 0.2, "lr": 1.0,
    "target_epsilon": 4.0, "delta": 1e-4, "noise_source": "system", "join_timeout": 90.0, "reply_timeout": 120.0,
}  # fmt: skip
POLICY = """
folder = "ledger"
client = {client}
server = "127.0.0.1:{port}"
root_certificates = "../ca.crt"
private_key = "key"
dataset = "digits"
data_source = "{source}"
data_path = "{data}"
class_names = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]
image_size = 8
channels = 1
mean = [{mean}]
std = [{std}]
largest_epsilon = 8.0
largest_delta = 1e-4
least_noise_multiplier = 0.5
largest_local_steps = 20
models = ["linear", "mlp"]
"""
FUNCTION = """
import numpy as np, torch
from pathlib import Path
from fed_dpsat.data import Examples

def examples():
    own = np.load(Path(__file__).with_name("own.npz"))
    return Examples(inputs=torch.from_numpy(own["inputs"]), labels=torch.from_numpy(own["labels"]),
                    mean=({mean},), std=({std},))
"""


def make_certificates(folder: Path, name: str = "ca", names: str = "IP:127.0.0.1,DNS:localhost") -> None:
    """An authority ``name.crt`` and, of it, the server's certificate ``name-server.pem`` with its key."""

    def openssl(*arguments: object) -> None:
        subprocess.run(["openssl", *map(str, arguments)], check=True, cwd=folder, capture_output=True)

    server = f"{name}-server"
    subject = ("-nodes", "-newkey", "rsa:3072", "-subj")
    openssl(
        "req", "-x509", *subject, "/CN=example authority", "-days", 30, "-keyout", f"{name}.key", "-out", f"{name}.crt"
    )
    openssl("req", *subject, "/CN=localhost", "-keyout", f"{server}.key", "-out", f"{server}.csr")
    (folder / f"{server}.ext").write_text(f"subjectAltName={names}\n")
    signed = ("-CA", f"{name}.crt", "-CAkey", f"{name}.key", "-CAcreateserial", "-extfile", f"{server}.ext")
    openssl("x509", "-req", "-in", f"{server}.csr", *signed, "-days", 30, "-out", f"{server}.pem")


def make_device(folder: Path, client: int, port: int, source: str) -> None:
    """Make the key of a device, its third of the digits for ``source``, and its policy."""
    folder.mkdir()
    keygen = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", str(folder / "key")]
    subprocess.run(keygen, check=True)
    train = digits().train
    inputs, labels = train.inputs.numpy()[client::NUM_DEVICES], train.labels.numpy()[client::NUM_DEVICES]
    path = {"folder": _as_images, "parquet": _as_parquet, "function": _as_function}[source](folder, inputs, labels)
    values = {"client": client, "port": port, "source": source, "data": path, "mean": MEAN[0], "std": STD[0]}
    (folder / "policy.toml").write_text(POLICY.format(**values))


def _png(image: np.ndarray) -> bytes:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.rint(image[0] * 255).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def _as_images(folder: Path, inputs: np.ndarray, labels: np.ndarray) -> str:
    for number, (image, label) in enumerate(zip(inputs, labels, strict=True)):
        place = folder / "images" / str(label)
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.png").write_bytes(_png(image))
    return "images"


def _as_parquet(folder: Path, inputs: np.ndarray, labels: np.ndarray) -> str:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    (folder / "parquet").mkdir()
    images = [{"bytes": _png(image), "path": f"{number}.png"} for number, image in enumerate(inputs)]
    pq.write_table(pa.table({"image": images, "label": labels}), folder / "parquet" / "own.parquet")
    return "parquet"


def _as_function(folder: Path, inputs: np.ndarray, labels: np.ndarray) -> str:
    np.savez(folder / "own.npz", inputs=inputs, labels=labels)
    (folder / "own.py").write_text(FUNCTION.format(mean=MEAN[0], std=STD[0]))
    return f"{folder / 'own.py'}:examples"


class Deployment:
    """The processes in ``folder``: a SuperLink, devices by number, and runs; all end with the block.

    Raises ``SettingError`` for a ``folder`` with files in it, and for programs that are not there.
    """

    def __init__(self, folder: Path, sources: tuple[str, ...] = ("folder", "parquet", "function")) -> None:
        self.folder = folder.absolute()
        if self.folder.exists() and any(self.folder.iterdir()):
            raise SettingError("folder", str(folder), "new or empty", "name another one, or delete it")
        for program in ("openssl", "ssh-keygen", "ps"):
            if shutil.which(program) is None:
                raise SettingError("PATH", os.environ["PATH"], f"the folders of {program} too", f"install {program}")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.run_ids: dict[str, str] = {}
        make_certificates(self.folder)
        for client, source in enumerate(sources):
            make_device(self.device_folder(client), client, self.port, source)
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("FLWR_")},
            "FLWR_HOME": str(self.folder / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "PYTHONPATH": str(ROOT),
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
        }
        (self.folder / "flwr").mkdir()
        connection = f'address = "127.0.0.1:{self.port}"\nroot-certificates = "{self.folder / "ca.crt"}"\n'
        (self.folder / "flwr" / "config.toml").write_text(f"[superlink.deployment]\n{connection}")

    def device_folder(self, client: int) -> Path:
        """The folder of a device."""
        return self.folder / f"device{client}"

    def log(self, name: str) -> str:
        """The output of a process."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def start(self, name: str, *command: object, **changes: str) -> subprocess.Popen[bytes]:
        """Start a process in a group of its own, its output in ``name.log``, with ``changes`` to its environment."""
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [str(part) for part in command],
                stdout=log, stderr=log, env={**self.environment, **changes}, cwd=self.folder, start_new_session=True,
            )  # fmt: skip
        self.processes[name] = process
        return process

    def call(self, *command: object) -> str:
        """Run a command to its end; its output, or an error with it."""
        done = subprocess.run(
            [str(part) for part in command], env=self.environment, cwd=self.folder, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{command} ended with {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout

    def start_superlink(self) -> None:
        """Start the SuperLink with TLS and registered keys only, and wait until it responds."""
        self.start(
            *("superlink", "flower-superlink", "--ssl-ca-certfile", "ca.crt", "--ssl-certfile", "ca-server.pem"),
            *("--ssl-keyfile", "ca-server.key", "--enable-supernode-auth", "--host", "127.0.0.1"),
            *("--port", self.port, "--database", "superlink.db", "--disable-runtime-dependency-installation"),
        )
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                if time.monotonic() > deadline or self.processes["superlink"].poll() is not None:
                    raise RuntimeError(f"the SuperLink did not start: {self.log('superlink')[-2000:]}") from None
                time.sleep(0.2)

    def register(self, client: int) -> None:
        """Register the key of a device."""
        self.call("flwr", "supernode", "register", self.device_folder(client) / "key.pub", "deployment")

    def start_device(self, client: int) -> subprocess.Popen[bytes]:
        """``fed-dpsat device run``; begins its ledger first if it has none."""
        policy = self.device_folder(client) / "policy.toml"
        if not (self.device_folder(client) / "ledger").exists():
            begin(Policy.load(policy))
        home = str(self.device_folder(client) / "ledger" / "flwr")
        return self.start(f"device{client}", "fed-dpsat", "device", "run", policy, FLWR_HOME=home)

    def submit(self, settings: Mapping[str, Any], name: str = "run") -> Path:
        """``flwr run``; returns the folder that the run writes to."""
        out = self.folder / name
        values = {**SETTINGS, **settings, "out": str(out)}
        written = " ".join(f"{key}={json.dumps(value)}" for key, value in values.items())
        told = self.call("flwr", "run", ROOT, "deployment", "-c", written, "--format", "json")
        self.run_ids[name] = str(json.loads(told[told.index("{") :])["run-id"])
        return out

    def stop(self, name: str = "run") -> None:
        """End a run before its last round."""
        self.call("flwr", "stop", self.run_ids[name], "deployment")

    def run_log(self, name: str = "run") -> str:
        """The output of the server app of a run."""
        return self.call("flwr", "log", self.run_ids[name], "deployment", "--show")

    def wait(
        self, out: Path, seconds: float = 180.0, told: Callable[[Mapping[str, Any]], None] | None = None
    ) -> dict[str, Any]:
        """Wait for the summary of a run; ``told`` receives each round once it is written."""
        deadline, rounds = time.monotonic() + seconds, 0
        while time.monotonic() < deadline:
            ended = _summary(out)
            if told and (out / "rounds.jsonl").exists():
                lines = (out / "rounds.jsonl").read_text().splitlines(keepends=True)
                whole = [line for line in lines if line.endswith("\n")]
                for line in whole[rounds:]:
                    told(json.loads(line))
                rounds = len(whole)
            if ended:
                return ended
            time.sleep(0.5)
        raise RuntimeError(f"no summary in {out} after {seconds:g} s; see {self.folder / 'superlink.log'}")

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """End a process and all its descendants, in any process group."""
        self.signal(name, number)
        self.processes.pop(name).wait()

    def signal(self, name: str, number: int) -> None:
        """Send a signal to a process and all its descendants."""
        pid = self.processes[name].pid
        for receiver in [pid, *_descendants(pid)]:
            with suppress(ProcessLookupError):
                os.kill(receiver, number)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for name in list(self.processes):
            self.kill(name)


def _summary(out: Path) -> dict[str, Any] | None:
    """The summary of a run that has ended."""
    if not (out / "summary.json").exists():
        return None
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return None if summary["status"] == "running" else summary


def _descendants(pid: int) -> list[int]:
    lines = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = [tuple(map(int, line.split())) for line in lines.splitlines()]
    found = [pid]
    for parent in found:  # grows
        found += [child for child, of in pairs if of == parent]
    return found[1:]


def _result(record: Mapping[str, Any]) -> str:
    accepted = f"{record['accepted']} accepted, " if "accepted" in record else ""
    return f"{accepted}accuracy {record['test_accuracy']:.3f}, epsilon {record['epsilon']:.3f}"


def main() -> None:
    """Run everything, from the certificates to the statements of the devices."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=SETTINGS["num_rounds"])
    arguments = parser.parse_args()
    try:
        deploy(arguments.folder, arguments.rounds)
    except InputError as error:
        parser.error(str(error))


def deploy(folder: Path, num_rounds: int) -> None:
    """A deployment in ``folder`` from its begin to its end, told on the terminal."""
    start = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - start:5.1f} s  {text}", flush=True)

    with Deployment(folder) as deployment:
        say(f"certificates, keys, data and policies are in {deployment.folder}")
        deployment.start_superlink()
        say(f"the SuperLink is at 127.0.0.1:{deployment.port}")
        with ThreadPoolExecutor() as pool:
            list(pool.map(deployment.register, range(NUM_DEVICES)))
        for client in range(NUM_DEVICES):
            deployment.start_device(client)
        say(f"{NUM_DEVICES} devices are registered and start")
        out = deployment.submit({"num_rounds": num_rounds})
        say(f"run {deployment.run_ids[out.name]} is submitted")
        summary = deployment.wait(out, told=lambda record: say(f"round {record['round']}: {_result(record)}"))
        say(f"the run has ended: {summary['status']}, {_result(summary)}")
    for client in range(NUM_DEVICES):
        policy = Policy.load(deployment.device_folder(client) / "policy.toml")
        print(f"\n{status_text(policy, read_status(policy))}")


if __name__ == "__main__":
    main()
