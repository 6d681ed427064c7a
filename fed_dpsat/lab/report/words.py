"""The privacy statement of a run as sentences, and the reasons for missing figures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fed_dpsat.client.evaluation import measured_on
from fed_dpsat.run.metric import CLASSIFICATION
from fed_dpsat.run.numbers import plain
from fed_dpsat.run.result import Run
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.tasks.metric import UNDEFINED

STATUS = {
    "completed": "The run is complete.",
    "interrupted": "The run was interrupted; `fed-dpsat resume` continues it.",
    "failed": "The run failed; this page shows its complete rounds.",
    "unfinished": "The run has not ended, or was killed; `fed-dpsat resume` continues it.",
}

NOT_COUNTED = "tuning: a choice of settings by runs on the same private data is a release that no epsilon here covers."


def state_of(run: Run) -> str:
    """The status, the number of rounds, and the reason of an early end."""
    done = run.rounds[-1]["round"] if run.rounds else 0
    words = f"{STATUS.get(run.status, run.status)} {done} of {run.config.num_rounds} rounds."
    if reason := run.summary.get("ended_early"):
        words += f" It ended before: {reason}."
    return words


def statement(run: Run) -> list[tuple[str, str]]:
    """``(subject, sentence)`` for each part of the guarantee, from the summary or else the configuration."""
    config, summary = run.config, run.summary
    if not config.private:
        return [("Privacy", "None: the run has no noise, and epsilon is infinite.")]
    spent = "unknown" if math.isnan(run.epsilon) else plain(run.epsilon, 4)
    unit = summary.get("privacy_unit", "one example of one client, add-or-remove; maximum over clients")
    public, released = ("; ".join(summary.get(key, ())) for key in ("declared_public", "also_released"))
    found = [
        ("Guarantee", f"epsilon {spent} at delta {config.delta:g}, by {config.accountant.upper()}."),
        ("Protects", f"{unit}."),
        ("Against", f"{summary.get('threat_model', 'a server that sees every update')}."),
        ("Noise", _noise(run)),
        ("Source of noise", f"{summary.get('noise') or config.noise_source}.{_seeded(config)}"),
        ("Declared public", f"{public or 'see docs/privacy.md'}."),
        ("Also released", f"{released or 'nothing'}."),
        ("Not counted", NOT_COUNTED),
    ]
    if "epsilon_released" in summary:
        found.insert(1, ("Against an observer of the released models", _to_outsiders(summary)))
    if "statistics_epsilon" in summary:
        alone = plain(summary["statistics_epsilon"], 4)
        found.insert(1, ("Statistics before training", f"epsilon {alone} alone; the guarantee includes them."))
    if "evaluation_epsilon" in summary:
        alone = plain(summary["evaluation_epsilon"], 4)
        found.insert(1, ("Evaluation by clients", f"epsilon {alone} alone; the guarantee includes all evaluations."))
    if warning := summary.get("delta_warning"):
        found.insert(1, ("Delta", f"{warning}."))
    if retired := summary.get("retired"):
        found.append(("Retired", f"{len(retired)} clients had spent their budget and left the cohorts."))
    if run.objects:
        found.append(("From Python", f"{', '.join(run.objects)}: the settings alone do not describe this run."))
    return found


def not_shown(run: Run, drawn: set[str]) -> list[str]:
    """A sentence for each missing figure."""
    reasons = list(run.missing)
    metric = run.metric
    if not run.evaluated:
        reasons.append(f"{metric.title} and loss: no model was evaluated.")
    elif f"{metric.slug}-against-round" not in drawn:
        reasons.append(f"{metric.title}: it is {_valueless(run)} in all rounds on the {measured_on(run.config)}.")
    elif f"{metric.slug}-against-epsilon" not in drawn:
        reasons.append(f"{metric.title} and loss against epsilon: it is infinite.")
    if "epsilon-per-client" not in drawn:
        why = "it is infinite" if math.isinf(run.epsilon) else "there is no ledger, or nothing in it"
        reasons.append(f"Epsilon of each client: {why}.")
    if "signal-and-noise" not in drawn and run.rounds:
        reasons.append("Update against noise: an older version wrote rounds.jsonl, or no round was completed.")
    if run.task != CLASSIFICATION:
        reasons.append("Calibration, accuracy by class and by client: they are of a classification.")
    elif "client-accuracy" not in drawn:
        reasons.append("Accuracy by client: it needs the clients' label counts, which only a simulation has.")
    if run.simulation is None:
        reasons.append("Partition: there is no simulation.json. A deployment does not know its clients' labels.")
    if run.sharpness is None:
        reasons.append("Sharpness: run `fed-dpsat sharpness`, and the next report shows it.")
    clip = "" if run.config.clipping != "adaptive" else ", except the bound of adaptive clipping, which epsilon covers"
    reasons.append(
        f"Clip rate, gradient norms and training loss: they are functions of private data that this run did not "
        f"release{clip}."
    )
    return reasons


def changed_settings(config: RunConfig) -> list[tuple[str, str, str]]:
    """``(name, value, meaning)`` of the settings that are not at their defaults."""
    default = RunConfig(noise_multiplier=1.0).settings() | {"noise_multiplier": 0.0}
    return [row for row in all_settings(config) if config.settings()[row[0]] != default[row[0]]]


def all_settings(config: RunConfig) -> list[tuple[str, str, str]]:
    """``(name, value, meaning)`` of every setting."""
    import dataclasses

    return [(f.name, str(getattr(config, f.name)), f.metadata["doc"]) for f in dataclasses.fields(config)]


def _valueless(run: Run) -> str:
    return "not finite" if run.defined else UNDEFINED


def _to_outsiders(summary: Mapping[str, Any]) -> str:
    if "epsilon_released_missing" in summary:
        return f"epsilon is unknown: {summary['epsilon_released_missing']}."
    return f"epsilon {plain(summary['epsilon_released'], 4)}; {summary['epsilon_released_assumptions']}."


def _noise(run: Run) -> str:
    multiplier = run.summary.get("noise_multiplier", run.config.noise_multiplier)
    clip = run.summary.get("clip_norm", run.config.clip_norm)
    at = f"noise multiplier {plain(multiplier, 4)}" if multiplier else "a noise multiplier calibrated to the budget"
    if run.config.noise_distribution == "laplace":
        at = f"Laplace noise, {at}"
    if run.config.privacy_unit == "client":
        return f"{at}, at clip norm {clip:g} of a client's whole change, on the sum of a cohort, by the server."
    of = f"of persons, up to {run.config.user_examples} examples each, " if run.config.privacy_unit == "user" else ""
    steps = "1 local step" if run.config.steps_per_round == 1 else f"{run.config.steps_per_round} local steps"
    return (
        f"{at}, the least of all clients, at clip norm {clip:g}; {steps} a round, each on a Poisson batch {of}at "
        f"sample rate {run.config.sample_rate:g}."
    )


def _seeded(config: RunConfig) -> str:
    if config.noise_source != "seeded":
        return ""
    return f" Anyone who knows seed {config.seed} can subtract the noise, so this simulation is not private."
