"""Conformance of data sets: two separate splits of finite examples, equal in each process."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fed_dpsat.data.dataset import Dataset, Examples
from fed_dpsat.data.sequences import Sequences
from fed_dpsat.testing.conformance import require, run_checks

LOOKED_AT = 1000
"""Number of checked rows of each split, evenly spaced."""

Make = Callable[[], Dataset]


def check_dataset(factory: Make) -> list[str]:
    """Run the suite on ``() -> Dataset``; returns the names of the checks.

    It reads 1,000 evenly spaced rows of each split. Raises ``ConformanceError``.
    """
    return run_checks("dataset", CHECKS, factory)


def is_a_dataset_of_two_splits(make: Make) -> None:
    """A ``Dataset`` with training examples, public test examples, and at least two classes if labels are classes."""
    made = make()
    require(
        isinstance(made, Dataset),
        expected="a fed_dpsat.data.Dataset",
        seen=f"a {type(made).__name__}",
        remedy="return Dataset(name=..., train=Examples(...), test=Examples(...), class_names=(...))",
    )
    for split in ("train", "test"):
        require(
            len(getattr(made, split)),
            expected=f"examples in the {split} split",
            seen="none",
            remedy="clients train on train, and the server measures on test",
        )
    require(
        made.train.classes is None or made.num_classes >= 2,
        expected="two classes or more",
        seen=f"class_names={made.class_names}",
        remedy="name the classes in the order of their numbers",
    )


def batches_are_finite(make: Make) -> None:
    """Normalised inputs and labels have no NaN and no inf."""
    made = make()
    for split in ("train", "test"):
        examples = getattr(made, split)
        rows = _spread(examples)
        found = tree_leaves(examples.batch(rows))
        finite = torch.stack([t.view(len(rows), -1).isfinite().all(1) for t in found])
        bad = rows[~finite.all(0)]
        require(
            not len(bad),
            expected=f"finite {split} inputs and labels",
            seen=f"NaN or inf in {len(bad)} of {len(rows)} rows, the first {int(bad[0]) if len(bad) else 0}",
            remedy="replace missing values by a public constant",
        )


def each_call_gives_the_same_examples(make: Make) -> None:
    """Each call gives the same bits: workers, devices and resumed runs build the data set again."""
    first, again = make(), make()
    for split in ("train", "test"):
        one, other = getattr(first, split), getattr(again, split)
        same = len(one) == len(other)
        if same:
            pairs = zip(*(tree_leaves(examples.batch(_spread(one))) for examples in (one, other)), strict=True)
            same = all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs) and _labels_equal(one, other)
        require(
            same,
            expected=f"the same {split} split from a second call",
            seen="another split",
            remedy="seed each draw and shuffle, and read files in a sorted order",
        )
    constants = [(d.train.mean, d.train.std, d.test.mean, d.test.std) for d in (first, again)]
    require(
        constants[0] == constants[1],
        expected="the same mean and std from a second call",
        seen=f"{constants[0]} and {constants[1]}",
        remedy="use public constants: statistics of the training split are a release without a charge",
    )


def test_split_is_not_the_training_split(make: Make) -> None:
    """At most half of the public test rows are training rows: accuracy on private examples is a release."""
    made = make()
    private = _rows(made.train, torch.arange(min(len(made.train), 10 * LOOKED_AT)))
    looked_at = _rows(made.test, torch.arange(min(len(made.test), LOOKED_AT)))
    found = len(set(private) & set(looked_at))
    require(
        2 * found <= len(set(looked_at)),
        expected="test examples that are not training examples",
        seen=f"{found} of {len(set(looked_at))} test examples in the training split",
        remedy="keep examples apart for the test split, or set validation_share",
    )


CHECKS = (
    is_a_dataset_of_two_splits,
    batches_are_finite,
    each_call_gives_the_same_examples,
    test_split_is_not_the_training_split,
)


def _spread(examples: Examples) -> Tensor:
    count = min(len(examples), LOOKED_AT)
    return torch.linspace(0, len(examples) - 1, count, dtype=torch.float64).round().long()


def _labels_equal(one: Examples, other: Examples) -> bool:
    a, b = one.labels, other.labels  # those that are no tensor are in the batch
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else type(a) is type(b)


def _rows(examples: Examples, rows: Tensor) -> list[bytes]:
    """What each of ``rows`` is, without padding."""
    parts = examples.rows(rows).leaves.values()
    each: list[list[bytes]] = [
        [part.values[a:b].numpy().tobytes() for a, b in pairwise(part.offsets.tolist())]
        if isinstance(part, Sequences)
        else [row.numpy().tobytes() for row in part]
        for part in parts
    ]
    return [b"".join(row) for row in zip(*each, strict=True)]
