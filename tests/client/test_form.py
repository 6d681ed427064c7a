"""What a server and a device declare alike: equal for equal declarations, whatever the examples are."""

from __future__ import annotations

import dataclasses

import torch

from fed_dpsat.client.form import difference, form_of
from fed_dpsat.data.dataset import Dataset, Examples
from fed_dpsat.data.sequences import Sequences


def texts(tokens=(1, 2, 3), **of):
    text = {"max_length": 8, "vocabulary_size": 9, "padding": 0} | of
    values = Sequences(values=torch.tensor(tokens), offsets=torch.tensor([0, len(tokens)]), **text)
    split = Examples(inputs={"input_ids": values}, labels=torch.tensor([[1.0]]))
    return Dataset(name="a", train=split, test=split, class_names=("cost",), label_scale=((1.0, 2.0),))


def test_the_examples_have_no_part_in_it():
    assert form_of(texts()) == form_of(dataclasses.replace(texts(tokens=(4,)), name="b"))
    assert difference(form_of(texts()), form_of(texts(tokens=(4,)))) == ""


def test_each_declaration_has_a_part_and_the_sentence_hides_that_of_the_device():
    own = texts()
    others = {
        "class_names": dataclasses.replace(own, class_names=("price",)),
        "label_scale": dataclasses.replace(own, label_scale=((1.0, 3.0),)),
        "max_length": texts(max_length=16),
        "tokenizer": dataclasses.replace(own, tokenizer="7" * 64),
        "declared": dataclasses.replace(own, declared="secret"),
        "vocabulary_size": texts(vocabulary_size=10),
        "padding": texts(padding=3),
        "mask_token": texts(mask_token=4),
    }
    for name, other in others.items():
        said = difference(form_of(own), form_of(other))
        assert said.startswith(f"{name}: the run has ")
        assert "secret" not in said
    said = difference(form_of(others["tokenizer"]), form_of(own))
    assert said == (
        f'tokenizer: the run has "{"7" * 56}..., which is not that of this device; use the same files of a tokenizer '
        "on both"
    )


def test_a_server_that_leaves_out_a_part_or_sends_anything_is_refused():
    assert difference({}, form_of(texts())).startswith("labels: the run has nothing, which")
    assert difference({**form_of(texts()), "padding": b"0" * 1000}, form_of(texts())).startswith("padding: the run has")
