"""Ray found or started, so that a wrong address is an error and not a wait."""

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
    # a freed sum is room for the next one at once: by default Ray gathers a hundred of them or waits a second
    "RAY_free_objects_batch_size": "4",
    "RAY_free_objects_period_milliseconds": "20",
}
"""Environment of a Ray that is started here, where the user has not set it."""


def connect(address: str, num_workers: int) -> Callable[[], None]:
    """Join the Ray of ``address`` (``host:port`` or ``auto``), or the one that is there, or start one; how to leave it.

    Only a Ray that was started here is ended. Raises ``RunError`` where nothing answers.
    """
    if ray.is_initialized():
        return lambda: None
    # of a dead worker Ray would print a page into stdout, amid tables and JSON; what is to be said of it is in our log
    rays_own._worker_logs_enabled = False
    if not address:
        for name, value in OWN_RAY.items():
            os.environ.setdefault(name, value)
        # without "local" Ray would join the cluster of RAY_ADDRESS, or one that somebody has started on this machine
        ray.init(
            "local", num_cpus=num_workers, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
        )
        return ray.shutdown
    try:
        # "auto" is RAY_ADDRESS, or what was started last on this machine
        _check_reachable(canonicalize_bootstrap_address(address) or address if address == "auto" else address)
        with warnings.catch_warnings():  # of what will be Ray's default for cards
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
    """What Ray says when it cannot go on, as a ``RunError`` with what to do."""
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
    """Ray itself would try for minutes, also at what is there and is no Ray."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise SettingError("ray_address", address, "'auto' or host:port", "`ray status` shows a cluster's address")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:  # the latter of a port beyond 65535
        raise RunError(
            f"ray_address={address!r}: nothing answers there ({error}); start a cluster with `ray start --head`"
        ) from error
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return
    try:
        with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
            channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=CONNECT_SECONDS)
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.UNAUTHENTICATED:  # a cluster with tokens: Ray will show its own
            raise RunError(
                f"ray_address={address!r}: what answers there is no Ray cluster ({error.code().name}); "
                "`ray status` shows a cluster's address"
            ) from error
