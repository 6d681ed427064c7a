from pathlib import Path

import pytest

from fed_dpsat.lab.watch.progress import Progress
from fed_dpsat.run.metric import metric_named
from fed_dpsat.settings.config import RunConfig


def record(round, **changes):
    line = {
        "round": round, "test_accuracy": 0.5, "test_loss": 1.0, "epsilon": 0.5, "asked": [0, 1], "accepted": 1,
        "dropped": {"1": "late"}, "retired": {}, "timing": {"seconds": 2.0},
    }  # fmt: skip
    return {**line, **changes}


@pytest.fixture
def progress():
    return Progress.of(RunConfig(num_rounds=10, target_epsilon=3.0))


def test_before_the_first_round_nothing_is_known(progress):
    assert (progress.last, progress.done, progress.seconds_left(5.0)) == (None, 0, None)
    assert progress.measured("test_accuracy") == []


def test_the_pace_of_rounds_says_what_is_left(progress):
    progress.add(record(0, timing={"seconds": 100.0}))  # what came before the first round is no pace
    assert progress.seconds_left(0.0) is None
    progress.add(record(1, timing={"seconds": 2.0})).add(record(2, timing={"seconds": 4.0}))
    assert progress.seconds_left(1.0) == 8 * 3.0 - 1.0
    assert progress.seconds_left(1e9) == 0.0


def test_clients_are_counted_over_rounds(progress):
    for round in (1, 2, 3):
        progress.add(record(round))
    assert [progress.total(name) for name in ("asked", "accepted", "dropped", "retired")] == [6, 3, 3, 0]


def test_a_round_that_is_done_again_takes_the_place_of_its_first_try(progress):
    for round, accuracy in ((1, 0.1), (2, 0.2), (3, 0.3), (2, 0.4)):
        progress.add(record(round, test_accuracy=accuracy))
    assert progress.measured("test_accuracy") == [0.1, 0.4]
    assert progress.done == 2


def test_rounds_without_an_evaluation_and_losses_that_were_text(progress):
    progress.add(record(1, test_loss=None)).add(record(2, test_loss="nan")).add(record(3, test_loss=2.0))
    assert [str(loss) for loss in progress.measured("test_loss")] == ["nan", "2.0"]


def test_the_budget_is_the_largest_of_a_client():
    table = Path(__file__).parents[3] / "simulations" / "budgets.csv"
    config = RunConfig.load(Path("simulations/budgets.toml"), [f"client_table={table}"])
    largest = max(float(line.split(",")[1] or 0) for line in table.read_text().splitlines()[1:])
    assert Progress.of(config).budget == max(largest, config.target_epsilon)


def test_the_metric_is_that_of_the_settings(progress):
    assert progress.metric == metric_named("accuracy", "classification")


def test_an_undefined_value_is_a_gap_of_the_curve_and_undefined_as_the_last_one(progress):
    for round, value in ((1, 0.5), (2, None), (3, "undefined"), (4, None)):
        progress.add(record(round, test_accuracy=value))
    assert [str(value) for value in progress.measured("test_accuracy")] == ["0.5", "nan"]
    assert progress.latest("test_accuracy") == "undefined"
    assert progress.latest("test_loss") == 1.0


def test_the_metric_of_your_own_task_is_that_of_its_class(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from fed_dpsat.tasks.metric import Metric\n"
        "class Dose:\n    metrics = (Metric(name='error', label='error of dose', higher_is_better=False, unit='mg'),)\n"
        "def made():\n    return Dose()\n"
    )
    named, made = (
        Progress.of(RunConfig(noise_multiplier=1.0, task=f"{tmp_path}/mine.py:{of}")).metric for of in ("Dose", "made")
    )
    assert (named.heading, made.name) == ("error of dose (mg, lower is better)", "loss")
