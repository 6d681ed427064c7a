"""What docs/strategies.md promises beyond what tests/test_docs.py checks: its strategy is run and tested."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fed_dpsat import plugins
from fed_dpsat.cli import app
from fed_dpsat.testing.half import HALF_CHECKS
from fed_dpsat.testing.strategy import CHECKS

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "strategies.md").read_text()
FILES = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", TEXT, flags=re.DOTALL))
COMMANDS = [
    line for block in re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL) for line in block.splitlines() if line
]


@pytest.fixture
def tutorial(tmp_path, monkeypatch):
    """A folder that holds just the files of the tutorial."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_tutorial_is_short():
    assert list(FILES) == ["bounded_mean.py", "test_bounded_mean.py", "blend.py", "test_blend.py"]
    assert sum(len(text.splitlines()) for name, text in FILES.items() if "bounded_mean" in name) <= 36
    assert sum(len(text.splitlines()) for name, text in FILES.items() if "blend" in name) <= 42


@pytest.mark.slow
def test_its_strategy_runs_by_its_command(tutorial):
    (command,) = (line for line in COMMANDS if "bounded_mean" in line)
    program, *arguments = shlex.split(command)
    result = CliRunner().invoke(app, [*arguments, "--out", "run", "--json"])
    assert program == "fed-dpsat"
    assert result.exit_code == 0, result.output
    assert 'bounded_mean.py:bounded_mean"' in (tutorial / "run" / "summary.json").read_text()


@pytest.mark.slow
def test_its_conformance_test_passes_and_can_fail(tutorial):
    names: dict[str, object] = {}
    exec(compile(FILES["test_bounded_mean.py"], "test_bounded_mean.py", "exec"), names)
    names["test_it_conforms"]()
    spoiled = FILES["bounded_mean.py"].replace("return (updates", "return -(updates")
    (tutorial / "bounded_mean.py").write_text(spoiled)
    with pytest.raises(AssertionError, match="equal_replies_move_that_way"):
        names["test_it_conforms"]()


def test_its_half_runs_by_its_command(tutorial):
    (command,) = re.findall(r"fed-dpsat run --set strategy=blend(?:.*\\\n)*.*", TEXT)
    _, *arguments = shlex.split(command.replace("\\\n", " "))
    result = CliRunner().invoke(app, [*arguments, "--out", "run", "--json"])
    assert result.exit_code == 0, result.output
    assert "personal_accuracy" in (tutorial / "run" / "summary.json").read_text()


def test_it_names_every_check_strategy_and_attack():
    checks = [check.__name__ for check in (*CHECKS, *HALF_CHECKS)]
    for name in [*checks, *plugins.builtin("strategy"), *plugins.builtin("attack")]:
        assert f"`{name}`" in TEXT, name
