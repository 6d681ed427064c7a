"""The table at the end of a run: what was reached, at which epsilon, and each release that epsilon does not cover."""

from __future__ import annotations

from rich.console import Console

from fed_dpsat.lab.watch.result import result_table

RESULT = {
    **{"test_accuracy": 0.91, "test_loss": 0.3, "epsilon": 2.5, "delta": 1e-4, "accountant": "pld"},
    **{"privacy_unit": "one example", "threat_model": "a server", "noise_multiplier": 1.25, "clip_norm": 0.5},
    "noise_distribution": "gaussian",
    **{"noise": "seeded", "also_released": ["counts", "personal accuracy"], "optimizer": "dp-sgd"},
    **{"base_optimizer": "dp-sgd", "model": "linear", "dataset": "digits", "strategy": "fedavg"},
    **{"rounds_completed": 3, "local_steps": 2, "num_clients": 10, "sample_rate": 0.5, "seed": 7, "seconds": 4.0},
    **{"phases": {"send": 1.0, "train": 3.0}, "clients_per_second": 7.5, "examples_per_second": 900.0},
    "peak_memory_mb": 300.0,
}


def lines(result):
    console = Console(width=120)
    with console.capture() as captured:
        console.print(result_table(result))
    return [line.strip() for line in captured.get().splitlines()]


def test_it_says_what_epsilon_covers_and_what_not():
    shown = lines(RESULT)
    assert any("2.500 at delta 0.0001 (PLD)" in line for line in shown)
    assert any("against" in line and "a server" in line for line in shown)
    assert sum("also released" in line for line in shown) == 2
    assert any("4.0 s (train 3.0, send 1.0)" in line for line in shown)


def test_accuracies_on_validation_examples_are_not_said_to_be_on_the_test_split():
    personal = {"personal_accuracy": 0.5, "personal_clients": 4, "personal_worst_decile": 0.1}
    shown = lines({**RESULT, **personal, "evaluated_on": "validation"})
    assert any("validation accuracy" in line for line in shown)
    assert not any("test" in line for line in shown)


def test_what_a_run_does_not_have_is_no_row():
    assert not any("of models alone" in line or "personal models" in line for line in lines(RESULT))
    more = {"epsilon_released": 1.5, "epsilon_released_assumptions": "coins"}
    assert any("1.500; coins" in line for line in lines({**RESULT, **more}))
    missing = {"epsilon_released": None, "epsilon_released_missing": "clients were away"}
    assert any("unknown: clients were away" in line for line in lines({**RESULT, **missing}))


def test_examples_per_second_are_shown_if_they_are_public():
    assert any("7.5 clients/s, 900 examples/s expected; memory" in line for line in lines(RESULT))
    assert any("7.5 clients/s; memory" in line for line in lines({**RESULT, "examples_per_second": 0.0}))


def test_every_metric_of_the_task_is_a_row_with_its_direction():
    metric = {"name": "rmse", "label": "RMSE", "higher_is_better": False, "unit": ""}
    more = {"task": "regression", "metric": metric, "test_mae": 40.5, "test_rmse": 54.125, "test_r2": "undefined"}
    personal = {"personal_rmse": 50.0, "personal_clients": 4, "personal_worst_decile": 90.0}
    result = {key: value for key, value in RESULT.items() if key != "test_accuracy"} | more | personal
    shown = [" ".join(line.replace("│", " ").split()) for line in lines(result)]
    for row in (
        "test RMSE 54.12, lower is better", "test MAE 40.50, lower is better", "test R2 undefined", "test loss 0.3000",
    ):  # fmt: skip
        assert row in shown
    large = [" ".join(line.replace("│", " ").split()) for line in lines(result | {"test_loss": 114695651.5062})]
    assert "test loss 1.147e+08" in large
    assert any("personal models 50.00 mean of 4 clients" in line for line in shown)
    assert any("worst decile 90.00" in line for line in shown)
    assert not any("accuracy" in line for line in shown if "released" not in line)


def test_a_classification_is_as_it_was():
    shown = [" ".join(line.replace("│", " ").split()) for line in lines(RESULT)]
    assert {"test accuracy 91.00%", "test loss 0.3000 nats"} <= set(shown)
