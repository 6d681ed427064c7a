"""Which settings go together, feature by feature; what one may be by itself stands beside it in ``config``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from fed_dpsat.errors import SettingError

if TYPE_CHECKING:
    from fed_dpsat.settings.config import RunConfig

Fail = Callable[[str, str, str], None]
"""Name of the setting, bound and remedy, as ``SettingError`` has them."""


def check_combinations(config: RunConfig) -> None:
    """Raises ``SettingError`` for an impossible combination: the first that is found."""

    def fail(name: str, bound: str, remedy: str) -> None:
        raise SettingError(name, getattr(config, name), bound, remedy)

    for check in (_open_bounds, _secure, _buffer, _attack, _unit, _device, _noise, _layers, _cohort):
        check(config, fail)


def _open_bounds(config: RunConfig, fail: Fail) -> None:
    if config.delta >= 1:
        fail("delta", "in (0, 1)", "below 1 / examples per client is usual")
    if config.dropout_rate >= 1:
        fail("dropout_rate", "in [0, 1)", "nobody would ever reply")
    if math.isinf(config.delay_mean):
        fail("delay_mean", "finite", "nobody would ever reply")
    if config.momentum >= 1:
        fail("momentum", "in [0, 1)", "0.9 is usual")


def _secure(config: RunConfig, fail: Fail) -> None:
    if not config.secure_aggregation:
        return
    if config.update_codec != "fp32":
        fail("update_codec", "possible with secure_aggregation", "masked sums need every coordinate; use fp32")
    if config.buffer_size:
        fail("buffer_size", "possible with secure_aggregation", "masks cancel within one cohort; set it to 0")
    if config.cohort_size < 3:
        fail("secure_aggregation", f"possible with {config.cohort_size} clients a round", "3 or more hide each other")


def _buffer(config: RunConfig, fail: Fail) -> None:
    if not config.buffer_size:
        return
    if config.buffer_size > config.cohort_size:
        fail("buffer_size", f"at most the {config.cohort_size} clients that are under way", "lower it")
    if config.unfreeze_round:
        fail("buffer_size", "possible with head-then-all", "a late head fits no whole model; set it to 0")
    if config.delay == "none":
        fail("delay", "enough for buffer_size", "clients arrive in the order of simulated delays: lognormal, say")
    if config.client_sampling != "fixed":
        fail("client_sampling", f"possible with buffer_size={config.buffer_size}", "places are filled: use fixed")
    if config.privacy_unit == "client":
        fail("buffer_size", "possible with privacy_unit='client'", "its sum is over one cohort; set it to 0")


def _attack(config: RunConfig, fail: Fail) -> None:
    if bool(config.attack) != (config.attackers > 0):
        fail("attackers", f"possible with attack={config.attack!r}", "give both a share of clients and an attack")
    if config.attack and config.noise_source != "seeded":
        fail("attack", "possible with noise_source='system'", "colluders' noise is drawn twice: simulate it seeded")


def _unit(config: RunConfig, fail: Fail) -> None:
    """A client's change is bounded once, by flat clipping, and the server has to see it to bound it again."""
    if config.privacy_unit == "example":
        if config.keep_share < 1:
            fail("keep_share", "1 with privacy_unit='example'", "update_codec=top-k sends the largest changes")
        return
    unit = "with privacy_unit='client'"
    if config.clipping != "flat":
        fail("clipping", f"flat {unit}", "a client's whole change is clipped, once")
    if config.secure_aggregation:
        fail("secure_aggregation", f"false {unit}", "the server bounds each change again, which a sum hides")
    if config.update_codec not in ("fp32", "top-k"):
        fail("update_codec", f"fp32 or top-k {unit}", "the others send changes beyond the bound")
    if config.client_table:
        fail("client_table", f"empty {unit}", "one noise serves all clients")
    if config.release_counts:
        fail("release_counts", f"false {unit}", "exact counts are covered by no epsilon")
    if config.client_sampling == "poisson" and config.rounds_per_client < config.num_rounds:
        fail("max_rounds_per_client", f"0 {unit}, client_sampling='poisson'", "each round costs every client")


def _device(config: RunConfig, fail: Fail) -> None:
    """Ray decides which card a worker sees, if any, and each worker sees it as its first."""
    if config.ray_address and not config.workers:
        fail("workers", f"enough for ray_address={config.ray_address!r}", "say how many of its CPUs to use")
    kind, _, number = config.device.partition(":")
    if config.device not in ("cpu", "cuda", "auto") and not (kind == "cuda" and number.isdecimal()):
        fail("device", "one of cpu, cuda, cuda:N, auto", "cuda:1 is the second card")
    if config.gpus_per_worker and not config.workers:
        fail("gpus_per_worker", "possible with workers=0", "set it to 0, or workers above 0")
    if config.gpus_per_worker and config.device == "cpu":
        fail("gpus_per_worker", "possible with device='cpu'", "set it to 0, or device=cuda")
    if config.workers and number:
        fail("device", f"possible with workers={config.workers}", "Ray gives out the cards: set device=cuda")
    if config.workers and config.device == "cuda" and not config.gpus_per_worker:
        fail(
            "gpus_per_worker",
            f"enough for device='cuda' with workers={config.workers}: Ray would give them none",
            "set gpus_per_worker=0.25 for four workers on each card, 1 for one",
        )


def _noise(config: RunConfig, fail: Fail) -> None:
    noise, target = config.noise_multiplier, config.target_epsilon
    if not config.private:
        if noise > 0 or target > 0:
            bound = f"possible with noise_multiplier={noise}, target_epsilon={target}"
            fail("private", bound, "set both to 0, or private=true")
        return
    if config.budget_mode == "retire" and noise == 0:
        fail("noise_multiplier", "enough for budget_mode='retire'", "that mode spends budgets at a noise you set")
    if config.budget_mode == "calibrate" and noise > 0 and target > 0:
        fail(
            "noise_multiplier",
            f"usable together with target_epsilon={target}",
            "keep one and set the other to 0, or budget_mode=retire to spend a budget at a noise you set",
        )
    if config.budget_mode == "calibrate" and noise == 0 and target == 0:
        fail(
            "target_epsilon",
            "enough to be private while noise_multiplier=0",
            "set one of the two above 0, or private=false",
        )
    if math.isinf(config.clip_norm):
        fail("clip_norm", "finite in a private run", "noise needs a bound; 0.1 to 1 is usual")


def _layers(config: RunConfig, fail: Fail) -> None:
    if config.personal_layers and config.unfreeze_round:
        fail("personal_layers", "possible with train_layers='head-then-all'", "keep one of them")
    if config.start_head == "new" and not config.start_from:
        fail("start_head", "possible without start_from", "a model that starts anew has a new head anyway")
    if config.last_layers > 1 and config.train_layers != "last":
        fail("last_layers", f"possible with train_layers={config.train_layers!r}", "set train_layers=last")
    if config.train_layers == "head-then-all" and not 2 <= config.unfreeze_round <= config.num_rounds:
        fail("unfreeze_round", f"in [2, num_rounds={config.num_rounds}]", "say from which round all is trained")
    if config.unfreeze_round and config.train_layers != "head-then-all":
        fail("unfreeze_round", f"possible with train_layers={config.train_layers!r}", "use head-then-all, or 0")


def _cohort(config: RunConfig, fail: Fail) -> None:
    if config.min_clients > config.cohort_size:
        fail("min_clients", f"at most the {config.cohort_size} clients of a round", "lower it")
    if config.clients_per_round > config.num_clients:
        fail("clients_per_round", f"at most num_clients={config.num_clients}", "lower it, or 0 for all")
    of_a_round = config.buffer_size or config.cohort_size
    if config.num_clients * config.rounds_per_client < config.num_rounds * of_a_round:
        fail(
            "max_rounds_per_client",
            f"enough for num_rounds={config.num_rounds} of {of_a_round} clients",
            "raise it, or ask fewer clients per round",
        )
