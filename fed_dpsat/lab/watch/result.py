"""The result of a run on the terminal: quality, privacy, schedule and time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from fed_dpsat.run.metric import LOSS, loss_unit, metric_of, other_metrics, task_of, value_of
from fed_dpsat.run.numbers import on_terminal, speed, with_noise
from fed_dpsat.step.optimizers.chain import described


def result_table(result: Mapping[str, Any]) -> Table:
    """The content of ``summary.json`` as a table."""
    table = Table(show_header=False, title="Result", title_justify="left")
    table.add_column(style="cyan", no_wrap=True)
    table.add_column()
    split = result.get("evaluated_on", "test")
    main = metric_of(result)
    for metric in (main, *other_metrics(result, main, task_of(result))):
        direction = "" if metric.higher_is_better else ", lower is better"
        value = with_noise(on_terminal(value_of(result[metric.key]), metric, 2), metric, result)
        table.add_row(f"{split} {metric.label}", value + direction)
    if f"personal_{main.name}" in result:
        mean, worst = (on_terminal(value_of(result[f"personal_{of}"]), main, 2) for of in (main.name, "worst_decile"))
        table.add_row(
            "personal models",
            f"{mean} mean of {result['personal_clients']} clients on their shares of the "
            f"{split} split, worst decile {worst}",
        )
    if (averaged := result.get(f"averaged_{main.key}")) is not None:
        shown = on_terminal(value_of(averaged), main, 2)
        table.add_row("averaged model", f"{shown} {main.label} of the average of models ({result['averaging']})")
    loss = f"{_loss(result['test_loss'])} {loss_unit(task_of(result))}".rstrip()
    table.add_row(f"{split} loss", with_noise(loss, LOSS, result))
    table.add_row("epsilon", f"{result['epsilon']:.3f} at delta {result['delta']:g} ({result['accountant'].upper()})")
    if "statistics_epsilon" in result:
        table.add_row("of it statistics", f"{result['statistics_epsilon']:.3f} alone, before training")
    if "evaluation_epsilon" in result:
        table.add_row("of it evaluations", f"{result['evaluation_epsilon']:.3f} alone, all of the run by clients")
    table.add_row("protects", result["privacy_unit"])
    table.add_row("against", result["threat_model"])
    if "epsilon_released_missing" in result:
        table.add_row("of models alone", f"unknown: {result['epsilon_released_missing']}")
    elif "epsilon_released" in result:
        table.add_row("of models alone", f"{result['epsilon_released']:.3f}; {result['epsilon_released_assumptions']}")
    mechanism = result.get("noise_mechanism", "independent")
    correlation = "" if mechanism == "independent" else f"{mechanism}, correlated over rounds, "
    table.add_row(
        "noise",
        f"{correlation}{result['noise_distribution']}, multiplier {result['noise_multiplier']:.4f}, "
        f"clip norm {result['clip_norm']:g}",
    )
    if result.get("features"):
        sha256 = result["features_sha256"][:16]
        table.add_row("features", f"{result['features']}, a public extractor (SHA-256 {sha256})")
    table.add_row("noise source", result["noise"])
    for release in result["also_released"]:
        table.add_row("also released", release)
    method = described(result["optimizer"], result["base_optimizer"])
    table.add_row("training", f"{method}, {result['model']} on {result['dataset']}, {result['strategy']}")
    table.add_row(
        "schedule",
        f"{result['rounds_completed']} rounds x {result['local_steps']} local steps, "
        f"{result['num_clients']} clients, sample rate {result['sample_rate']:g}, "
        f"seed {result['seed']}",
    )
    if unused := result.get("unused_examples"):
        table.add_row("unused", f"{unused} training examples are in no part: no client trained on them")
    longest = sorted(result["phases"], key=lambda name: -result["phases"][name])
    phases = ", ".join(f"{name} {result['phases'][name]:.1f}" for name in longest)
    table.add_row("time", f"{result['seconds']:.1f} s ({phases})")
    memory = f"memory {result['peak_memory_mb']:.0f} MB without workers"
    table.add_row("throughput", f"{speed(result, ' expected')}; {memory}")
    return table


def _loss(loss: float | None) -> str:
    """Four digits after the point, or in all if the loss is large, as that of targets in the thousands."""
    if loss is None:
        return "not evaluated"
    return f"{loss:.4f}" if loss < 1e4 else f"{loss:.4g}"
