"""What the README shows works: its Python blocks run, and the names it mentions exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import fed_dpsat

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS)
def test_python_blocks_run(block, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_a_run_from_objects_takes_less_than_twenty_lines():
    assert len(BLOCKS[0].strip().splitlines()) < 20


def test_files_and_simulations_that_are_named_exist():
    for path in re.findall(r"`((?:fed_dpsat|strategies|simulations|docs)/[\w/]+\.\w+)`", README):
        assert (ROOT / path).exists(), path


def test_every_export_can_be_had():
    for name in fed_dpsat.__all__:
        assert getattr(fed_dpsat, name)
    assert set(dir(fed_dpsat)) >= set(fed_dpsat.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fed_dpsat.nothing  # noqa: B018
