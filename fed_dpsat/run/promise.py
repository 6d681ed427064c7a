"""The privacy statement of a run beside epsilon: the threat model, uncovered releases, and a warning about delta."""

from __future__ import annotations

from fed_dpsat.accounting import large_delta
from fed_dpsat.client.build import Experiment
from fed_dpsat.client.evaluation import measured_on
from fed_dpsat.settings.config import RunConfig

VALIDATION_RELEASED = (
    "metrics and loss on the examples that validation_share holds out of the private training data, by round, and of "
    "the last model by class: exact, not covered by epsilon, which is about clients' examples"
)
COHORTS_LOGGED = "how many clients were drawn in each round, to loggers: exact, not covered by epsilon"
COUNTS_RELEASED = "examples without a finite gradient, per client and round: exact, not covered by epsilon"
DECLARED_PUBLIC = ("number of examples of each client", "number of clients", "the cohort of each round")
TRUSTED_SERVER = (
    "an observer who sees every released model; the server is trusted: it sees each client's clipped change and adds "
    "noise"
)


def threat_model(config: RunConfig) -> str:
    """The adversary of epsilon, as text."""
    if config.privacy_unit != "client":
        return "a server that sees every update; no amplification by client sampling"
    if config.client_sampling != "fixed":
        return f"{TRUSTED_SERVER}; the cohorts, the seed and the run folder stay with it"
    public = f"{TRUSTED_SERVER}; the cohorts are public, no amplification by client sampling"
    if config.noise_mechanism == "independent":
        return public
    return (
        f"{public}; one mechanism over {config.num_rounds} rounds, for a client in at most {config.rounds_per_client} "
        f"of them, at least {config.separation} apart"
    )


def declared_public(config: RunConfig) -> tuple[str, ...]:
    """Facts that are declared public, so epsilon does not cover them; fewer if the unit is the client."""
    extractor = (public_extractor(config),) if config.features else ()
    if config.privacy_unit == "user":
        return ("number of persons of each client", *DECLARED_PUBLIC[1:], *extractor)
    if config.privacy_unit == "example":
        return DECLARED_PUBLIC + extractor
    return (DECLARED_PUBLIC[1:2] if config.client_sampling != "fixed" else DECLARED_PUBLIC[1:]) + extractor


def public_extractor(config: RunConfig) -> str:
    """What the extractor of features is, and what the account takes for granted."""
    return (
        f"the public extractor of features, {config.features} (SHA-256 {config.features_sha256[:16]}), frozen and not "
        "trained on the protected examples"
    )


def also_released(config: RunConfig, *, personal: bool) -> list[str]:
    """Releases beside the updates that epsilon does not cover; only simulations measure ``personal`` accuracies."""
    found = [COUNTS_RELEASED] if config.release_counts else []
    if config.validation_share:
        found.append(VALIDATION_RELEASED)
    if personal:
        found.append(
            f"the metric of clients' own models on shares of the {measured_on(config)} that follow their label counts: "
            "exact, not covered by epsilon, and a figure of simulations alone"
        )
    if config.loggers and config.privacy_unit == "client" and config.client_sampling != "fixed":
        found.append(COHORTS_LOGGED)
    return found


def delta_warning(experiment: Experiment) -> str:
    """A warning if delta is too large for the number of examples, persons or clients; else ""."""
    config = experiment.config
    if not config.private:
        return ""
    by_client = config.privacy_unit == "client"
    return large_delta(config.delta, config.privacy_unit, config.num_clients if by_client else min(experiment.sizes))


def unused_warning(experiment: Experiment) -> str:
    """A warning if the partition leaves out training examples; else ""."""
    if not (unused := experiment.unused_examples):
        return ""
    total, partition = len(experiment.dataset.train), experiment.config.partition
    return f"{unused} of {total} training examples are in no part of partition={partition}: no client trains on them"
