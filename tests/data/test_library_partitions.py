"""The partitioners of flwr-datasets by name: which there are, whose examples they divide, and what they refuse."""

import contextlib
import io
import itertools

import flwr_datasets.partitioner
import numpy as np
import pytest

from fed_dpsat import plugins
from fed_dpsat.data.library_partitions import LIBRARY, PARTITIONS
from fed_dpsat.errors import InputError, SettingError
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.settings.data import VERTICAL

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 30))
USERS = np.random.default_rng(1).permutation(np.repeat(np.arange(20).astype(str), 15))
COLUMNS = {"user": USERS, "age": np.random.default_rng(2).normal(50, 10, 300)}
OWN = {"IidPartitioner", "DirichletPartitioner", "ShardPartitioner"}
RESHAPED = {"VerticalEvenPartitioner", "VerticalSizePartitioner"}

DISTRIBUTION = f"distribution_array = {[[1, 2]] * 10}, preassigned_num_samples_per_label = 3"
ROWS = {
    "continuous": ("age", "strictness = 0.5", 10),
    "distribution": ("", DISTRIBUTION, 10),
    "exponential": ("", "", 5),
    "grouped-natural-id": ("user", "group_size = 5", 4),
    "id-to-size-fnc": ("", "partition_id_to_size_fn = 'numpy:sqrt'", 10),
    "inner-dirichlet": ("", "", 10),
    "linear": ("", "", 10),
    "natural-id": ("user", "", 20),
    "pathological": ("", "", 10),
    "size": ("", "partition_sizes = [210, 60, 30]", 3),
    "square": ("", "", 5),
}


def dealt(name, by="", arguments="", num_clients=10, seed=0, labels=LABELS, columns=COLUMNS, **more):
    settings = {"dirichlet_alpha": 0.3, "classes_per_client": 2, **more, "partition_by": by, "seed": seed}
    settings |= {"labels": labels, "columns": columns, "num_examples": 300, "num_clients": num_clients}
    return plugins.build("partition", name, settings, arguments)


def test_each_partitioner_of_the_installed_version_has_a_name_or_is_refused():
    """A new version with another one fails here; it is not offered until someone has looked at it."""
    known = {class_name for class_name, _, _ in LIBRARY.values()} | OWN | RESHAPED | {"Partitioner"}
    assert set(flwr_datasets.partitioner.__all__) == known
    kebab = {
        "".join(f"-{letter.lower()}" if letter.isupper() else letter for letter in name.removesuffix("Partitioner"))[1:]
        for name, _, _ in LIBRARY.values()
    }
    assert kebab == LIBRARY.keys() == PARTITIONS.keys() == ROWS.keys()


@pytest.mark.by_default("distribution", "linear", "grouped-natural-id", "exponential")
@pytest.mark.parametrize("name", LIBRARY)
def test_equal_arguments_give_equal_parts_and_the_seed_decides_who_is_in_them(name):
    by, arguments, num_clients = ROWS[name]
    first, again, other = (dealt(name, by, arguments, num_clients, seed) for seed in (0, 0, 1))
    assert all(part.dtype == np.int64 and np.array_equal(part, np.sort(part)) for part in first)
    assert len(np.unique(np.concatenate(first))) == sum(map(len, first)) <= 300
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    same = all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))
    assert same == (name == "natural-id")


def test_sizes_are_those_of_the_class():
    assert [len(part) for part in dealt("linear", num_clients=4)] == [30, 60, 90, 120]
    assert [len(part) for part in dealt("square", num_clients=2)] == [60, 240]
    assert [len(part) for part in dealt("size", arguments="partition_sizes = [210, 90]", num_clients=2)] == [210, 90]


def test_settings_fill_arguments_and_partition_args_win():
    few = dealt("pathological", classes_per_client=3)
    assert all(len(set(LABELS[part])) == 3 for part in few)
    fewer = dealt("pathological", arguments="num_classes_per_partition = 1", classes_per_client=3)
    assert all(len(set(LABELS[part])) == 1 for part in fewer)
    even, skewed = (dealt("inner-dirichlet", dirichlet_alpha=alpha) for alpha in (100.0, 0.05))
    assert [len(part) for part in even] == [len(part) for part in skewed] == [30] * 10
    assert np.mean([len(set(LABELS[part])) for part in even]) > np.mean([len(set(LABELS[part])) for part in skewed])


def test_values_are_whole_in_groups_and_numbers_are_sorted():
    groups = dealt("grouped-natural-id", "user", "group_size = 5", 4)
    assert [len(set(USERS[part])) for part in groups] == [5] * 4
    parts = dealt("continuous", "age", "strictness = 1.0")
    ages = [COLUMNS["age"][part] for part in parts]
    assert all(young.max() <= old.min() for young, old in itertools.pairwise(ages))


def test_a_column_stands_in_for_the_class_and_may_have_any_values():
    """InnerDirichletPartitioner compares classes with 0, 1, ..., and fails for texts and for numbers with gaps."""
    parts = dealt("inner-dirichlet", "user", dirichlet_alpha=0.01, labels=None)
    assert np.mean([len(set(USERS[part])) for part in parts]) < 10
    gaps = dealt("inner-dirichlet", labels=3 * LABELS)
    assert all(np.array_equal(a, b) for a, b in zip(gaps, dealt("inner-dirichlet"), strict=True))


def test_nothing_is_printed():
    """NaturalIdPartitioner draws a progress bar, and PathologicalPartitioner warns of what the run counts."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        dealt("natural-id", "user", num_clients=20)
        assert sum(map(len, dealt("pathological", num_clients=3))) < 300
    assert not said.getvalue()


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("pathological", {"labels": None}, "'pathological' divides by class, and the labels of this data set"),
        ("natural-id", {}, "partition_by='' is not a column"),
        ("natural-id", {"by": "user"}, "makes 20 clients with these arguments, not num_clients=10; set num_clients=20"),
        ("grouped-natural-id", {"by": "user"}, "'grouped-natural-id' needs 'group_size'; give it by partition_args"),
        ("continuous", {"by": "user", "arguments": "strictness = 1.0"}, "needs numbers, and the column 'user' is <U2"),
        (
            "continuous",
            {"by": "age", "arguments": "strictness = 2.0"},
            "refuses: `strictness` must be between 0 and 1;",
        ),
        ("exponential", {}, "ExponentialPartitioner of flwr-datasets refuses"),
        ("linear", {"arguments": "alpha = 1"}, "takes no 'alpha'"),
        ("pathological", {"arguments": "assignment_mode = 'random'"}, "it takes class_assignment_mode"),
        ("pathological", {"arguments": "num_partitions = 3"}, "takes no 'num_partitions'"),
        (
            "size",
            {"arguments": "partition_sizes = [900, 0]", "num_clients": 2},
            "refuses: All partition sizes must be greater",
        ),
        ("id-to-size-fnc", {"arguments": "partition_id_to_size_fn = 'numpy:sqrtt'"}, "did you mean sqrt"),
        ("linear", {"num_clients": 301}, r"num_clients=301 is not in \[1, 300\]"),
    ],
)
def test_what_cannot_be_divided_is_one_clear_line(name, options, words):
    with pytest.raises(InputError, match=words) as caught:
        dealt(name, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", VERTICAL)
def test_vertical_partitions_are_refused_with_the_reason(name):
    with pytest.raises(SettingError, match=r"not a division of examples; .* part of every example, so the epsilons"):
        RunConfig(noise_multiplier=1.0, partition=name)
