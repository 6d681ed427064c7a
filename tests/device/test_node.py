"""A node that answers with the code that is installed on it, and nothing of another version or app."""

from __future__ import annotations

from importlib.metadata import version

import pytest

from fed_dpsat.device.node import _pass_on, check_server, free_port, other_version, run_device
from fed_dpsat.device.policy import PolicyError
from fed_dpsat.flower.wire import compat


def run_of(fab_id: str, fab_version: str):
    run = compat.empty_run()
    run.fab_id, run.fab_version = fab_id, fab_version
    return run


def test_the_installed_version_is_answered():
    assert other_version(run_of("fed-dpsat/fed-dpsat", version("fed-dpsat"))) == ""


def test_another_version_or_app_is_told():
    assert "the server runs fed-dpsat 99.0, this device has" in other_version(run_of("fed-dpsat/fed-dpsat", "99.0"))
    assert "of the app 'evil/app'" in other_version(run_of("evil/app", version("fed-dpsat")))


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
