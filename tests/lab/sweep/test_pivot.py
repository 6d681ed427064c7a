"""A table from a file whose means and differences a reader can compute."""

from __future__ import annotations

import json

import pytest

from fed_dpsat.errors import InputError
from fed_dpsat.lab.sweep.pivot import markdown, read

LINES = """stage,method,target_epsilon,seed,accuracy,status
tune,dp-sgd,1.0,7,0.99,completed
final,dp-sgd,1.0,0,0.50,completed
final,dp-sgd,1.0,1,0.60,completed
final,dp-sgd,3.0,0,0.70,completed
final,dp-sgd,3.0,1,,failed
final,dp-sat,1.0,1,0.61,completed
final,dp-sat,1.0,0,0.512,completed
final,dp-sat,3.0,0,0.72,completed
final,dp-sat,3.0,1,0.80,completed
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "results.csv"
    path.write_text(LINES)
    return path


def test_pairs_are_of_the_same_seed_and_failures_and_tuning_are_left_out(file):
    """Differences of seeds 0 and 1 are 1.2 and 1.0: mean 1.1, t(0.975, 1) = 12.706, sd 0.1414, half 1.27."""
    assert markdown(read(file, "method", "target_epsilon"), "method", "dp-sgd").splitlines() == [
        "| method | 1.0 | 3.0 |",
        "|---|---|---|",
        "| dp-sgd | 55.0 (7.1) | 70.0, n = 1 |",
        "| dp-sat | 56.1 (6.9)<br>+1.1 ± 1.3 | 76.0 (5.7)<br>+2.0 |",
    ]


def test_a_filter_leaves_the_rest_out(file):
    assert (
        markdown(read(file, "method", "seed", ["target_epsilon=1.0"]), "").splitlines()[2] == "| dp-sgd | 50.0 | 60.0 |"
    )


def test_what_cannot_be_shown_is_an_error(file):
    with pytest.raises(InputError, match="no column 'lr', only stage, method"):
        read(file, "lr", "method")
    with pytest.raises(InputError, match="several runs of seed 0 for method=dp-sgd, stage=final; tell them apart"):
        read(file, "method", "stage")
    with pytest.raises(InputError, match="'dp-sam' is not a row; choose one of dp-sgd, dp-sat"):
        markdown(read(file, "method", "target_epsilon"), "method", "dp-sam")


def test_the_metric_is_that_of_the_sweep_beside_it(file):
    """RMSE of 50 and 60 against 51.2 and 61: 51.2 - 50 and 61 - 60 as above, but in its own unit."""
    metric = {"name": "rmse", "label": "RMSE", "higher_is_better": False, "unit": ""}
    file.with_name("sweep.json").write_text(json.dumps({"metric": metric}))
    with pytest.raises(InputError, match="no column 'rmse'"):
        read(file, "method", "target_epsilon")
    file.write_text(LINES.replace("accuracy", "rmse"))
    assert read(file, "method", "target_epsilon")["dp-sgd", "1.0"] == {0: 0.5, 1: 0.6}
    file.write_text(LINES.replace("accuracy", "rmse").replace("0.512", ""))
    with pytest.raises(InputError, match="RMSE is undefined in the run of seed 0 of method=dp-sat"):
        read(file, "method", "target_epsilon")
