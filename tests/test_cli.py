"""The command line as a user meets it: exit codes, one clear line, tables that are also JSON."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fed_dpsat.cli import LISTS, app
from fed_dpsat.errors import RunError
from fed_dpsat.lab.settings_view import FEW
from fed_dpsat.plugins import PACKAGES
from fed_dpsat.run.folder import RunFolder
from fed_dpsat.settings.flat import SPECS

FAST = ["--set", "num_rounds=2", "--set", "noise_multiplier=2.0", "--set", "delta=1e-4"]


def invoke(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


def test_run_prints_rounds_a_table_and_the_folder(tmp_path):
    result = invoke("run", "--out", tmp_path / "run", *FAST)
    assert result.exit_code == 0, result.output
    for words in ("round 2/2", "accuracy", "epsilon", "at delta 0.0001 (PLD)", "reproducible, not private"):
        assert words in result.output
    assert (tmp_path / "run" / "summary.json").exists()


def test_run_as_json_is_the_summary(tmp_path):
    result = invoke("run", "--out", tmp_path / "run", "--json", *FAST)
    assert json.loads(result.stdout) == json.loads((tmp_path / "run" / "summary.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "lrr=1"], "lrr=1 is not a setting; did you mean lr"),
        (["--set", "sample_rate=1.2"], "sample_rate=1.2 is not above 0 and at most 1"),
        (["--set", "optimizer=dp-sta"], "did you mean dp-sat"),
        (["--set", "dataset=cifar10"], "data_source='embedded'"),
        (["--set", "dataset=cifar10", "--set", "data_source=parquet", "--set", "data_path=nowhere"], "hf download"),
        (["--set", "num_clients=5000"], "num_clients=5000"),
        (["--set", "model=dpnasnet-cifar"], "dpnasnet-cifar"),
        (["--set", "strategy=nothing:here"], "cannot import 'nothing'"),
        (["missing.toml"], "missing.toml"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, arguments, words):
    result = invoke("run", "--out", tmp_path / "run", *FAST, *arguments)
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert "Traceback" not in result.output
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(tmp_path, full_disk):
    """The ledger fits, the checkpoint does not: the first round cannot be over."""
    settings = [*FAST, "--set", "num_clients=2", "--set", "model=tanh-cnn-small"]
    with full_disk(80_000):
        result = invoke("run", "--out", tmp_path / "run", *settings)
    assert result.exit_code == 1, result.output
    model = tmp_path / "run" / "checkpoint" / "model.pt"
    assert result.stderr.startswith(f"error: cannot write {model}: File too large; free space, then `fed-dpsat resume`")
    assert f"has 0 finished rounds; `fed-dpsat resume {tmp_path}/run` continues" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert invoke("resume", tmp_path / "run").exit_code == 0


def test_what_cannot_be_written_elsewhere_is_one_line(tmp_path):
    invoke("run", "--out", tmp_path / "run", *FAST)
    (tmp_path / "file").touch()
    result = invoke("report", tmp_path / "run", "--out", tmp_path / "file" / "page.html")
    assert result.exit_code in (1, 2)
    assert len(result.stderr.strip().splitlines()) == 1
    assert "Traceback" not in result.output


def test_no_choice_of_noise_is_not_a_choice_of_none():
    result = invoke("run")
    assert result.exit_code == 2
    assert "set one of the two above 0, or private=false" in result.stderr


def test_every_client_failing_is_exit_code_one(tmp_path, untried):
    plugin = tmp_path / "broken.py"
    plugin.write_text(
        "from torch import nn\n"
        "class Broken(nn.Module):\n"
        '    """Fails in training only."""\n'
        "    def __init__(self, num_classes):\n"
        "        super().__init__()\n"
        "        self.linear = nn.Linear(64, num_classes)\n"
        "    def forward(self, x):\n"
        "        if self.training:\n"
        "            raise RuntimeError('broken layer')\n"
        "        return self.linear(x.flatten(1))\n"
    )
    result = invoke("run", "--out", tmp_path / "run", *FAST, "--set", f"model={plugin}:Broken")
    assert result.exit_code == 1
    assert "every client that was asked failed" in result.stderr
    assert "broken layer" in result.stderr


def test_list_names_every_kind_with_a_line_each():
    found = json.loads(invoke("list", "--json").stdout)
    assert {"dp-sgd", "dp-sat", "dp-sat-momentum"} <= found["optimizer"].keys()
    assert {"digits", "cifar10", "cifar100", "fashion_mnist", "mnist", "svhn"} <= found["dataset"].keys()
    assert {"iid", "dirichlet", "shards", "size-skew"} <= found["partition"].keys()
    assert "fedavg" in found["strategy"]
    assert {"linear", "timm:...", "torchvision:...", "transformers:..."} <= found["model"].keys()
    assert all(line for plugins in found.values() for line in plugins.values())
    assert "dp-sat-momentum" in invoke("list").output


def test_list_prints_one_kind_and_names_the_kinds_for_an_unknown_one():
    assert json.loads(invoke("list", "strategies", "--json").stdout).keys() == {"strategy"}
    assert invoke("list", "optimizer").output == invoke("list", "optimizers").output
    assert set(LISTS.values()) == {*PACKAGES, "preset"}
    result = invoke("list", "optimisers")
    assert result.exit_code == 2
    assert "'optimisers' is not one of optimizers, noise_mechanisms, models, datasets, " in result.stderr
    assert "did you mean optimizers?" in result.stderr


def test_the_help_of_run_is_short_and_help_all_has_every_setting_by_groups(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fed_dpsat.cli.out_console.width", 200)
    short, whole = invoke("run", "--help"), invoke("run", "--help-all")
    assert short.exit_code == whole.exit_code == 0
    found = [name for name in SPECS if re.search(rf"^│ {name} ", short.output, re.MULTILINE)]
    assert set(found) == set(FEW)
    assert "--help-all shows all" in short.output
    missing = [name for name in SPECS if not re.search(rf"^│ {name} ", whole.output, re.MULTILINE)]
    assert not missing
    for words in ("Settings: Data", "Settings: Privacy", "Settings: Machine", "[default: ~/.cache/fed_dpsat]"):
        assert words in whole.output
    assert not Path("runs").exists()


def test_the_version_the_module_and_completion(monkeypatch):
    assert invoke("--version").output == f"fed-dpsat {version('fed-dpsat')}\n"
    done = subprocess.run([sys.executable, "-m", "fed_dpsat", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == invoke("--version").output
    assert "--install-completion" in invoke("--help").output

    def completed(*words):
        environment = {
            "_FED_DPSAT_COMPLETE": "complete_bash",
            "COMP_WORDS": " ".join(("fed-dpsat", *words)),
            "COMP_CWORD": str(len(words)),
        }
        return CliRunner().invoke(app, [], prog_name="fed-dpsat", env=environment).output.split()

    assert completed("cali") == ["calibrate"]
    assert completed("run", "--set", "num_r") == ["num_rounds="]
    assert completed("list", "opt") == ["optimizers"]


def test_a_run_of_which_nothing_is_left_says_so_and_one_with_rounds_how_it_goes_on(tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("fed_dpsat.simulation.try_federation", interrupted)
        result = invoke("run", "--out", tmp_path / "run", *FAST)
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "error: interrupted; no client was asked, and nothing was written"
    for error, code in ((KeyboardInterrupt(), 130), (RunError("lost"), 1), (KeyError("odd"), 1)):
        with monkeypatch.context() as patched:
            patched.setattr(RunFolder, "save_quality", raising(error))
            result = invoke("run", "--out", tmp_path / "run", "--overwrite", *FAST)
        assert result.exit_code == code
        continues = f"{tmp_path}/run has 2 finished rounds; `fed-dpsat resume {tmp_path}/run` continues"
        assert result.stderr.splitlines()[-1].endswith(continues)
    assert invoke("resume", tmp_path / "run").exit_code == 0


def raising(error):
    def fail(*_, **__):
        raise error

    return fail


def test_calibrate_prints_noise_and_epsilon_against_rounds():
    arguments = ["--set", "target_epsilon=3", "--set", "delta=1e-4", "--set", "num_rounds=10"]
    found = json.loads(invoke("calibrate", "--json", *arguments).stdout)
    assert found["table"][-1]["rounds"] == 10
    assert 2.98 < found["table"][-1]["epsilon_pld"] <= 3
    assert found["table"][-1]["epsilon_rdp"] > found["table"][-1]["epsilon_pld"]
    assert f"{found['noise_multiplier']:.4f}" in invoke("calibrate", *arguments).output


def test_calibrate_says_what_it_protects_and_finds_noise_for_whole_clients():
    of_clients = ["--set", "privacy_unit=client", "--set", "client_sampling=poisson", "--set", "clients_per_round=10"]
    arguments = [*of_clients, "--set", "num_clients=100", "--set", "target_epsilon=4", "--set", "delta=1e-3"]
    found = json.loads(invoke("calibrate", "--json", *arguments).stdout)
    assert found["privacy_unit"].startswith("one whole client")
    assert (found["sample_rate"], found["local_steps"]) == (0.1, 1)
    assert 3.95 < found["table"][-1]["epsilon_pld"] <= 4
    output = " ".join(invoke("calibrate", *arguments).output.split())
    assert "client rate 0.1, one release a round" in output
    assert "the server is trusted" in output
    plain = " ".join(invoke("calibrate", "--set", "target_epsilon=4", "--set", "delta=1e-3").output.split())
    assert "one example of one client" in plain
    assert "delta=0.001 is small enough for clients with at most 999 examples" in plain
    assert found["delta_is_for"].startswith("delta=0.001 is below 1/100, one of the clients")
    large = invoke("calibrate", "--json", *arguments, "--set", "delta=0.01")
    assert json.loads(large.stdout)["delta_is_for"].startswith("delta=0.01 is not below 1/100")


def test_ledger_prints_a_line_per_client_and_totals(tmp_path):
    folder = tmp_path / "run"
    invoke("run", "--out", folder, *FAST)
    found = json.loads(invoke("ledger", folder, "--json").stdout)
    assert found["clients"][0].keys() >= {"client", "rounds", "steps", "epsilon", "delta", "budget", "state"}
    assert [row["rounds"] for row in found["clients"]] == [2] * 10
    assert found["epsilon"] == json.loads((folder / "summary.json").read_text())["epsilon"]
    shown = invoke("ledger", folder).output
    assert "20 charges, chain unbroken" in shown


def test_ledger_of_an_edited_file_is_an_error(tmp_path):
    folder = tmp_path / "run"
    invoke("run", "--out", folder, *FAST)
    with sqlite3.connect(folder / "ledger.sqlite") as connection:
        for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            connection.execute(f"DROP TRIGGER {name}")
        connection.execute("UPDATE charges SET noise_multiplier = 100.0 WHERE round = 2")
    result = invoke("ledger", folder)
    assert result.exit_code == 1
    assert "Traceback" not in result.output


def test_plan_names_a_strategy_per_layer():
    arguments = ["--set", "target_epsilon=3", "--set", "model=selu-cnn-small"]
    found = json.loads(invoke("plan", "--json", *arguments).stdout)
    assert [row["layer"] for row in found["layers"]] == ["conv2d"] * 3 + ["linear"]
    assert found["one_by_one_because"] == ""
    assert "13.weight" in invoke("plan", *arguments).output


def test_plan_says_what_a_client_receives():
    arguments = ["--set", "target_epsilon=3", "--set", "model=mlp", "--set", "train_layers=head"]
    found = json.loads(invoke("plan", "--json", *arguments).stdout)
    assert (found["parameters"], found["sent_parameters"], found["sent_bytes"]) == (9610, 1290, 5160)
    said = "A client receives 1,290 of 9,610 parameters in a round, 5,160 bytes in float32"
    assert said in invoke("plan", *arguments).output


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_ctrl_c_leaves_a_readable_folder_and_no_process(tmp_path, workers):
    folder = tmp_path / "run"
    command = [
        sys.executable, "-m", "fed_dpsat.cli", "run", "--out", str(folder), "--set", "num_rounds=100000",
        "--set", "noise_multiplier=50.0", "--set", "evaluate_every=1000", "--set", f"workers={workers}",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores Ctrl-C
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (folder / "rounds.jsonl").exists() or (folder / "rounds.jsonl").read_text().count("\n") < 4:
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors.decode()
    assert b"interrupted; " in errors
    assert f"`fed-dpsat resume {folder}` continues".encode() in errors
    assert b"Traceback" not in errors
    assert json.loads((folder / "summary.json").read_text())["status"] == "interrupted"
    for line in (folder / "rounds.jsonl").read_text().splitlines():
        json.loads(line)
    assert not left_over(process.pid), "processes of the run are still alive"


@pytest.mark.slow
def test_a_worker_that_dies_is_one_line_and_leaves_the_json_whole(tmp_path):
    """Ray prints a page into stdout."""
    (tmp_path / "dying.py").write_text(
        "import os, pathlib, signal\n"
        "from torch import nn\n"
        "class Dying(nn.Module):\n"
        '    """Kills the first worker that trains once the run is under way, and not in its trial."""\n'
        "    def __init__(self, num_classes):\n"
        "        super().__init__()\n"
        "        self.linear = nn.Linear(64, num_classes)\n"
        "    def forward(self, x):\n"
        "        once = pathlib.Path(__file__).with_name('died')\n"
        "        on_ray = b'ray::' in pathlib.Path('/proc/self/cmdline').read_bytes()\n"
        "        under_way = pathlib.Path(__file__).with_name('run').joinpath('rounds.jsonl').exists()\n"
        "        if self.training and on_ray and under_way and not once.exists():\n"
        "            once.touch()\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return self.linear(x.flatten(1))\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "fed_dpsat.cli", "run", "--out", str(tmp_path / "run"), "--json", *FAST,
         "--set", "workers=1", "--set", f"model={tmp_path}/dying.py:Dying"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert (tmp_path / "died").exists()
    assert json.loads(done.stdout)["status"] == "completed"
    assert "a worker ended: its worker died; it had 1 clients at work" in " ".join(done.stderr.split())
    assert "raylet" not in done.stderr


def left_over(session: int) -> list[str]:
    """Command lines of live processes whose session is the run's, or that Ray started for it."""
    deadline = time.monotonic() + 20
    while True:
        alive = []
        for entry in os.listdir("/proc"):
            try:
                stat = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split() if entry.isdigit() else None
            except OSError:
                continue
            if stat and stat[0] != "Z" and int(stat[3]) == session:
                alive.append(entry)
        if not alive or time.monotonic() > deadline:
            return alive
        time.sleep(0.5)


def test_resume_goes_on_and_a_complete_run_is_shown_again(tmp_path):
    folder = tmp_path / "run"
    assert invoke("run", "--out", folder, "--profile", *FAST).exit_code == 0
    assert (folder / "trace.json").exists()
    (folder / "summary.json").unlink()  # as if it had been killed before it wrote it
    result = invoke("resume", folder, "--set", "reply_timeout=60")
    assert result.exit_code == 0, result.output
    assert "clients/s" in result.output
    first = (folder / "summary.json").read_bytes()
    assert invoke("resume", folder, "--json").exit_code == 0
    assert (folder / "summary.json").read_bytes() == first


@pytest.mark.parametrize(
    ("change", "words"),
    [("lr=1.0", "other settings (lr)"), ("lrr=1", "lrr=1 is not a setting"), ("lr", "of the form key=value")],
)
def test_resume_refuses_in_one_line(tmp_path, change, words):
    folder = tmp_path / "run"
    invoke("run", "--out", folder, *FAST)
    (folder / "summary.json").unlink()
    result = invoke("resume", folder, "--set", change)
    assert result.exit_code == 2
    assert words in result.stderr
    assert invoke("resume", tmp_path / "nothing").exit_code == 2


def test_flowers_logger_is_afterwards_as_it_was(monkeypatch):
    flower = logging.getLogger("flwr")
    monkeypatch.setattr(flower, "level", logging.INFO)
    assert CliRunner().invoke(app, ["calibrate", "--set", "modle=linear"]).exit_code == 2
    assert flower.level == logging.INFO
