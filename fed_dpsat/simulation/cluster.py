"""Connect to Ray or start it; a wrong address is an error and not a wait."""

from __future__ import annotations

import logging
import os
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc  # type: ignore[import-untyped]
import ray
from ray._private import worker as rays_own
from ray._private.services import canonicalize_bootstrap_address
from ray.exceptions import ObjectStoreFullError, OutOfDiskError, OutOfMemoryError, RayError, RayTaskError

from fed_dpsat.errors import RunError, SettingError

CONNECT_SECONDS = 10.0
OWN_RAY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else Ray warns that this will be its default
    # Ray frees objects in batches of a hundred or after a second; sums are large, so free them earlier
    "RAY_free_objects_batch_size": "4",
    "RAY_free_objects_period_milliseconds": "20",
}
"""Environment of a Ray that this module starts; variables of the user have priority."""


def connect(address: str, num_workers: int) -> Callable[[], None]:
    """Join the Ray of ``address`` (``host:port`` or ``auto``), reuse a connection, or start Ray; returns a disconnect.

    The disconnect ends only a Ray that this function started. Raises ``RunError`` for an address without a cluster.
    """
    if ray.is_initialized():
        return lambda: None
    # Ray prints a page to stdout for a dead worker, between tables and JSON; our log reports the death
    rays_own._worker_logs_enabled = False
    if not address:
        for name, value in OWN_RAY.items():
            os.environ.setdefault(name, value)
        # without "local" Ray joins the cluster of RAY_ADDRESS, or a cluster on this machine
        ray.init(
            "local", num_cpus=num_workers, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
        )
        return ray.shutdown
    try:
        # "auto" is RAY_ADDRESS, or the last cluster that was started on this machine
        _check_reachable(canonicalize_bootstrap_address(address) or address if address == "auto" else address)
        with warnings.catch_warnings():  # about a future default of Ray for GPUs
            warnings.simplefilter("ignore", FutureWarning)
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (RunError, SettingError):
        raise
    except (ConnectionError, RuntimeError, ValueError) as error:
        words = " ".join(str(error).split())
        raise RunError(f"ray_address={address!r}: no Ray cluster to join ({words}); see `ray status`") from error
    return ray.shutdown


@contextmanager
def explained() -> Iterator[None]:
    """Turn an error of Ray into a ``RunError`` with a remedy."""
    try:
        yield
    except RayError as error:
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, RunError):
            raise cause from error
        if isinstance(cause, ObjectStoreFullError | OutOfDiskError):
            raise RunError(
                "Ray's object store is full; it holds the model and a few sums per worker: lower "
                "workers, give Ray more (ray start --object-store-memory), or free the disk it spills to"
            ) from error
        if isinstance(cause, OutOfMemoryError):
            raise RunError(
                "Ray ended a worker because memory ran out; lower workers or physical_batch_size, or free memory "
                f"({str(cause).splitlines()[0][:200]})"
            ) from error
        raise RunError(f"Ray failed: {' '.join(str(cause).split())}") from error


def _check_reachable(address: str) -> None:
    """Raise an error within seconds; Ray itself tries for minutes, also at a server that is not Ray."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise SettingError("ray_address", address, "'auto' or host:port", "`ray status` shows the address")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:  # the latter of a port beyond 65535
        raise RunError(
            f"ray_address={address!r}: nothing responds there ({error}); start a cluster with `ray start --head`"
        ) from error
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return
    try:
        with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
            channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=CONNECT_SECONDS)
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.UNAUTHENTICATED:  # a cluster with tokens; Ray sends its own
            raise RunError(
                f"ray_address={address!r}: the server there is not a Ray cluster ({error.code().name}); "
                "`ray status` shows the address of a cluster"
            ) from error
