"""The table at the end of a run: what was reached, at which epsilon, and each release that epsilon does not cover."""

from __future__ import annotations

from rich.console import Console

from fed_dpsat.lab.watch.result import result_table

RESULT = {
    **{"test_accuracy": 0.91, "test_loss": 0.3, "epsilon": 2.5, "delta": 1e-4, "accountant": "pld"},
    **{"privacy_unit": "one example", "threat_model": "a server", "noise_multiplier": 1.25, "clip_norm": 0.5},
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
