"""What ``device.node`` takes of Flower's runtime: how a process talks to the SuperNode beside it."""

from __future__ import annotations

from fed_dpsat.flower.wire.compat.versions import internals

with internals():
    from flwr.common.constant import SubStatus
    from flwr.proto.runtime_pb2 import AcquireTaskRequest
    from flwr.supercore.constant import TaskType
    from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
    from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
    from flwr.supercore.protobuf.client import ProtobufClientInterceptor
    from flwr.supercore.retry import make_simple_http_retry_invoker
    from flwr.supercore.runtime import RuntimeHttpClient
    from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

START_SUPERNODE = "from flwr.supernode.cli import flower_supernode; flower_supernode()"
"""A program in Python that takes the options of ``flower-supernode``."""

__all__ = [
    "START_SUPERNODE",
    "AcquireTaskRequest",
    "HeartbeatSender",
    "ProtobufClientInterceptor",
    "RuntimeHttpClient",
    "RuntimeTokenHttpInterceptor",
    "RuntimeVersionHttpInterceptor",
    "SubStatus",
    "TaskType",
    "make_simple_http_retry_invoker",
    "make_task_heartbeat_fn_http",
    "pull_task_input",
    "push_message",
    "push_task_output",
]
