"""A node that answers with the code that is installed on it, and nothing of another app."""

from __future__ import annotations

import pytest
from flwr.app import ConfigRecord, MessageType, RecordDict

from fed_dpsat.accounting import PrivacyLedger
from fed_dpsat.client.protocol import PROTOCOL
from fed_dpsat.device.node import _pass_on, check_server, free_port, other_app, run_device
from fed_dpsat.device.policy import PolicyError
from fed_dpsat.device.release import ledger_path
from fed_dpsat.flower.wire import compat, records


def run_of(fab_id: str):
    run = compat.empty_run()
    run.fab_id = fab_id
    return run


def test_another_app_is_told():
    assert other_app(run_of("fed-dpsat/fed-dpsat")) == ""
    assert "of the app 'evil/app'" in other_app(run_of("evil/app"))


def test_a_policy_without_a_server_does_not_run(device):
    with pytest.raises(PolicyError, match="set server, root_certificates and private_key"):
        run_device(device.policy_path)


def test_addresses_and_files_that_are_none_are_told(tmp_path):
    with pytest.raises(PolicyError, match=r"root_certificates=.* is not a file"):
        check_server("127.0.0.1:1", str(tmp_path / "none.crt"))
    for server in ("127.0.0.1:port", "localhost", ":9092", ""):
        with pytest.raises(PolicyError, match="is not of the form host:port"):
            check_server(server, str(tmp_path / "none.crt"))
    (tmp_path / "ca.crt").write_text("")
    with pytest.raises(PolicyError, match=r"root_certificates=.* is not a certificate in PEM"):
        check_server("127.0.0.1:1", str(tmp_path / "ca.crt"))


def test_free_ports_are_ports():
    assert 1024 <= free_port() < 65536


def test_lines_of_the_supernode_keep_their_level_and_lose_their_colours(caplog):
    lines = [b"\x1b[92mINFO \x1b[0m:      \n", b"\x1b[91mERROR\x1b[0m:     no server\n", b"Uvicorn runs\n"]
    with caplog.at_level("INFO", logger="fed_dpsat"):
        _pass_on(lines)
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [("ERROR", "no server"), ("INFO", "Uvicorn runs")]
    assert caplog.records[0].fields == {"of": "SuperNode"}


OTHER = ("the server has fed-dpsat 9.0.0, this device has ", "different protocols; install the same version on both")
STATEMENTS = {
    "another": (RecordDict({records.PROTOCOL: ConfigRecord({"protocol": PROTOCOL + 1, "version": "9.0.0"})}), OTHER),
    "none": (RecordDict(), ("the server has fed-dpsat 0.1.0 or older, this device has ", OTHER[1])),
}


@pytest.mark.parametrize(("stated", "said"), STATEMENTS.values(), ids=STATEMENTS)
def test_a_server_with_another_protocol_is_refused_before_a_charge(device, stated, said):
    replies = [
        device.send(RecordDict(), MessageType.QUERY, stated=stated),
        device.ask(stated=stated),
    ]
    for reply in replies:
        assert all(part in reply.error.reason for part in said)
        assert "\n" not in reply.error.reason
    with PrivacyLedger(ledger_path(device.folder), readonly=True) as ledger:
        assert ledger.head.charges == 0
    assert not device.ask().has_error()
