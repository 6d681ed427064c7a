"""``fed-dpsat data`` as a user meets it, and its bars."""

from __future__ import annotations

import json
import sys

import pytest
from PIL import Image
from typer.testing import CliRunner

from fed_dpsat.cli import app
from fed_dpsat.lab.data_view import cells_of

NOTES = """
import numpy as np
import torch
from fed_dpsat.data.dataset import Dataset, Examples

def notes(num_classes=2):
    labels = torch.arange(60) % num_classes
    train = Examples(
        inputs=torch.zeros(60, 3, dtype=torch.int64),
        labels=labels,
        columns={"speaker": np.repeat(["ann", "bob", "eve"], [30, 20, 10])},
    )
    return Dataset(name="notes", train=train, test=train, class_names=tuple(f"kind {k}" for k in range(num_classes)))
"""


def invoke(*args):
    return CliRunner().invoke(app, ["data", *map(str, args)])


@pytest.fixture
def natural(tmp_path):
    (tmp_path / "mine.py").write_text(NOTES)
    settings = ("dataset", f"{tmp_path}/mine.py:notes"), ("partition", "natural"), ("partition_by", "speaker")
    return [text for name, value in settings for text in ("--set", f"{name}={value}")]


def test_it_needs_no_configuration_and_no_choice_of_noise():
    result = invoke()
    assert result.exit_code == 0, result.output
    for words in (
        "digits: 1,437 training",
        "360 examples: public test split",
        "[1, 8, 8]",
        "partition iid: 10 clients",
    ):
        assert words in result.stdout
    assert "are private data: a simulation" in " ".join(result.stdout.split())
    assert invoke("--set", "noise_multiplier=1", "--set", "target_epsilon=1").exit_code == 2


def test_a_bar_has_a_symbol_for_each_class_and_the_length_of_its_client(natural):
    result = invoke(*natural, "--set", "num_clients=3", "--set", "validation_share=0.0")
    lines = [line.split() for line in result.stdout.splitlines()]
    ann, bob, eve = (next(line[2:] for line in lines if line[1:2] == [name]) for name in ("ann", "bob", "eve"))
    assert [ann[0], bob[0], eve[0]] == ["30", "20", "10"]
    half = len(ann[1]) // 2
    assert ann[1] == "0" * (len(ann[1]) - half) + "1" * half
    assert len(bob[1]) == round(len(ann[1]) * 2 / 3)
    assert "partition natural by speaker: 3 clients" in result.stdout
    assert "classes: 0 kind 0, 1 kind 1" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_validation_examples_are_said_to_be_what_is_evaluated_on(natural):
    result = invoke(*natural, "--set", "num_clients=2", "--set", "validation_share=0.5")
    assert "notes: 30 training examples" in result.stdout
    assert "30 examples: validation examples held out of the training split" in result.stdout


def test_what_is_left_out_is_said():
    result = invoke("--set", "partition=pathological", "--set", "num_clients=2")
    assert "training examples are in no part: no client trains on them" in result.stdout
    assert "no client holds an example of: " in result.stdout


def test_many_clients_are_thinned_and_many_classes_have_plain_bars(natural):
    result = invoke("--set", "num_clients=100", "--set", "partition=size-skew")
    assert "30 of 100 clients, from the largest to the smallest" in result.stdout
    result = invoke(*natural, "--set", "dataset_args=num_classes = 60", "--set", "num_clients=3")
    assert "labels: a class of 60; training examples of a class: 1 to 1, median 1" in result.stdout
    assert "====" in result.stdout


def test_json_has_every_count(natural):
    found = json.loads(invoke(*natural, "--set", "num_clients=2", "--json").stdout)
    assert found["clients"]["counts"] == [[15, 15], [15, 15]]
    assert found["columns"][0]["values"] == 3
    assert found["labels"]["counts"]["kind 0"] == {"train": 30, "test": 30}


@pytest.mark.by_default("2")
@pytest.mark.parametrize("num_classes", [2, 15, 60])
def test_a_picture_has_the_colours_of_its_classes(natural, tmp_path, num_classes):
    path = tmp_path / "new" / "clients.png"
    arguments = [*natural, "--set", f"dataset_args=num_classes = {num_classes}", "--set", "num_clients=3"]
    result = invoke(*arguments, "--picture", path)
    assert result.exit_code == 0, result.output
    colours = Image.open(path).convert("RGB").getcolors(2**24)
    large = [colour for count, colour in colours if count > 300 and len(set(colour)) > 1]
    assert len(large) >= min(num_classes, 10)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--picture", "clients.bmp"], "--picture='clients.bmp' is not a file .png, .svg, .pdf"),
        (["--set", "partition=vertical-even"], "partition='vertical-even' is not a division of examples"),
        (["--set", "partition=natural"], "needs a column, and the data set has none"),
        (["--set", "num_client=3"], "did you mean num_clients"),
    ],
)
def test_bad_input_is_one_line(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_no_model_is_built(monkeypatch):
    """It also works without the libraries of the model that CONFIG names."""
    monkeypatch.setitem(sys.modules, "timm", None)
    assert invoke("--set", "model=timm:vit_tiny_patch16_224").exit_code == 0
    assert invoke("--set", "model=nothing:here").exit_code == 0


def test_cells_are_whole_shares():
    assert cells_of([1, 1, 1], 10) == [4, 3, 3]
    assert cells_of([0, 5], 7) == [0, 7]
    assert cells_of([1, 999], 3) == [0, 3]
