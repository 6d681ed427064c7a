"""What a run says of its privacy beside epsilon: whom it is against, what it leaves out, whether delta is small."""

from __future__ import annotations

from fed_dpsat.accounting import large_delta
from fed_dpsat.client.build import Experiment
from fed_dpsat.client.evaluation import measured_on
from fed_dpsat.settings.config import RunConfig

VALIDATION_RELEASED = (
    "accuracy and loss on the examples that validation_share holds out of the private training data, by round, and of "
    "the last model by class: exact, not covered by epsilon, which is about clients' examples"
)
COHORTS_LOGGED = "how many clients were drawn in each round, to loggers: exact, not covered by epsilon"
COUNTS_RELEASED = "examples without a finite gradient, per client and round: exact, not covered by epsilon"
DECLARED_PUBLIC = ("number of examples of each client", "number of clients", "who takes part in which round")
TRUSTED_SERVER = (
    "someone who sees every released model; the server is trusted: it sees each client's bounded change and adds noise"
)


def threat_model(config: RunConfig) -> str:
    """Whom epsilon is against, as it is printed beside it."""
    if config.privacy_unit == "example":
        return "a server that sees every update; no amplification by client sampling"
    if config.client_sampling == "poisson":
        return f"{TRUSTED_SERVER}; who was drawn, the seed and the run folder stay with it"
    return f"{TRUSTED_SERVER}; who takes part is known, no amplification by client sampling"


def declared_public(config: RunConfig) -> tuple[str, ...]:
    """What no epsilon covers, by declaration: a client's size and its coins are not, where the unit is the client."""
    if config.privacy_unit == "example":
        return DECLARED_PUBLIC
    return DECLARED_PUBLIC[1:2] if config.client_sampling == "poisson" else DECLARED_PUBLIC[1:]


def also_released(config: RunConfig, *, personal: bool) -> list[str]:
    """What leaves beside the updates and no epsilon covers; ``personal`` accuracies are measured in simulations."""
    found = [COUNTS_RELEASED] if config.release_counts else []
    if config.validation_share:
        found.append(VALIDATION_RELEASED)
    if personal:
        found.append(
            f"accuracy of clients' own models on shares of the {measured_on(config)} that follow their label counts: "
            "exact, not covered by epsilon, and a figure of simulations alone"
        )
    if config.loggers and config.privacy_unit == "client" and config.client_sampling == "poisson":
        found.append(COHORTS_LOGGED)
    return found


def delta_warning(experiment: Experiment) -> str:
    """Why delta is too large for those whom epsilon is about; empty if it is not."""
    config = experiment.config
    if not config.private:
        return ""
    by_client = config.privacy_unit == "client"
    smallest = min(len(indices) for indices in experiment.partitions)
    return large_delta(config.delta, config.privacy_unit, config.num_clients if by_client else smallest)


def unused_warning(experiment: Experiment) -> str:
    """How many training examples the partition gives to nobody; empty if it gives all."""
    if not (unused := experiment.unused_examples):
        return ""
    total, partition = len(experiment.dataset.train), experiment.config.partition
    return f"{unused} of {total} training examples are in no part of partition={partition}: nobody trains on them"
