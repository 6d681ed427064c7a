"""What a server and a device with data of its own must declare alike, so that they mean the same inputs and labels."""

from __future__ import annotations

import json
from collections.abc import Mapping

from fed_dpsat.data.dataset import Dataset
from fed_dpsat.tasks.base import kind_of

REMEDIES = {
    "labels": "choose the task and the label_column of both for the same labels",
    "class_names": "declare the same classes in the same order",
    "label_scale": "declare the same mean and std of the label",
    "max_length": "set the same max_length",
    "tokenizer": "use the same files of a tokenizer",
    "features": "use the same extractor, arguments, source and weights, and the same features_norm",
    "declared": "declare the same columns, encoding and special tokens",
}
"""By part of a form, the way to make it equal; one without a remedy follows from the tokenizer."""


def form_of(dataset: Dataset) -> dict[str, str]:
    """By name, what ``dataset`` declares of its examples, as JSON. No example has a part in it."""
    lengths = [text.max_length for text in dataset.train.texts.values()]
    parts: dict[str, object] = {
        "labels": kind_of(dataset.train),
        "class_names": dataset.class_names,
        "label_scale": dataset.label_scale,
        "max_length": lengths[0] if lengths else 0,
        "tokenizer": dataset.tokenizer,
        "declared": dataset.declared,
        **({"features": dataset.features} if dataset.features else {}),
        **dataset.of_texts,
    }
    return {name: json.dumps(part) for name, part in parts.items()}


def difference(theirs: Mapping[str, object], own: Mapping[str, str]) -> str:
    """The first part of two forms that differs, in a sentence without the ``own`` value; "" for equal forms."""
    for name, value in own.items():
        if theirs.get(name) != value:
            said = str(theirs.get(name, "nothing"))
            said = said if len(said) <= 60 else f"{said[:57]}..."
            return f"{name}: the run has {said}, which is not that of this device; {_remedy(name)} on both"
    return ""


def _remedy(name: str) -> str:
    return REMEDIES.get(name, REMEDIES["tokenizer"])
