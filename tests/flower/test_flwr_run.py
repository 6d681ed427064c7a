"""``flwr run .`` trains with the handlers that ``fed-dpsat run`` uses, to the same bits."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import torch

from fed_dpsat.settings.config import RunConfig
from fed_dpsat.simulation import simulate
from fed_dpsat.step.gradients import compiled

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "num_rounds": 2,
    "num_clients": 3,
    "clients_per_round": 2,
    "target_epsilon": 2.0,
    "local_steps": 2,
    "join_timeout": 600.0,
}
BIN = Path(sys.executable).parent
FLWR = (
    "import flwr.cli.local_superlink as local; local.LOCAL_SUPERLINK_STARTUP_TIMEOUT = 120; "
    "from flwr.cli.app import app; app()"
)
"""``flwr`` on a busy machine: its SuperLink has 15 s to start, which an import alone can take there."""


def app_table() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]


def test_the_apps_settings_are_those_of_run_config():
    table = app_table()["config"]
    assert RunConfig.from_mapping(table) == RunConfig(target_epsilon=3.0, delta=1e-4)
    assert list(table) == list(RunConfig(target_epsilon=3.0).settings())


def test_the_apps_components_are_there():
    from fed_dpsat.flower import client_app, server_app

    assert app_table()["components"] == {
        "serverapp": f"{server_app.__name__}:app",
        "clientapp": f"{client_app.__name__}:app",
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def flower_home(tmp_path):
    """A private Flower installation; what ``flwr run`` leaves running is ended by its process id."""
    home = tmp_path / "flwr"
    home.mkdir()
    environment = {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
        "FLWR_LOCAL_CONTROL_API_PORT": str(free_port()),
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{BIN}:{os.environ['PATH']}",
    }
    yield environment
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and f"FLWR_HOME={home}".encode() in (entry / "environ").read_bytes():
                os.kill(int(entry.name), signal.SIGKILL)


def test_the_bundle_has_all_that_a_run_reads():
    """Flower leaves out what is not Python, without a word. An installed package makes reports and new projects."""
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["fab-include"]
    package = {path for path in (ROOT / "fed_dpsat").rglob("*") if path.is_file() and path.suffix != ".pyc"}
    left_out = package - {path for pattern in patterns for path in ROOT.glob(pattern)}
    made_elsewhere = ("fed_dpsat/lab/report/templates/", "fed_dpsat/lab/starter/")
    assert {name for path in left_out if not (name := str(path.relative_to(ROOT))).startswith(made_elsewhere)} == {
        "fed_dpsat/py.typed"
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [{}, {"clients_per_round": 3, "secure_aggregation": True}, {"model": "tanh-cnn-small"}],
    ids=["linear", "secure", "convolutions"],
)
def test_flwr_run_trains_to_the_same_bits(flower_home, tmp_path, more):
    out = tmp_path / "run"
    settings = {**SETTINGS, **more}
    overrides = " ".join(f"{key}={json.dumps(value)}" for key, value in {**settings, "out": str(out)}.items())
    command = [
        sys.executable, "-c", FLWR, "run", str(ROOT), "local", "--stream", "-c", overrides,
        "--federation-config", "num-supernodes=3 client-resources-num-cpus=1 init-args-num-cpus=2",
    ]  # fmt: skip
    done = subprocess.run(command, env=flower_home, capture_output=True, text=True, timeout=900, cwd=tmp_path)
    deadline = time.monotonic() + 30
    while not (out / "summary.json").exists() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert (out / "summary.json").exists(), done.stdout[-3000:] + done.stderr[-3000:]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["status"] == "completed"
    assert summary["rounds_completed"] == 2
    assert RunConfig.load(out / "config.toml").kernels == compiled.decided("auto")
    assert not (out / "simulation.json").exists()  # label counts are private: only a simulation of ours writes them

    simulate(RunConfig(**settings, delta=1e-4), tmp_path / "here")
    models = [torch.load(f / "checkpoint" / "model.pt", weights_only=True)["params"] for f in (out, tmp_path / "here")]
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
