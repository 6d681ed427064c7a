"""What the README promises beyond what tests/test_docs.py checks of every page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import fed_dpsat

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_a_run_from_objects_takes_less_than_twenty_lines():
    assert len(BLOCKS[0].strip().splitlines()) < 20


def test_every_export_can_be_had():
    for name in fed_dpsat.__all__:
        assert getattr(fed_dpsat, name)
    assert set(dir(fed_dpsat)) >= set(fed_dpsat.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fed_dpsat.nothing  # noqa: B018
