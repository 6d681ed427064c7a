"""All groups of settings together: the quantities that follow from several groups, and the refused combinations.

A group checks by itself which of its own settings exclude each other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fed_dpsat.settings import data, federation, machine, privacy, releases, training
from fed_dpsat.settings.data import Data
from fed_dpsat.settings.federation import Federation
from fed_dpsat.settings.machine import Machine
from fed_dpsat.settings.privacy import Privacy
from fed_dpsat.settings.releases import Releases
from fed_dpsat.settings.training import Training
from fed_dpsat.settings.values import refuse

GROUPS = (Data, Training, Privacy, Releases, Federation, Machine)


@dataclass(frozen=True, kw_only=True)
class Settings(Machine, Federation, Releases, Privacy, Training, Data):  # fields of the last base come first
    """The settings of all ``GROUPS``, in that order."""

    @property
    def amplifying_rate(self) -> float:
        """The chance of a client to be in a round in which it has a coin of its own; 1 without coins."""
        return 1.0 if self.client_sampling == "fixed" else self.client_rate * self.separation

    @property
    def evaluated_on(self) -> str:
        """The examples that the run evaluates on: "test", "validation" or "clients"."""
        return "clients" if self.evaluate == "clients" else "validation" if self.validation_share else "test"

    @property
    def cohort_size(self) -> int:
        """Clients asked per round."""
        return self.clients_per_round or self.num_clients

    @property
    def client_rate(self) -> float:
        """The chance of a client to be in a round."""
        return self.cohort_size / self.num_clients

    @property
    def bands(self) -> int:
        """``noise_bands``, or the number that 0 stands for."""
        most = self.min_separation if self.noise_mechanism == "band-mf" else self.num_rounds
        return self.noise_bands or min(most, 16)

    @property
    def separation(self) -> int:
        """The least number of rounds from a round of a client to its next one."""
        return self.bands if self.client_sampling == "cyclic" else self.min_separation

    @property
    def rounds_per_client(self) -> int:
        """The largest number of rounds that one client can take part in."""
        most = math.ceil(self.num_rounds / self.separation)
        return min(self.max_rounds_per_client or most, most)

    @property
    def total_steps(self) -> int:
        """Local steps of a model from the first round to the last: what learning rate schedules span."""
        return self.num_rounds * self.steps_per_model

    @property
    def steps_per_model(self) -> int:
        """``local_steps``, or the steps in which each example is expected to be seen ``local_epochs`` times."""
        return math.ceil(self.local_epochs / self.sample_rate) if self.local_epochs else self.local_steps

    @property
    def steps_per_round(self) -> int:
        """The private steps of a client in a round, over all its ``local_models``."""
        return self.steps_per_model * max(1, self.local_models)


def check_combinations(config: Settings) -> None:
    """Raise ``SettingError`` for an impossible combination: the first that is found."""
    data.check(config)
    training.check(config)
    privacy.check(config)
    releases.check(config)
    federation.check(config)
    machine.check(config)
    checks = (_correlated, _secure, _buffer, _attack, _unit, _laplace, _layers, _cohort, _half, _views, _statistics)
    for check in (*checks, _evaluation):
        check(config)


def _correlated(config: Settings) -> None:
    """What noise that cancels over rounds needs: one server that adds it, and a distance that the cohorts keep."""
    name = config.noise_mechanism
    with_it = f"with noise_mechanism={name!r}"
    if config.client_sampling == "cyclic" and name != "band-mf":
        refuse(config, "client_sampling", f"fixed or poisson {with_it}", "cyclic coins amplify band-mf alone")
    if name == "independent":
        for setting in ("noise_bands", "noise_buffers"):
            if getattr(config, setting) != getattr(Settings, setting):
                refuse(config, setting, f"possible {with_it}", "set noise_mechanism=band-mf, bisr or blt")
        return
    if config.privacy_unit != "client":
        remedy = "the noise of a client's own steps is independent; set privacy_unit=client, or independent"
        refuse(config, "noise_mechanism", f"independent with privacy_unit={config.privacy_unit!r}", remedy)
    if config.client_sampling == "poisson":
        remedy = "its rounds have no least distance: use fixed with min_separation, or cyclic with band-mf"
        refuse(config, "client_sampling", f"fixed or cyclic {with_it}", remedy)
    if config.unfreeze_round:
        refuse(config, "unfreeze_round", f"0 {with_it}", "noise of the head alone does not cancel in all layers")
    if config.bands > config.num_rounds:
        refuse(config, "noise_bands", f"at most num_rounds={config.num_rounds}", "lower it")
    if name == "band-mf" and config.bands > config.separation:
        bound = f"at most min_separation={config.min_separation} {with_it}"
        refuse(config, "noise_bands", bound, "more bands cost more than they cancel; lower it, or raise min_separation")
    if config.max_rounds_per_client > (most := math.ceil(config.num_rounds / config.separation)):
        bound = f"at most {most}: num_rounds={config.num_rounds}, {config.separation} apart, have room for no more"
        refuse(config, "max_rounds_per_client", bound, "lower it, or min_separation")


def _secure(config: Settings) -> None:
    if config.secure_aggregation and config.cohort_size < 3:
        bound = f"possible with {config.cohort_size} clients a round"
        refuse(config, "secure_aggregation", bound, "3 or more hide each other")


def _buffer(config: Settings) -> None:
    if not config.buffer_size:
        return
    if config.buffer_size > config.cohort_size:
        refuse(config, "buffer_size", f"at most the {config.cohort_size} clients that are under way", "lower it")
    if config.unfreeze_round:
        refuse(config, "buffer_size", "possible with head-then-all", "a late head fits no whole model; set it to 0")
    if config.privacy_unit == "client":
        refuse(config, "buffer_size", "possible with privacy_unit='client'", "its sum is over one cohort; set it to 0")


def _attack(config: Settings) -> None:
    if config.attack and config.noise_source != "seeded":
        bound = "possible with noise_source='system'"
        refuse(config, "attack", bound, "colluders' noise is drawn twice: simulate it seeded")


def _unit(config: Settings) -> None:
    """Flat clipping bounds a client's change once, and the server sees the change to bound it again."""
    if config.privacy_unit == "user":
        _user(config)
    if config.privacy_unit != "client":
        if config.keep_share < 1:
            bound = f"1 with privacy_unit={config.privacy_unit!r}"
            refuse(config, "keep_share", bound, "update_codec=top-k sends the largest changes")
        return
    unit = "with privacy_unit='client'"
    if config.clipping != "flat":
        refuse(config, "clipping", f"flat {unit}", "a client's whole change is clipped, once")
    if config.secure_aggregation:
        remedy = "the server bounds each change again, which a sum hides"
        refuse(config, "secure_aggregation", f"false {unit}", remedy)
    if config.update_codec not in ("fp32", "top-k"):
        refuse(config, "update_codec", f"fp32 or top-k {unit}", "the others send changes beyond the bound")
    if config.client_table:
        refuse(config, "client_table", f"empty {unit}", "one noise serves all clients")
    if config.release_counts:
        refuse(config, "release_counts", f"false {unit}", "exact counts are covered by no epsilon")
    if config.client_sampling != "fixed" and config.max_rounds_per_client:
        bound = f"0 {unit}, client_sampling={config.client_sampling!r}"
        refuse(config, "max_rounds_per_client", bound, "each round costs every client")


def _user(config: Settings) -> None:
    unit = "with privacy_unit='user'"
    if not config.user_column:
        refuse(config, "user_column", f"enough {unit}", "name the column that says whose an example is")
    for name in ("validation_share", "test_share"):
        if getattr(config, name):
            bound = f"0 {unit}: its rows are shown without noise, and may be those of a person who is protected"
            refuse(config, name, bound, "test on other persons, in a file of their own (test_path)")


def _laplace(config: Settings) -> None:
    if config.noise_distribution != "laplace":
        return
    if config.privacy_unit == "client":
        bound = "gaussian with privacy_unit='client'"
        refuse(config, "noise_distribution", bound, "the noise is on a whole model, whose L1 norm no clipping bounds")
    if config.private and config.accountant == "rdp" and config.sample_rate < 1:
        bound = f"able to bound Laplace noise at sample_rate={config.sample_rate:g}"
        refuse(config, "accountant", bound, "set accountant=pld: dp_accounting's RDP takes no sampled Laplace")


def _layers(config: Settings) -> None:
    if config.train_layers == "head-then-all" and not 2 <= config.unfreeze_round <= config.num_rounds:
        bound = f"in [2, num_rounds={config.num_rounds}]"
        refuse(config, "unfreeze_round", bound, "say from which round all is trained")


def _cohort(config: Settings) -> None:
    if config.min_clients > config.cohort_size:
        refuse(config, "min_clients", f"at most the {config.cohort_size} clients of a round", "lower it")
    if config.clients_per_round > config.num_clients:
        refuse(config, "clients_per_round", f"at most num_clients={config.num_clients}", "lower it, or 0 for all")
    if config.cohort_size * config.separation > config.num_clients:
        name = "noise_bands" if config.client_sampling == "cyclic" else "min_separation"
        most = config.num_clients // config.cohort_size
        bound = f"at most {most}: {config.cohort_size} of {config.num_clients} clients a round"
        refuse(config, name, bound, "lower it, or ask fewer clients per round")
    of_a_round = config.buffer_size or config.cohort_size
    if config.num_clients * config.rounds_per_client < config.num_rounds * of_a_round:
        refuse(
            config,
            "max_rounds_per_client",
            f"enough for num_rounds={config.num_rounds} of {of_a_round} clients",
            "raise it, or ask fewer clients per round",
        )


def _views(config: Settings) -> None:
    if config.augmentations and config.features:
        bound = f"possible with features={config.features!r}"
        refuse(config, "augmentations", bound, "features are computed once, of the image itself; set it to 0")


def _half(config: Settings) -> None:
    """The client's half of a strategy trains whole models whose releases are those of the unit "example"."""
    if not config.local_models:
        return
    half = f"with the client's half of strategy={config.strategy!r}"
    for name, good, remedy in (
        ("privacy_unit", config.privacy_unit != "client", "only whole changes are bounded then; set it to example"),
        ("buffer_size", not config.buffer_size, "a late reply no longer fits the model; set it to 0"),
        ("attack", not config.attack, "attacks forge models, and not records; leave it empty"),
        ("local_averaging", not config.local_averaging, "the half says what a client sends; leave it empty"),
        ("personal_layers", not config.personal_layers, "leave it empty: the half says what stays on a client"),
        ("unfreeze_round", not config.unfreeze_round, "the state of a half has one shape; set it to 0"),
    ):
        if not good:
            refuse(config, name, f"possible {half}", remedy)


def _statistics(config: Settings) -> None:
    paid = config.statistics_epsilon or config.statistics_from
    if paid and not config.private:
        name = "statistics_from" if config.statistics_from else "statistics_epsilon"
        refuse(config, name, "possible with private=false", "that adds no noise; leave it out, or set private=true")
    for name in ("statistics_epsilon", "evaluation_budget"):
        if 0 < config.target_epsilon <= getattr(config, name):
            bound = f"below target_epsilon={config.target_epsilon:g}, which is of training and other releases together"
            refuse(config, name, bound, "lower it: the rest is for training")


def _evaluation(config: Settings) -> None:
    """The clients of a simulation evaluate one global model, and all of them do so in each evaluation."""
    if config.evaluate != "clients":
        return
    for name, good, remedy in (
        ("privacy_unit", config.privacy_unit in ("example", "client"), "set it to example or client"),
        ("private", config.private, "that adds no noise; set evaluate=server"),
        ("validation_share", not config.validation_share, "those examples are evaluated exactly; set it to 0"),
        ("secure_aggregation", not config.secure_aggregation, "the server would see each client's noised sum"),
        ("buffer_size", not config.buffer_size, "clients evaluate after a round of one cohort; set it to 0"),
        ("budget_mode", config.budget_mode == "calibrate", "a budget is split before the run; set it to calibrate"),
        ("client_table", not config.client_table, "one noise serves all evaluations; leave it out"),
        ("personal_layers", not config.personal_layers, "there is no one model to evaluate; leave it empty"),
        ("attack", not config.attack, "labels of attackers are forged; leave it empty"),
        ("averaging", not config.averaging, "the average of models is evaluated exactly; leave it empty"),
    ):
        if not good:
            refuse(config, name, "possible with evaluate='clients'", remedy)
    if config.task not in ("classification", "regression"):
        refuse(config, "task", "one with a bounded metric, for evaluate='clients'", "use classification or regression")
    if config.task == "regression" and not config.error_bound:
        refuse(config, "error_bound", "enough for evaluate='clients'", "declare the largest error that counts")
    if config.task == "regression" and config.metric != "mae":
        refuse(config, "metric", "mae, the bounded metric of evaluate='clients'", "set metric=mae")
    if config.task == "regression" and config.evaluation_metrics:
        refuse(config, "evaluation_metrics", "possible with task='regression'", "leave it empty")
    needs = {
        "balanced_accuracy": "confusion",
        "macro_f1": "confusion",
        "auroc": "scores",
        "average_precision": "scores",
    }
    line = needs.get(config.metric, "")
    if line and line not in config.evaluation_metrics:
        refuse(config, "metric", "released by evaluate='clients'", f"set evaluation_metrics={line}")
