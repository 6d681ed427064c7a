"""The nodes of Flower, the clients that they hold, and a grid that shows a strategy only the cohort."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from logging import getLogger

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fed_dpsat.errors import RunError
from fed_dpsat.flower.grid import SimulationGrid
from fed_dpsat.flower.wire import compat, records
from fed_dpsat.flower.wire.records import RecordError

log = getLogger("fed_dpsat")

POLL_SECONDS = 1.0
ASK_SECONDS = 10.0
NOTHING: Mapping[str, str] = {}


class FederationError(RunError):
    """The federation cannot continue; the text gives the reason and the remedy."""


class FederationOver(Exception):
    """Too few clients have budget left: the run is complete."""


def identify_nodes(grid: Grid, num_clients: int, timeout: float, same: Mapping[str, str] = NOTHING) -> dict[int, int]:
    """Client to node id, for clients 0 to ``num_clients - 1``, once all have joined.

    A node without a policy joins only if its experiment is the ``same`` (``Experiment.same``). Raises
    ``FederationError`` if a client is missing after ``timeout`` seconds, or if two nodes claim one partition.
    """
    deadline = time.monotonic() + timeout
    nodes: dict[int, int] = {}
    problems: dict[int, str] = {}
    while True:
        strangers = sorted(set(grid.get_node_ids()) - set(nodes.values()))
        for node, client in _identities(grid, strangers, same, max(timeout, POLL_SECONDS)):
            if isinstance(client, RecordError):
                problems[node] = str(client)
            elif not 0 <= client < num_clients:
                problems[node] = f"partition {client} is not among the {num_clients} of this run"
            elif client in nodes:
                raise FederationError(f"nodes {nodes[client]} and {node} both say that they hold partition {client}")
            else:
                nodes[client] = node
        if len(nodes) == num_clients:
            break
        if time.monotonic() > deadline:
            missing = sorted(set(range(num_clients)) - set(nodes))
            hint = f"; node {min(problems)} said: {problems[min(problems)]}" if problems else ""
            raise FederationError(
                f"{len(nodes)} of {num_clients} clients joined within {timeout:g} s; missing are {missing[:10]}{hint}"
            )
        time.sleep(POLL_SECONDS)
    for node, problem in problems.items():
        if node not in nodes.values():
            log.warning("node %d is left out: %s", node, problem)
    return nodes


def who_is_there(
    grid: Grid, known: Mapping[int, int], num_clients: int, same: Mapping[str, str] = NOTHING
) -> dict[int, int]:
    """Client to node id of the connected clients; a client may come back with another node id."""
    connected = set(grid.get_node_ids())
    nodes = {client: node for client, node in known.items() if node in connected}
    for node, client in _identities(grid, sorted(connected - set(nodes.values())), same, ASK_SECONDS):
        if not isinstance(client, RecordError) and 0 <= client < num_clients and client not in nodes:
            nodes[client] = node
            log.info("client %d is now node %d", client, node)
    return nodes


def _identities(
    grid: Grid, nodes: Iterable[int], same: Mapping[str, str], timeout: float
) -> Iterator[tuple[int, int | RecordError]]:
    """Each of ``nodes`` that replies, with its client, or with the reason why it has none."""
    questions = [Message(records.same_content(same), node, MessageType.QUERY) for node in nodes]
    for reply in grid.send_and_receive(questions, timeout=timeout) if questions else ():
        try:
            yield reply.metadata.src_node_id, records.read_identity(reply)
        except RecordError as error:
            yield reply.metadata.src_node_id, error


class Directory:
    """The node of each client; on a network, clients leave and come back with other nodes."""

    def __init__(self, num_clients: int, join_timeout: float, same: Mapping[str, str] = NOTHING) -> None:
        self.num_clients, self.join_timeout, self._same = num_clients, join_timeout, same
        self.nodes: dict[int, int] = {}
        self._clients: dict[int, int] = {}

    def meet(self, grid: Grid) -> None:
        """Find the node of each client, and wait for all clients; a simulation knows the nodes."""
        if isinstance(grid, SimulationGrid):
            self._set(grid.nodes_by_client(self.num_clients))
        else:
            self._set(identify_nodes(grid, self.num_clients, self.join_timeout, self._same))

    def look_again(self, grid: Grid, least: int) -> None:
        """Find the connected clients; raise ``FederationError`` if fewer than ``least`` join in ``join_timeout``."""
        if isinstance(grid, SimulationGrid):
            return
        deadline = time.monotonic() + self.join_timeout
        while len(nodes := who_is_there(grid, self.nodes, self.num_clients, self._same)) < least:
            if time.monotonic() > deadline:
                raise FederationError(
                    f"{len(nodes)} clients are connected, fewer than min_clients={least}, after "
                    f"{self.join_timeout:g} s; look at the network and the devices' logs"
                )
            time.sleep(POLL_SECONDS)
        self._set(nodes)

    def client_at(self, node: int) -> int | None:
        """The client that ``node`` holds, if any."""
        return self._clients.get(node)

    def sender(self, reply: Message, sent: Iterable[Message]) -> int:
        """The node that ``reply`` belongs to, also if Flower replies for a node that died."""
        node = reply.metadata.src_node_id
        if node != compat.SERVER_NODE_ID:
            return node
        asked = {message.metadata.message_id: message.metadata.dst_node_id for message in sent}
        return asked.get(reply.metadata.reply_to_message_id, node)

    def question(self, client: int) -> Message:
        """An empty message to ``client``: the server writes replies in the name of a client to it."""
        return Message(RecordDict(), self.nodes[client], MessageType.TRAIN)

    def _set(self, nodes: dict[int, int]) -> None:
        self.nodes, self._clients = nodes, {node: client for client, node in nodes.items()}


class CohortGrid(Grid):
    """A view of ``grid`` with only ``node_ids``."""

    def __init__(self, grid: Grid, node_ids: Iterable[int]) -> None:
        self._grid = grid
        self._node_ids = list(node_ids)

    def set_run(self, run: compat.Run) -> None:
        """Pass to the grid."""
        self._grid.set_run(run)

    @property
    def run(self) -> compat.Run:
        """Pass to the grid."""
        return self._grid.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Pass to the grid."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """The cohort's nodes."""
        return list(self._node_ids)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Pass to the grid."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pass to the grid."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Pass to the grid."""
        return self._grid.send_and_receive(messages, timeout=timeout)
