"""The step benchmark takes networks of libraries by name, and says why something does not run. Times are not tested."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks import contestants, networks, step
from fed_dpsat.errors import ModelError

LIBRARY = {
    **dict.fromkeys(("vit", "swin-t"), "torchvision"),
    **dict.fromkeys(("timm-vit-tiny", "deit", "convnext-atto"), "timm"),
    **dict.fromkeys(("minilm", "minilm-dropout", "gpt2", "llama"), "transformers"),
    "minilm-lora": "peft",
}
KEYS = {"engine", "model", "batch", "median_seconds", "ratio_to_nonprivate", "peak_mb", "reason"}


def measured(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["step", *arguments, "--batch", "2", "--repeats", "1"])
    return step._measure(args := step._arguments(), args.model[0], 2)


@pytest.mark.by_default("vit", "gpt", "gru", "lstm")
@pytest.mark.parametrize("name", networks.NETWORKS)
def test_every_network_has_a_loss_for_each_example(name):
    if name in LIBRARY:
        pytest.importorskip(LIBRARY[name])
    made = contestants.problem(name, 2, length=4)
    assert made.module.training
    losses = made.criterion(made.module(made.inputs), made.targets)
    assert losses.shape == (2,)
    assert bool(losses.isfinite().all())


def test_the_loss_of_a_text_is_the_mean_over_its_next_tokens():
    logits, tokens = torch.randn(2, 3, 5), torch.tensor([[1, 4, 2], [0, 0, 3]])
    found = networks.next_token(logits, tokens)
    for i in range(2):
        wanted = torch.nn.functional.cross_entropy(logits[i, :2], tokens[i, 1:])
        torch.testing.assert_close(found[i], wanted)


def test_heads_of_language_models_are_their_embedding():
    gpt = networks.GPT(4)
    assert gpt.head.weight is gpt.words.weight
    assert sum(p.numel() for p in gpt.parameters()) == pytest.approx(7.3e6, rel=0.01)


@pytest.mark.parametrize("name", ["torchvision:squeezenet1_0", "timm:test_vit2"])
def test_names_of_libraries_are_those_of_settings(name):
    pytest.importorskip(name.partition(":")[0])
    made = contestants.problem(name, 2)
    assert made.module(made.inputs).shape == (2, 10)


def test_rows_of_a_network_with_opacus(monkeypatch):
    rows = measured(monkeypatch, "--model", "gru", "--length", "3", "--against", "opacus,dp-sat", "--no-memory")
    assert all(row.keys() == KEYS for row in rows)
    ran = {row["engine"]: row["ratio_to_nonprivate"] for row in rows if not row["reason"]}
    assert {"nonprivate contiguous", "planned", "dp-sat", "opacus hooks"} <= ran.keys()
    assert ran["nonprivate contiguous"] == 1
    assert json.loads(json.dumps(rows)) == rows


def test_a_contestant_that_cannot_run_the_network_says_why(monkeypatch):
    def refuse(made, mode):
        raise ValueError(f"no {mode}\nand more")

    monkeypatch.setattr(contestants, "_opacus_step", refuse)
    rows = measured(monkeypatch, "--model", "gru", "--length", "3", "--against", "opacus", "--no-memory")
    assert {row["engine"]: row["reason"] for row in rows if row["reason"]} == {
        f"opacus {mode}": f"ValueError: no {mode} and more" for mode in contestants.OPACUS_MODES
    }
    assert "| opacus ew | does not run: ValueError: no ew and more |" in step._table(rows)
    assert "opacus hooks ValueError: no hooks and more" in step._summary(rows)


@pytest.mark.parametrize("error", [ImportError("no library"), ModelError("no library")])
def test_a_network_without_its_library_is_a_row(monkeypatch, error):
    def missing(size, length):
        raise error

    monkeypatch.setitem(networks.NETWORKS, "gru", missing)
    (row,) = measured(monkeypatch, "--model", "gru")
    assert row.keys() == KEYS
    assert row["reason"] == f"{type(error).__name__}: no library"
    assert all("no library" in table([row]) for table in (step._table, step._summary))


def test_the_summary_has_the_ratios_of_targets():
    def row(engine, seconds, peak=None, reason=""):
        about = {"model": "m", "batch": 4, "peak_mb": peak, "reason": reason, "ratio_to_nonprivate": None}
        return {"engine": engine, "median_seconds": seconds, **about}

    rows = [
        row("nonprivate contiguous", 2.0, 50.0),
        row("nonprivate channels-last", 1.0, 100.0),
        row("planned", 1.1, 120.0),
        row("dp-sgd", 2.0),
        row("dp-sat", 2.04),
        row("opacus hooks", 4.4),
        row("opacus ghost", 3.3),
        row("opacus ew", None, reason="Error: no"),
    ]
    assert step._summary(rows).splitlines()[-1] == (
        "| m | 4 | 1.10 | 1.20 | 3.00 (opacus ghost); opacus ew Error: no | 1.02 |"
    )
