"""What a run says of its privacy beside epsilon: whom it is against, what it leaves out, whether delta is small."""

from __future__ import annotations

from logging import getLogger

from fed_dpsat.config import RunConfig
from fed_dpsat.experiment import Experiment

log = getLogger("fed_dpsat")

PERSONAL_RELEASED = (
    "accuracy of clients' own models on shares of the public test split that follow their label counts: exact, not "
    "covered by epsilon, and a figure of simulations alone"
)
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
    return [*([COUNTS_RELEASED] if config.release_counts else []), *([PERSONAL_RELEASED] if personal else [])]


def warn_about_delta(experiment: Experiment) -> None:
    """Log where delta is above one of those whom epsilon is about."""
    config = experiment.config
    smallest = min(len(indices) for indices in experiment.partitions)
    if config.private and config.privacy_unit == "client":
        if config.delta > 1 / config.num_clients:
            log.warning(
                "delta=%g is above 1/%d, one of the clients, whom epsilon is about; set it below",
                config.delta,
                config.num_clients,
            )
    elif config.private and config.delta > 1 / smallest:
        log.warning(
            "delta=%g is above 1/%d: the smallest client has %d examples, and a guarantee is usually asked to fail "
            "for less than one of them; set delta below %.1e",
            config.delta,
            smallest,
            smallest,
            1 / smallest,
        )


def warn_about_unused(experiment: Experiment) -> None:
    """Log how many training examples the partition gives to nobody, if any."""
    if unused := experiment.unused_examples:
        log.warning(
            "%d of %d training examples are in no part of partition=%s: nobody trains on them",
            unused,
            len(experiment.dataset.train),
            experiment.config.partition,
        )
