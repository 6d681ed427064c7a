"""What ``device`` takes of Flower's runtime: how a process talks to the SuperNode beside it, and to the SuperLink."""

from __future__ import annotations

from fed_dpsat.flower.wire.compat.versions import internals

with internals():
    from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, SubStatus
    from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest
    from flwr.proto.node_pb2 import Node
    from flwr.proto.run_pb2 import GetRunRequest
    from flwr.proto.runtime_pb2 import AcquireTaskRequest
    from flwr.supercore.constant import TaskType
    from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
    from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes
    from flwr.supercore.protobuf.client import ProtobufClientInterceptor
    from flwr.supercore.retry import make_simple_http_retry_invoker
    from flwr.supercore.runtime import RuntimeHttpClient
    from flwr.supernode.fleet_http_client import FleetHttpClient
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
    from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

START_SUPERNODE = "from flwr.supernode.cli import flower_supernode; flower_supernode()"
"""A program in Python that takes the options of ``flower-supernode``."""

__all__ = [
    "HEARTBEAT_DEFAULT_INTERVAL",
    "START_SUPERNODE",
    "AcquireTaskRequest",
    "ActivateNodeRequest",
    "DeactivateNodeRequest",
    "FleetHttpClient",
    "GetRunRequest",
    "HeartbeatSender",
    "Node",
    "NodeAuthHttpInterceptor",
    "ProtobufClientInterceptor",
    "RuntimeHttpClient",
    "RuntimeTokenHttpInterceptor",
    "RuntimeVersionHttpInterceptor",
    "SubStatus",
    "TaskType",
    "make_simple_http_retry_invoker",
    "make_task_heartbeat_fn_http",
    "public_key_to_bytes",
    "pull_task_input",
    "push_message",
    "push_task_output",
]
