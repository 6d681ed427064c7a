"""``fed-dpsat init``: a project of each kind is written, works as its README says, and its own test passes."""

from __future__ import annotations

import runpy
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from fed_dpsat.cli import app
from fed_dpsat.lab.starter import KINDS


def init(folder, *arguments):
    return CliRunner().invoke(app, ["init", str(folder), *arguments])


@pytest.mark.parametrize("kind", KINDS)
def test_it_writes_the_files_that_its_readme_names(tmp_path, kind):
    result = init(tmp_path / "deep" / "mine", "--kind", kind)
    assert result.exit_code == 0, result.output
    files = {file.name for file in (tmp_path / "deep" / "mine").iterdir()}
    assert {"README.md", f"test_{kind}.py"} < files
    commands = [
        line for line in (tmp_path / "deep" / "mine" / "README.md").read_text().splitlines() if line[:4] == "    "
    ]
    assert len(commands) == 4
    for command in commands:
        named = [word for word in command.partition("#")[0].split() if word.endswith(".toml")]
        assert files >= set(named)
        assert command in result.output


def test_the_test_of_a_device_passes(tmp_path):
    init(tmp_path / "mine", "--kind", "device")
    runpy.run_path(str(tmp_path / "mine" / "test_device.py"))["test_the_data_fit_the_policy"]()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_its_whole_test_and_its_commands_run(tmp_path, kind):
    init(tmp_path / "mine", "--kind", kind)
    lines = (tmp_path / "mine" / "README.md").read_text().splitlines()
    for command in (line.partition("#")[0].split() for line in lines if line.startswith("    ")):
        if command[:3] == ["fed-dpsat", "device", "run"]:
            continue  # it has no server
        start = [sys.executable] if command[0] == "python" else [sys.executable, "-m", "fed_dpsat"]
        done = subprocess.run(
            [*start, *command[1:]], cwd=tmp_path / "mine", capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_folder_that_is_not_empty_and_an_unknown_kind_are_refused(tmp_path):
    (tmp_path / "notes.txt").touch()
    result = init(tmp_path)
    assert result.exit_code == 2
    assert f"FOLDER={str(tmp_path)!r} is not new or empty; name another one" in result.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
    result = init(tmp_path / "new", "--kind", "optimiser")
    assert result.exit_code == 2
    assert "'optimiser' is not one of simulation, strategy, optimizer, device" in result.stderr
    assert not (tmp_path / "new").exists()
