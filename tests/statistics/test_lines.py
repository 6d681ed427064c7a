"""The sensitivity of each statistic, by brute force over all small data, and what is read of exact totals."""

import itertools
import math

import numpy as np
import pytest

from fed_dpsat.settings.config import RunConfig
from fed_dpsat.statistics import lines
from fed_dpsat.statistics.lines import Count, Labels, Moments, Quantiles, Sizes, Totals
from fed_dpsat.statistics.release import contributions
from fed_dpsat.statistics.rows import Declared, Rows

AGE = Declared(name="age", low=10.0, high=30.0, log=False, spec={"low": 10, "high": 30})
VALUES = (-7.0, 10.0, 13.3, 20.0, 30.0, 1e6, math.nan)
LABELS = (0, 1, 2)
NAMES = ("a", "b", "c")
OF_ROWS = (Moments(column=AGE), Quantiles(column=AGE, bins=3), Labels(class_names=NAMES, several=False))
UNIT = {
    unit: RunConfig(privacy_unit=unit, statistics_epsilon=1.0, target_epsilon=8.0) for unit in ("example", "client")
}


def rows(values, labels=None, client=None, num_clients=1):
    own = [0] * len(values) if client is None else client
    of = None if labels is None else np.array(labels)
    values = {"age": np.array(values, dtype=np.float64)}
    return Rows(client=np.array(own, dtype=np.int64), num_clients=num_clients, values=values, labels=of)


def largest_change(line, config):
    """The largest norm by which one row less changes the sum of a client, over all data of up to two rows."""
    found, each = 0.0, list(itertools.product(VALUES, LABELS))
    for size in (1, 2):
        for data in itertools.combinations_with_replacement(each, size):
            whole = contributions([line], rows(*zip(*data, strict=True)), config)[line.name][0]
            for out in range(size):
                rest = [row for i, row in enumerate(data) if i != out]
                less = rows([v for v, _ in rest], [label for _, label in rest])
                without = contributions([line], less, config)[line.name][0]
                found = max(found, float(np.linalg.norm(whole - without)))
    return found


@pytest.mark.parametrize("line", OF_ROWS, ids=lambda line: line.name)
def test_one_row_changes_a_sum_by_at_most_one(line):
    assert largest_change(line, UNIT["example"]) == pytest.approx(1.0, abs=1e-12)  # and no less: the bound is tight


def test_a_row_of_several_classes_changes_a_sum_by_at_most_one():
    line = Labels(class_names=NAMES, several=True)
    found = [
        float(np.linalg.norm(line.sums(rows([1.0], [flags])))) for flags in itertools.product((0, 1), repeat=len(NAMES))
    ]
    assert max(found) == pytest.approx(1.0)


def test_a_value_that_is_not_clipped_exceeds_the_bound(monkeypatch):
    monkeypatch.setattr(lines, "unit_interval", lambda x, c: (x - c.low) / (c.high - c.low) * 2 - 1)
    assert largest_change(Moments(column=AGE), UNIT["example"]) > 100


def test_the_moments_without_the_half_exceed_the_bound(monkeypatch):
    monkeypatch.setattr(Moments, "scale", 1.0)
    assert largest_change(Moments(column=AGE), UNIT["example"]) == pytest.approx(math.sqrt(5) / 2)


@pytest.mark.parametrize("most", [1, 2, 5])
@pytest.mark.parametrize("line", [*OF_ROWS, Count(), Sizes(num_clients=1)], ids=lambda line: line.name)
def test_one_client_adds_at_most_one(line, most):
    config = RunConfig(privacy_unit="client", statistics_examples=most, target_epsilon=8.0)
    found = 0.0
    for size in (1, 2, 7):
        for data in itertools.combinations_with_replacement(list(itertools.product(VALUES, LABELS)), min(size, 2)):
            more = [*data, *([data[-1]] * (size - len(data)))]
            added = contributions([line], rows(*zip(*more, strict=True)), config)[line.name]
            found = max(found, float(np.linalg.norm(added)))
    assert found == pytest.approx(1.0, abs=1e-12)


def test_a_client_without_a_weight_exceeds_the_bound():
    data = rows([30.0] * 4, [0] * 4)
    found = {unit: contributions(OF_ROWS[2:], data, config)["labels"] for unit, config in UNIT.items()}
    assert np.linalg.norm(found["example"]) == 4  # this unit has no weights
    assert np.linalg.norm(found["client"]) == 1


def exact(line, data, count=None):
    total = line.sums(data).sum(0)
    return line.read(
        Totals(total=total, noise=0.0, count=len(data.client) if count is None else count, count_noise=0.0)
    )


def test_moments_of_exact_totals_are_those_of_the_clipped_values():
    found = exact(Moments(column=AGE), rows([12.0, 20.0, 99.0, math.nan], client=[0, 1, 1, 0], num_clients=2))
    clipped = np.array([12.0, 20.0, 30.0])
    assert found["mean"].value == pytest.approx(clipped.mean())
    assert found["std"].value == pytest.approx(clipped.std())
    assert found["missing"].value == 0.25


def test_quantiles_are_in_order_and_within_the_range_whatever_the_noise():
    line, generator = Quantiles(column=AGE, bins=8), np.random.default_rng(0)
    for _ in range(50):
        noisy = generator.normal(0, 30, 8) + 40
        found = line.read(Totals(total=noisy, noise=10.0, count=320.0, count_noise=0.0))
        values = [reading.value for reading in found.values()]
        assert values == sorted(values)
        assert all(AGE.low <= value <= AGE.high for value in values)


def test_quantiles_of_exact_counts_are_within_a_bin():
    values = np.random.default_rng(0).uniform(10, 30, 5000)
    found = exact(Quantiles(column=AGE, bins=20), rows(values))
    for name, share in zip(found, lines.SHARES, strict=True):
        assert found[name].value == pytest.approx(np.quantile(values, share), abs=1.0)


def test_labels_are_shares():
    found = exact(Labels(class_names=NAMES, several=False), rows([1.0] * 4, [0, 0, 1, 0]))
    assert [reading.value for reading in found.values()] == [0.75, 0.25, 0.0]


def test_more_noise_than_data_gives_no_mean():
    found = Moments(column=AGE).read(Totals(total=np.array([1.0, 1.0, 0.0]), noise=10.0, count=12.0, count_noise=0.0))
    assert set(found) == {"missing"}


def test_sizes_count_clients_by_powers_of_two():
    line = Sizes(num_clients=3)
    found = exact(line, rows([1.0] * 6, client=[0, 1, 1, 1, 2, 2], num_clients=3))
    assert [round(found[name].value * 3) for name in ("1 to 1", "2 to 3", "4 to 7")] == [1, 2, 0]
