"""Who is who: nodes are matched to partitions before anything else, and a wrong federation is refused in words."""

from __future__ import annotations

import pytest
from flwr.app import ConfigRecord

from fed_dpsat.client import protocol
from fed_dpsat.client.protocol import PROTOCOL
from fed_dpsat.flower.grid import FIRST_NODE_ID, SimulationGrid
from fed_dpsat.flower.nodes import CohortGrid, FederationError, identify_nodes
from fed_dpsat.flower.wire import records
from fed_dpsat.simulation.in_process import InProcessBackend


def grid(app, num_nodes=3):
    return SimulationGrid(InProcessBackend(app, {}, num_nodes), num_nodes)


def test_nodes_are_known_by_their_partition(make_client_app):
    reverse = make_client_app(identity=lambda c: 2 - c)
    assert identify_nodes(grid(reverse), 3, timeout=0) == {2 - c: FIRST_NODE_ID + c for c in range(3)}


def test_a_missing_client_is_named(make_client_app):
    with pytest.raises(FederationError, match=r"3 of 4 clients joined within 0 s; missing are \[3\]"):
        identify_nodes(grid(make_client_app()), 4, timeout=0)


def test_an_unknown_partition_is_named(make_client_app):
    app = make_client_app(identity=lambda c: c + 1)
    with pytest.raises(FederationError, match="partition 3 is not among the 3"):
        identify_nodes(grid(app), 3, timeout=0)


def test_two_nodes_with_one_partition_are_refused(make_client_app):
    with pytest.raises(FederationError, match="both say that they hold partition 0"):
        identify_nodes(grid(make_client_app(identity=lambda c: 0)), 3, timeout=0)


def test_a_spare_node_is_left_out(make_client_app):
    assert sorted(identify_nodes(grid(make_client_app(), 5), 3, timeout=0)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("stated", "theirs"), [({"protocol": PROTOCOL + 1, "version": "9.0.0"}, "9.0.0"), ({}, "0.1.0 or older")]
)
def test_a_client_with_another_protocol_does_not_join(make_client_app, monkeypatch, stated, theirs):
    monkeypatch.setattr(protocol, "stated", lambda: stated)  # of the clients: this process is the server too
    with pytest.raises(FederationError) as error:
        identify_nodes(grid(make_client_app()), 3, timeout=0)
    assert "0 of 3 clients joined" in str(error.value)
    assert f"it has fed-dpsat {theirs}, this server has {protocol.installed()}" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_client_refuses_a_server_with_another_protocol():
    content = records.same_content({"sha256": "a"})
    records.check_same(content, "a")
    content[records.PROTOCOL] = ConfigRecord({"protocol": PROTOCOL + 1, "version": "9.0.0"})
    with pytest.raises(records.RecordError, match=r"the server has fed-dpsat 9\.0\.0, this client has"):
        records.check_same(content, "a")


def test_the_cohort_view_shows_the_cohort(make_client_app):
    assert list(CohortGrid(grid(make_client_app()), [3]).get_node_ids()) == [3]
