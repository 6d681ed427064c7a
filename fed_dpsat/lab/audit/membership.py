"""A membership-inference curve by online LiRA (Carlini et al. 2022, arXiv 2112.03570).

Each of ``n`` models is a whole federation, trained on a random half of the examples of every client. Each model is the
target once, and the others are its shadow models. They give two Gaussians of the logit-scaled confidence
log(p_y / (1 - p_y)) of an example: for models with the example and for models without it, with a mean per example and
one variance for all. The score is the log-likelihood ratio at the target. The attacker sees only the last global model.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fed_dpsat.client.build import Experiment
from fed_dpsat.errors import SettingError
from fed_dpsat.lab.audit.canaries import one_process, train
from fed_dpsat.run.folder import RunFolder
from fed_dpsat.settings.config import RunConfig

Values = NDArray[np.float64]
Coins = NDArray[np.bool_]

LOW_RATES = (0.001, 0.01)


@dataclass(frozen=True, kw_only=True)
class MembershipCurve:
    """True and false positive rates over ``decisions`` = models x examples, from ``models`` trainings.

    ``at_low`` gives the true positive rate at each of ``LOW_RATES``. Decisions about one model or one example are not
    independent, so there is no exact interval; ``spread`` is the standard deviation over target models.
    """

    models: int
    examples: int
    decisions: int
    false_positive_rates: Values
    true_positive_rates: Values
    area: float
    at_low: tuple[float, ...]
    spread: tuple[float, ...]
    epsilon_ledger: float
    delta: float


def membership_curve(
    config: RunConfig, *, models: int = 32, seed: int = 0, on_model: Callable[[int], None] | None = None
) -> MembershipCurve:
    """Train ``models`` federations, each on its own half of the examples, and attack each with the others."""
    if models < 8:
        raise SettingError("models", models, "at least 8", "a Gaussian from two shadows says little; 64 is better")
    experiment = Experiment.build(one_process(config))
    generator = np.random.default_rng([seed, 0x117A])
    owned = np.sort(np.concatenate([np.asarray(p) for p in experiment.partitions]))
    coins = np.zeros((models, len(experiment.dataset.train)), dtype=bool)
    confidences, spent = np.zeros((models, len(owned))), 0.0
    for model in range(models):
        coins[model] = generator.random(coins.shape[1]) < 0.5
        own_seed = dataclasses.replace(experiment.config, seed=experiment.config.seed + model)
        halves = [part[coins[model][part]] for part in experiment.partitions]
        if empty := [client for client, part in enumerate(halves) if len(part) == 0]:
            raise SettingError(
                "models", models, f"possible: client {empty[0]} has too few examples", "lower num_clients"
            )
        half = dataclasses.replace(experiment, config=own_seed, partitions=halves, named=False)
        with tempfile.TemporaryDirectory() as name:
            folder = RunFolder(Path(name) / "run")
            spent = max(spent, train(half, None, folder))
            checkpoint = folder.load_checkpoint()
            assert checkpoint is not None  # the run is over
            confidences[model] = logit_confidence(experiment, checkpoint.params, owned)
        if on_model:
            on_model(model + 1)
    members = coins[:, owned]
    scores = likelihood_ratios(confidences, members)
    false_positive_rates, true_positive_rates = curve(scores.ravel(), members.ravel())
    each = np.array([[rate_at(*curve(s, m), low) for low in LOW_RATES] for s, m in zip(scores, members, strict=True)])
    return MembershipCurve(
        models=models,
        examples=len(owned),
        decisions=members.size,
        false_positive_rates=false_positive_rates,
        true_positive_rates=true_positive_rates,
        area=float(np.trapezoid(true_positive_rates, false_positive_rates)),
        at_low=tuple(rate_at(false_positive_rates, true_positive_rates, low) for low in LOW_RATES),
        spread=tuple(float(s) for s in each.std(0, ddof=1)),
        epsilon_ledger=spent,
        delta=config.delta,
    )


def logit_confidence(experiment: Experiment, params: dict[str, torch.Tensor], rows: NDArray[np.int64]) -> Values:
    """``log(p_y / (1 - p_y))`` of training rows ``[N]``, from the loss -log p_y in float64."""
    found = []
    with torch.no_grad():
        for part in np.array_split(rows, max(1, len(rows) // 500)):
            loss = experiment.loss_fn(params, *experiment.dataset.train.batch(torch.from_numpy(part))).double()
            found.append((-loss - torch.log(-torch.expm1(-loss.clamp(min=1e-12)))).numpy())
    return np.concatenate(found)


def likelihood_ratios(confidences: Values, members: Coins) -> Values:
    """``confidences[M, N], members[M, N] -> log ratios[M, N]``, each model attacked with the other M - 1."""
    scores = np.zeros_like(confidences)
    for target in range(len(confidences)):
        others = np.arange(len(confidences)) != target
        seen, inside = confidences[others], members[others]
        log_densities = []
        for chosen in (inside, ~inside):
            counts = np.maximum(chosen.sum(0), 1)
            mean = np.where(chosen, seen, 0).sum(0) / counts
            mean = np.where(chosen.any(0), mean, seen.mean(0))  # all models, or none, had the example
            residuals = (seen - mean)[chosen]
            variance = max(float(residuals.var()), 1e-12)
            log_densities.append(-((confidences[target] - mean) ** 2) / (2 * variance) - 0.5 * np.log(variance))
        scores[target] = log_densities[0] - log_densities[1]
    return scores


def curve(scores: Values, members: Coins) -> tuple[Values, Values]:
    """False and true positive rates at every threshold, from (0, 0) to (1, 1); equal scores fall together."""
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    true, false = np.cumsum(members[order])[last], np.cumsum(~members[order])[last]
    return np.append(0, false / max(1, (~members).sum())), np.append(0, true / max(1, members.sum()))


def rate_at(false_positive_rates: Values, true_positive_rates: Values, low: float) -> float:
    """The largest true positive rate whose false positive rate is at most ``low``."""
    return float(true_positive_rates[false_positive_rates <= low].max())


def draw_membership(result: MembershipCurve, path: Path) -> None:
    """Draw the curve on logarithmic axes into ``path``, in the format of its suffix."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2, 4), layout="constrained")
    axes = figure.subplots()
    least = 1 / result.decisions
    axes.plot([least, 1], [least, 1], color="0.6", linestyle="--", label="a coin")
    axes.plot(result.false_positive_rates, result.true_positive_rates, color="#0072B2", label="LiRA, online")
    axes.set(xscale="log", yscale="log", xlim=(1e-4, 1), ylim=(1e-4, 1))
    axes.set(xlabel="false positive rate", ylabel="true positive rate")
    axes.set_title(
        f"{result.models} models, {result.examples} examples, epsilon {result.epsilon_ledger:.3g} at "
        f"delta {result.delta:g}",
        fontsize=9,
    )
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=160)
