"""Wait until the server admits a device, before its SuperNode starts.

A SuperLink admits one connection by a key. It counts a SuperNode that was killed as connected for a minute, and refuses
another one with the words for a key that it does not know.

=================================================== ============================================================
the server                                          the device
=================================================== ============================================================
admits the key                                      signs off again, so that its SuperNode can connect
does not respond                                    asks again, until it does
refuses a key that it knows as that of this device  signs off its last process, waits ``ALIVE_SECONDS``, asks again
refuses it again                                    ends: another process is connected by this key
refuses a key that it does not know                 ends: the key is to be registered
=================================================== ============================================================

A process that is alive, on a machine with a copy of the folder, sends a heartbeat within ``ALIVE_SECONDS`` and is
connected again by that. A server app asks for replies every three seconds, so it learns in that time that the last
process will not reply; otherwise a round would wait for ``reply_timeout``.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from fed_dpsat.device.log import device_log
from fed_dpsat.device.policy import Policy, PolicyError
from fed_dpsat.errors import RunError, SettingError
from fed_dpsat.flower.wire.compat import node as runtime

RETRY_SECONDS = 5.0
ALIVE_SECONDS = float(runtime.HEARTBEAT_DEFAULT_INTERVAL)
"""A SuperNode sends its heartbeats at most this far apart."""
NODE_FILE = "node"
"""File in the folder of a device with the number that the server gave to its key."""


class ServerError(RunError):
    """The server does not have the certificate that the policy requires, or does not admit this device."""


class Refused(Exception):
    """The server does not admit the key of this device: it does not know it, or counts it as connected."""


class Link:
    """The server as this device sees it before its SuperNode runs; ``httpx`` errors for one that does not respond."""

    def __init__(self, policy: Policy) -> None:
        self._key = private_key(policy)
        self._client = runtime.FleetHttpClient.from_server_address(
            policy.server,
            False,
            policy.root_certificates,
            interceptors=[
                runtime.RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                runtime.NodeAuthHttpInterceptor(self._key, self._key.public_key()),
            ],
        )

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def admit(self) -> int:
        """The node id of this device, which is connected now. Raises ``Refused`` and ``ServerError``."""
        public = runtime.public_key_to_bytes(self._key.public_key())
        request = runtime.ActivateNodeRequest(public_key=public, heartbeat_interval=runtime.HEARTBEAT_DEFAULT_INTERVAL)
        try:
            return int(self._client.ActivateNode(request).node_id)
        except httpx.HTTPStatusError as error:
            status = error.response.status_code
            if status == httpx.codes.PRECONDITION_FAILED:
                raise Refused from None
            if status == httpx.codes.UNAUTHORIZED:
                raise ServerError(
                    "the server rejects the signature of this device; set the clocks of both machines: they may differ "
                    "by seconds, and a signature holds its time"
                ) from None
            if status < httpx.codes.INTERNAL_SERVER_ERROR:
                raise ServerError(f"the server answers {error}; run the same version of Flower on both") from None
            raise

    def sign_off(self, node: int) -> None:
        """Say that the device is not connected as ``node``, if the server still counts it as that."""
        try:
            self._client.DeactivateNode(runtime.DeactivateNodeRequest(node_id=node))
        except httpx.HTTPStatusError as error:
            if error.response.status_code != httpx.codes.PRECONDITION_FAILED:
                raise

    def knows(self, node: int) -> bool:
        """Whether the key of this device is registered as that of ``node``; asks for a run that does not exist."""
        try:
            self._client.GetRun(runtime.GetRunRequest(node=runtime.Node(node_id=node), run_id=0))
        except httpx.HTTPStatusError as error:
            return error.response.status_code != httpx.codes.UNAUTHORIZED
        return True


def private_key(policy: Policy) -> EllipticCurvePrivateKey:
    """The key of the device; raises ``PolicyError`` for another file."""
    try:
        key = load_ssh_private_key(Path(policy.private_key).read_bytes(), None)
        if isinstance(key, EllipticCurvePrivateKey):
            return key
        reason = "it is of another kind"
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        reason = str(error)
    bound = f"a private key of ssh-keygen -t ecdsa without a passphrase ({reason})"
    raise PolicyError(str(SettingError("private_key", policy.private_key, bound, "make one"))) from None


def join(policy: Policy) -> None:
    """Return once the server admits the device; waits as the table says. Raises ``ServerError``."""
    with closing(Link(policy)) as link:
        wait_until_admitted(link, policy)


def wait_until_admitted(link: Link, policy: Policy) -> None:
    """``join`` over a ``link``."""
    log = device_log(Path(policy.folder), policy.log_format)
    waited, told = False, ""
    while True:
        try:
            if _admitted(link, policy, waited):
                log.info("server %s admits this device", policy.server)
                return
            log.warning(
                "waiting %g s: the last process of this device did not sign off, and the server counted it as "
                "connected; this device joins by itself if no other process uses its key",
                ALIVE_SECONDS,
            )
            waited, seconds = True, ALIVE_SECONDS
        except httpx.HTTPError as error:
            if told != (told := str(error)):
                log.warning("waiting: server %s does not respond (%s); it is asked again", policy.server, error)
            seconds = RETRY_SECONDS
        time.sleep(seconds)


@contextmanager
def alone(policy: Policy) -> Iterator[None]:
    """Raise ``ServerError`` if another process of this machine runs the device; none can during the block."""
    with (Path(policy.folder) / "device.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ServerError(f"another process runs the device in folder={policy.folder!r}; stop it first") from None
        yield


def _admitted(link: Link, policy: Policy, waited: bool) -> bool:
    """Whether the server admits the device; if not, its last process is signed off."""
    file = Path(policy.folder) / NODE_FILE
    try:
        node = link.admit()
    except Refused:
        link.sign_off(_known(link, policy, file, waited))
        return False
    _keep(file, node)
    link.sign_off(node)
    return True


def _keep(file: Path, node: int) -> None:
    beside = file.with_suffix(".new")
    beside.write_text(str(node), encoding="utf-8")
    beside.replace(file)


def _known(link: Link, policy: Policy, file: Path, waited: bool) -> int:
    """The node in ``file``; raises ``ServerError`` if the server does not know the key as that, or after a wait."""
    node = int(file.read_text(encoding="utf-8")) if file.exists() else None
    if node is None or not link.knows(node):
        raise ServerError(
            f"server={policy.server!r} does not admit private_key={policy.private_key!r}; its operator registers the "
            "public key: flwr supernode register KEY.pub NAME (one that another folder has used is free after a minute)"
        )
    if waited:
        raise ServerError(
            f"server={policy.server!r} counts this device as connected: another process is connected by "
            f"private_key={policy.private_key!r}; stop it, or give this device a key of its own"
        )
    return node
