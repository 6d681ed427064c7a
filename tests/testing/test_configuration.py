"""``fed-dpsat check``: all that a configuration names, without training."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from fed_dpsat.cli import app
from fed_dpsat.testing import configuration

PARTS = ["dataset", "partition", "model", "clipping", "optimizer", "strategy", "trial"]
FAST = ["--set", "noise_multiplier=2", "--set", "accountant=rdp", "--set", "num_clients=3"]


@pytest.fixture
def quick(monkeypatch):
    """Without the two suites that take seconds; they have tests of their own."""
    for name in ("check_clipping", "check_strategy"):
        monkeypatch.setattr(configuration, name, lambda factory: ["skipped"])


def test_a_good_configuration_is_fine_and_nothing_is_written(quick, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["check", *FAST])
    assert result.exit_code == 0, result.output
    assert [line.split()[0] for line in result.stdout.splitlines()] == PARTS
    assert all(": fine" in line for line in result.stdout.splitlines())
    assert not list(tmp_path.iterdir())


def test_what_is_not_fine_is_said_of_its_part_and_by_the_trial(quick, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.py").write_text(
        "from torch import nn\nfew = lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 9))\n"
        "class Strategy(__import__('flwr.serverapp.strategy').serverapp.strategy.FedAvg):\n"
        "    lock = None\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.lock = object()\n"
    )
    command = ["check", *FAST, "--set", "model=m.py:few", "--set", "strategy=m.py:Strategy", "--json"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2, result.output
    found = json.loads(result.stdout)
    problems = {part["part"]: part["problem"] for part in found["parts"] if part["problem"]}
    assert not found["fine"]
    assert list(problems) == ["model", "trial"]
    assert "logits_are_one_row_per_example" in problems["model"]
    assert "make its last layer 10 wide" in problems["trial"]
    (strategy,) = (part for part in found["parts"] if part["part"] == "strategy")
    assert "cannot resume: Strategy.lock is a object" in strategy["note"]
    assert "NOT FINE" in CliRunner().invoke(app, command[:-1]).stdout


LINES = "\n".join(json.dumps({"text": f"{i} lines", "label": "ab"[i % 2]}) for i in range(40))
TEXTS = ["dataset=text", "max_length=8", "model=gpt"]


@pytest.mark.parametrize(
    ("settings", "mixes"),
    [
        ([*TEXTS, "task=causal-lm"], False),
        ([*TEXTS, "label_column=label", "class_names=a, b"], False),
        ([*TEXTS, "label_column=label", "class_names=a, b", "model=m.py:Mixes"], True),
    ],
)
def test_texts_of_each_task_are_tried_as_they_are(quick, tmp_path, monkeypatch, settings, mixes):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lines.jsonl").write_text(LINES)
    (tmp_path / "m.py").write_text(
        "from torch import nn\n"
        "class Mixes(nn.Module):\n"
        "    def __init__(self, vocabulary_size, num_classes):\n"
        "        super().__init__()\n"
        "        self.embedding, self.head = nn.Embedding(vocabulary_size, 4), nn.Linear(4, num_classes)\n"
        "    def forward(self, input_ids, attention_mask):\n"
        "        x = self.embedding(input_ids).mean(1)\n"
        "        return self.head(x - x.mean(0))\n"
    )
    data = ["data_source=jsonl", "data_path=lines.jsonl", "test_share=0.5", f"cache_dir={tmp_path}"]
    command = ["check", *FAST, *(word for one in (*data, *settings) for word in ("--set", one)), "--json"]
    found = json.loads(CliRunner().invoke(app, command).stdout)
    problems = {part["part"]: part["problem"] for part in found["parts"] if part["problem"]}
    assert list(problems) == ["model", "trial"][: 2 * mixes], problems
    assert not mixes or "logits_ignore_the_other_examples" in problems["model"]


@pytest.mark.parametrize(
    ("setting", "words"), [("modle=linear", "did you mean model"), ("model=liner", "did you mean linear")]
)
def test_what_cannot_be_built_is_one_line(setting, words):
    result = CliRunner().invoke(app, ["check", *FAST, "--set", setting])
    assert (result.exit_code, result.stdout) == (2, "")
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
