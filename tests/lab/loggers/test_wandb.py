"""Weights & Biases offline: the file of the run holds the rounds, and says nothing of the machine."""

from __future__ import annotations

import platform

import pytest

from fed_dpsat.simulation import resume

pytest.importorskip("wandb")


@pytest.mark.slow
def test_offline_it_writes_a_file_and_goes_on_under_its_id(run, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = run("wandb", data_path="/a/place/of/mine")
    (file,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    written = file.read_bytes()
    for word in (b"test_accuracy", b"clients/dropped", b"timing/seconds", b"noise_multiplier"):
        assert word in written, word
    for word in (b"/a/place/of/mine", str(folder).encode(), platform.node().encode() + b"\n", b"pytest"):
        assert word not in written, word
    (folder / "summary.json").unlink()
    resume(folder)
    assert len({path.stem for path in (folder / "wandb").glob("offline-run-*/*.wandb")}) == 1
