"""A device as a Flower node: a SuperNode that connects to the server of the policy, and this process, which replies.

The runner of Flower (``flower-superexec``) installs and runs the app that the server sends: code of the server, on the
device, beside the data. This module instead starts the SuperNode with ``--isolation process``. The installed
``fed_dpsat.flower.client_app`` replies to its messages, and nothing unpacks the bundle of the server. It is also
faster, because no process starts per message.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import closing
from logging import getLevelNamesMapping, getLogger
from pathlib import Path
from types import FrameType

from flwr.app import Context, Error, Message

from fed_dpsat.client.protocol import PACKAGE
from fed_dpsat.device.check import address, authority, problems
from fed_dpsat.device.data import check_tokenizer
from fed_dpsat.device.joining import ServerError, alone, join
from fed_dpsat.device.log import device_log, one_line
from fed_dpsat.device.metrics import serve
from fed_dpsat.device.policy import Policy, PolicyError
from fed_dpsat.device.release import open_ledger
from fed_dpsat.flower.client_app import app
from fed_dpsat.flower.grid import answer
from fed_dpsat.flower.wire import compat, records
from fed_dpsat.flower.wire.compat import node as runtime
from fed_dpsat.run import logs

log = getLogger("fed_dpsat")

POLL_SECONDS = 0.2
MOST_AT_A_TIME = 32
_COMPUTING = threading.Lock()
PR_SET_PDEATHSIG = 1
LEVEL = re.compile(r"(DEBUG|INFO|WARNING|ERROR|CRITICAL) *: *(.*)")
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def run_device(policy_path: Path, port: int = 0) -> int:
    """Join, and serve until the SuperNode ends or this process stops; returns the exit code of the SuperNode.

    Raises ``PolicyError`` for a wrong policy or one without a server, and ``LedgerError`` without a ledger. Raises
    ``ServerError`` for a server with a certificate of another authority, or one that does not admit this device.
    """
    policy = Policy.load(policy_path)
    if not (policy.server and policy.root_certificates and policy.private_key):
        raise PolicyError(f"policy {policy_path}: set server, root_certificates and private_key to run")
    if found := problems(policy):
        raise PolicyError(f"policy {policy_path}: " + "; ".join(found))
    check_tokenizer(policy)
    with open_ledger(Path(policy.folder), readonly=True):
        pass  # there is one, so `device init` was run
    logs.use(policy.log_format)
    compat.say_untested()
    compat.identify_process()
    check_server(policy.server, policy.root_certificates)
    signal.signal(signal.SIGTERM, _stop)
    metrics = serve(policy)
    with alone(policy):
        join(policy)
        if metrics:
            metrics.joined.set(1)
        port = port or free_port()
        node = _start(policy, policy_path, port)
        try:
            _serve(node, f"127.0.0.1:{port}", policy_path, policy)
        finally:
            node.terminate()
            code = node.wait()
    log.error("the SuperNode ended with exit code %d; the lines above say why", code)
    return code


def _start(policy: Policy, policy_path: Path, port: int) -> subprocess.Popen[bytes]:
    """The SuperNode; its lines become those of the log with ``log_format = "json"``."""
    pipe, into = (subprocess.PIPE, subprocess.STDOUT) if policy.log_format == "json" else (None, None)
    node = subprocess.Popen(
        _supernode(policy, policy_path, port),
        env=_environment(policy),
        preexec_fn=_end_with_parent,
        stdout=pipe,
        stderr=into,
    )
    if node.stdout:
        threading.Thread(target=_pass_on, args=(node.stdout,), daemon=True).start()
    return node


def _pass_on(lines: Iterable[bytes]) -> None:
    """Lines as Flower and uvicorn write them, ``INFO : text`` in colours, with their level; empty ones are left out."""
    for line in lines:
        plain = COLOUR.sub("", line.decode(errors="replace")).strip()
        level, text = match.groups() if (match := LEVEL.fullmatch(plain)) else ("INFO", plain)
        if text:
            log.log(getLevelNamesMapping()[level], "%s", one_line(text), extra={logs.FIELDS: {"of": "SuperNode"}})


def check_server(server: str, root_certificates: str) -> None:
    """Raise ``ServerError`` if the certificate of the server is not of the authority; a server may be down."""
    (host, port), context = address(server), authority(root_certificates)
    try:
        with socket.create_connection((host, port), timeout=10) as raw:
            context.wrap_socket(raw, server_hostname=host).close()
    except ssl.SSLError as error:
        raise ServerError(
            f"server={server!r} does not show a certificate of root_certificates={root_certificates!r} ({error}); "
            "nothing was sent: check both with the operator of the server"
        ) from None
    except OSError as error:
        log.warning("server %s does not respond yet (%s)", server, error)


def free_port() -> int:
    """A free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def other_app(run: compat.Run) -> str:
    """The reason against a run of another app; "" for one of this app, whose messages state its version."""
    name = run.fab_id.rpartition("/")[2]
    if name != PACKAGE:
        return f"the run is of the app {run.fab_id!r}, this device serves only {PACKAGE!r}"
    return ""


def serve_message(address: str, token: str, task_id: int, policy_path: Path, policy: Policy) -> None:
    """Pull one message from the SuperNode, run the installed app, push the reply; one message at a time computes."""
    client = _client(address, "flwr-clientapp", runtime.RuntimeTokenHttpInterceptor(token))
    with closing(client):
        heartbeat = runtime.HeartbeatSender(runtime.make_task_heartbeat_fn_http(client))
        heartbeat.start()
        try:
            message, context, run, _ = runtime.pull_task_input(client)
            with _COMPUTING:
                compat.act_for(run.run_id, context.node_id, task_id)
                reply = _reply(message, context, run, policy_path, policy)
                runtime.push_message(client, reply, context)
            runtime.push_task_output(client, context, runtime.SubStatus.COMPLETED, "")
        finally:
            if heartbeat.is_running:
                heartbeat.stop()


def _reply(message: Message, context: Context, run: compat.Run, policy_path: Path, policy: Policy) -> Message:
    context.node_config = {**context.node_config, records.POLICY: str(policy_path)}
    if reason := other_app(run):
        device_log(Path(policy.folder), policy.log_format).warning("run %s: refused: %s", run.run_id, one_line(reason))
        return Message(Error(compat.ErrorCode.CLIENT_APP_RAISED_EXCEPTION, one_line(reason)), reply_to=message)
    return answer(app, message, context)


def _serve(node: subprocess.Popen[bytes], address: str, policy_path: Path, policy: Policy) -> None:
    """Serve each message in a thread of its own: a message of an ended run never completes and must not block."""

    def attempt(token: str, task_id: int) -> None:
        try:
            serve_message(address, token, task_id, policy_path, policy)
        except Exception as error:  # the device serves the next message
            log.warning("a message has no reply: %s", one_line(f"{type(error).__name__}: {error}"))

    client, threads = _client(address, "SuperExec"), list[threading.Thread]()
    with closing(client):
        while node.poll() is None:
            threads = [thread for thread in threads if thread.is_alive()]
            try:
                if len(threads) < MOST_AT_A_TIME:
                    found = client.AcquireTask(
                        runtime.AcquireTaskRequest(supported_task_types=[runtime.TaskType.CLIENT_APP])
                    )
                    if found.HasField("task") and found.token:
                        threads.append(
                            threading.Thread(target=attempt, args=(found.token, found.task.task_id), daemon=True)
                        )
                        threads[-1].start()
            except Exception as error:  # the SuperNode may not be ready yet
                if node.poll() is None:
                    log.warning("the SuperNode does not respond: %s", one_line(f"{type(error).__name__}: {error}"))
            time.sleep(POLL_SECONDS)


def _client(address: str, component: str, *more: runtime.ProtobufClientInterceptor) -> runtime.RuntimeHttpClient:
    retry = runtime.make_simple_http_retry_invoker()
    retry.max_tries, retry.max_time = 5, 30.0
    return runtime.RuntimeHttpClient.from_server_address(
        server_address=address,
        insecure=True,
        root_certificates=None,
        interceptors=[runtime.RuntimeVersionHttpInterceptor(component_name=component), *more],
        retry_invoker=retry,
    )


def _supernode(policy: Policy, policy_path: Path, port: int) -> list[str]:
    return [
        *(sys.executable, "-c", runtime.START_SUPERNODE, "--isolation", "process"),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--superlink", policy.server, "--root-certificates", policy.root_certificates),
        *("--auth-supernode-private-key", policy.private_key),
        *("--node-config", f"partition-id={policy.client}"),
    ]


def _environment(policy: Policy) -> dict[str, str]:
    own = {"FLWR_HOME": str(Path(policy.folder) / "flwr"), "FLWR_TELEMETRY_ENABLED": "0"}
    return {**own, "FLWR_DISABLE_UPDATE_CHECK": "1", **os.environ}


def _end_with_parent() -> None:
    """On Linux the SuperNode ends with this process, also after kill -9."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _stop(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
