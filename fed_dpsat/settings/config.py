"""Every setting of a run: its name, type, default, unit and bounds. One name each, scalars only.

A TOML file, ``--set key=value`` and Flower's run config are the same thing, so a ``RunConfig`` is flat. What
is a name (``optimizer``, ``model``, ...) becomes an object in ``fed_dpsat.plugins``. Which settings go together is in
``fed_dpsat.settings.combinations``.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from fed_dpsat.errors import SettingError
from fed_dpsat.settings.combinations import check_combinations

Scalar = bool | int | float | str

MACHINE = frozenset(
    {
        "workers",
        "ray_address",
        "gpus_per_worker",
        "tune_malloc",
        "out",
        "resume",
        "profile",
        "loggers",
        "join_timeout",
        "reply_timeout",
        "cache_dir",
    }
)
"""Settings that may change when a run is resumed: they say where and how long, not what."""

AscentMemory = Literal["client", "zero"]


def _setting(
    default: Scalar,
    doc: str,
    *,
    above: float = -math.inf,
    least: float = -math.inf,
    most: float = math.inf,
    choices: tuple[str, ...] = (),
) -> Any:
    return field(
        default=default,
        metadata={"doc": doc, "above": above, "least": least, "most": most, "choices": choices},
    )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run. Raises ``SettingError`` for a wrong type, a value out of bounds or an impossible combination."""

    # data
    dataset: str = _setting("digits", "data set, a short name or package.module:attribute")
    dataset_args: str = _setting("", "arguments of the data set that no setting fills: site = 'north'")
    data_source: str = _setting("embedded", "place it comes from: embedded, parquet, torchvision, download, hub")
    data_path: str = _setting("", "folder of the data set, for the sources that have one")
    cache_dir: str = _setting("~/.cache/fed_dpsat", "folder for decoded data, shared by runs and workers")
    validation_share: float = _setting(
        0.0,
        "share of the training examples that no client gets and that is evaluated on in place of the test split, to "
        "choose settings on; drawn from the seed",
        least=0,
        most=1,
    )
    num_clients: int = _setting(10, "number of clients in the federation", least=1)
    partition: str = _setting("iid", "way examples are dealt to clients")
    partition_args: str = _setting("", "arguments of the partition that no setting fills: column = 'writer'")
    dirichlet_alpha: float = _setting(0.3, "concentration of the dirichlet partition; small is skewed", above=0)
    classes_per_client: int = _setting(2, "number of classes per client in the shards partition", least=1)
    size_skew: float = _setting(1.0, "inequality of client sizes in the size-skew partition", above=0)

    # model and local training
    model: str = _setting(
        "linear",
        "network, a short name, timm:NAME, torchvision:NAME, transformers:FOLDER, or package.module:attribute",
    )
    model_args: str = _setting("", "arguments of the network that no setting fills: depth = 6, patch_size = 4")
    norm: str = _setting(
        "", "group replaces each BatchNorm of the network by a GroupNorm; empty replaces nothing", choices=("", "group")
    )
    start_from: str = _setting(
        "",
        "weights to start from, public: safetensors, a state dict of torch, a run folder, or a folder with "
        "model.safetensors; empty starts anew",
    )
    start_head: str = _setting(
        "loaded",
        "head (last layer) to start with: loaded from start_from, or new, for another number of classes",
        choices=("loaded", "new"),
    )
    train_layers: str = _setting(
        "all",
        "layers that are trained, sent and noised: all, the last few, the head alone, or the head until unfreeze_round",
        choices=("all", "last", "head", "head-then-all"),
    )
    last_layers: int = _setting(1, "number of layers that train_layers=last trains", least=1)
    unfreeze_round: int = _setting(0, "first round in which train_layers=head-then-all trains all", least=0)
    personal_layers: str = _setting(
        "",
        "layers that stay on the client, are never sent and never averaged: head (the last one) or names, with commas; "
        "empty shares all",
    )
    optimizer: str = _setting("dp-sat", "private optimizer")
    base_optimizer: str = _setting(
        "dp-sgd", "the step that dp-sat and its kind make, itself an optimizer; disk+adam is disk over adam"
    )
    optimizer_args: str = _setting("", "arguments of the optimizers that no setting fills: beta2 = 0.99, floor = 0.1")
    lr: float = _setting(2.0, "learning rate", least=0)
    lr_schedule: str = _setting(
        "constant",
        "learning rate over all steps: constant, linear, cosine",
        choices=("constant", "linear", "cosine"),
    )
    momentum: float = _setting(0.0, "momentum of the step, kept by the client across rounds", least=0, most=1)
    weight_decay: float = _setting(0.0, "weight decay of the step", least=0)
    rho: float = _setting(0.03, "radius that sharpness-aware methods climb, in parameter space", least=0)
    ascent_memory: str = _setting(
        "client",
        "direction climbed first in a round: the client's last private gradient, or zero",
        choices=get_args(AscentMemory),
    )
    local_steps: int = _setting(1, "number of private steps a client takes per round", least=1)
    local_epochs: int = _setting(
        0,
        "number of passes over its data a client takes per round, instead of local_steps; 0 is for local_steps",
        least=0,
    )
    sample_rate: float = _setting(0.5, "chance of each example to be in a Poisson batch", above=0, most=1)
    physical_batch_size: int = _setting(128, "number of per-example gradients in memory at a time", least=1)
    engine: str = _setting(
        "auto",
        "way per-example gradients are computed: auto, vmap (any module), planned (layer by layer), opacus",
        choices=("auto", "vmap", "planned", "opacus"),
    )
    precision: str = _setting(
        "float32",
        "precision of linear and convolution layers; bfloat16 is faster on CPUs that have it and rounds each example's "
        "gradient before clipping",
        choices=("float32", "bfloat16"),
    )
    kernels: str = _setting(
        "auto",
        "what the planned engine computes with on a CPU: torch, or also kernels of its own, compiled by the machine's "
        "C compiler; auto is compiled where that works",
        choices=("auto", "compiled", "torch"),
    )

    # privacy
    privacy_unit: str = _setting(
        "example",
        "what epsilon protects: example (of one client; noise on the client) or client (with all its examples; noise "
        "by a trusted server)",
        choices=("example", "client"),
    )
    private: bool = _setting(True, "switch: false trains without noise and reports epsilon = inf")
    clipping: str = _setting("flat", "clipping rule")
    clipping_args: str = _setting("", "arguments of the clipping rule that no setting fills: groups = 4")
    clip_norm: float = _setting(
        0.5,
        "largest norm of one example's gradient, or of a client's whole change if that is the unit; inf only if not "
        "private",
        above=0,
    )
    clip_quantile: float = _setting(0.5, "share of examples that adaptive clipping leaves unclipped", above=0, most=1)
    clip_lr: float = _setting(0.2, "speed at which adaptive clipping follows the quantile", least=0)
    global_threshold: float = _setting(10.0, "gradient norm beyond which global clipping drops an example", above=0)
    noise_multiplier: float = _setting(0.0, "noise on the sum, in clip norms; 0 is for target_epsilon", least=0)
    target_epsilon: float = _setting(
        0.0, "epsilon of the whole run, noise is calibrated to it; 0 is for noise_multiplier", least=0
    )
    budget_mode: str = _setting(
        "calibrate",
        "way target_epsilon is kept: calibrate finds noise for the schedule, retire takes noise_multiplier and stops "
        "asking a client whose next round would exceed it",
        choices=("calibrate", "retire"),
    )
    client_table: str = _setting(
        "", "CSV file of clients that differ: client, target_epsilon, sample_rate, first_round"
    )
    delta: float = _setting(1e-5, "delta of the guarantee", above=0, most=1)
    accountant: str = _setting("pld", "accountant of the epsilon that is reported: pld, rdp", choices=("pld", "rdp"))

    release_counts: bool = _setting(
        False, "switch: clients send how many examples had no finite gradient; exact, and not covered by epsilon"
    )

    # federation
    strategy: str = _setting("fedavg", "server strategy, any Flower strategy")
    strategy_args: str = _setting("", "arguments of the strategy that no setting fills: eta = 0.02, tau = 1e-3")
    keep_share: float = _setting(
        1.0,
        "share of the coordinates of its change that a client keeps, the largest, before it is clipped; below 1 with "
        "privacy_unit=client",
        above=0,
        most=1,
    )
    update_codec: str = _setting(
        "fp32",
        "way a client's update is written for the network: fp32, bf16, top-k (largest changes), random-k (unbiased)",
        choices=("fp32", "bf16", "top-k", "random-k"),
    )
    update_share: float = _setting(0.1, "share of the coordinates that top-k and random-k send", above=0, most=1)
    num_rounds: int = _setting(30, "number of rounds", least=1)
    clients_per_round: int = _setting(0, "number of clients drawn per round; 0 asks all", least=0)
    client_sampling: str = _setting(
        "fixed",
        "way a cohort is drawn: fixed draws clients_per_round, poisson tosses a coin for each client",
        choices=("fixed", "poisson"),
    )
    buffer_size: int = _setting(
        0,
        "number of arrivals that make a round (FedBuff), while clients_per_round are under way; 0 waits for the cohort",
        least=0,
    )
    staleness_exponent: float = _setting(
        0.5, "discount of updates that set out s rounds ago, (1 + s) to the power of minus this", least=0
    )
    max_rounds_per_client: int = _setting(
        0, "largest number of rounds one client takes part in; 0 is num_rounds", least=0
    )
    min_clients: int = _setting(1, "number of clients a round needs; with fewer left in budget the run ends", least=1)
    secure_aggregation: bool = _setting(
        False, "switch: the server sees sums of updates and no single one; epsilon stays that of one who sees all"
    )
    secure_threshold: float = _setting(
        0.67,
        "share of a cohort that must stay to the end of a round, or its sum is lost; a majority",
        above=0.5,
        most=1,
    )
    attack: str = _setting("", "what attackers do, in a simulation of it; empty is for no attackers")
    attack_args: str = _setting("", "arguments of the attack: factor = 10")
    attackers: float = _setting(0.0, "share of clients that attack, drawn from the seed", least=0, most=1)
    dropout_rate: float = _setting(
        0.0, "simulated chance of a client that is asked to be away for the round; it stays charged", least=0, most=1
    )
    delay: str = _setting(
        "none",
        "simulated time until a reply is there: none, exponential, lognormal; not slept through",
        choices=("none", "exponential", "lognormal"),
    )
    delay_mean: float = _setting(1.0, "mean of the simulated delay in seconds", above=0)
    client_timeout: float = _setting(
        0.0,
        "time in seconds after which a client is given up: a simulated delay, or a worker at one client; 0 is never",
        least=0,
    )
    join_timeout: float = _setting(60.0, "time in seconds until all clients must have joined", above=0)
    reply_timeout: float = _setting(3600.0, "time in seconds to wait for the replies of a round", above=0)

    # machine
    seed: int = _setting(0, "seed of every draw; with noise_source=seeded the same seed gives the same bits", least=0)
    noise_source: str = _setting(
        "seeded",
        "source of coins and noise: seeded (reproducible, not private) or system (cryptographic)",
        choices=("seeded", "system"),
    )
    workers: int = _setting(0, "number of Ray workers; 0 trains in this process", least=0)
    ray_address: str = _setting(
        "", "Ray cluster to join and leave running, host:port or auto; by default one is started for the run"
    )
    device: str = _setting(
        "cpu",
        "device of model and batches: cpu, cuda, cuda:N, or auto (cuda where there is a card, else cpu); the last bits "
        "of results depend on it",
    )
    gpus_per_worker: float = _setting(
        0.0, "share of a card that each Ray worker takes: at 0.25 four workers share one", least=0, most=1
    )
    threads_per_client: int = _setting(1, "number of intra-op threads of a client; results depend on it", least=1)
    stack_clients: int = _setting(
        1,
        "number of clients that one process trains together in one kernel, for small models and GPUs; the last bits of "
        "results depend on it",
        least=1,
    )
    tune_malloc: bool = _setting(
        True, "switch: on glibc, let the allocator keep freed blocks: steps are up to twice as fast"
    )
    out: str = _setting("", "run folder, new or empty; by default one in runs/ that is named after config and time")
    resume: bool = _setting(False, "switch: go on with the run in out, from its last checkpoint")
    profile: bool = _setting(False, "switch: write trace.json, who was at work when, for ui.perfetto.dev")
    loggers: str = _setting("", "loggers besides the run folder, comma-separated: tensorboard, mlflow, wandb, your own")
    evaluate_every: int = _setting(1, "number of rounds between evaluations; the last round always is", least=1)

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            _check_value(spec, value)
            if spec.type == "float":
                object.__setattr__(self, spec.name, float(value))
        check_combinations(self)

    @property
    def amplifying_rate(self) -> float:
        """The chance of a client to be in a round where that may be counted on: coins of their own, else 1."""
        return self.client_rate if self.client_sampling == "poisson" else 1.0

    @property
    def cohort_size(self) -> int:
        """Clients asked per round."""
        return self.clients_per_round or self.num_clients

    @property
    def client_rate(self) -> float:
        """The chance of a client to be in a round."""
        return self.cohort_size / self.num_clients

    @property
    def rounds_per_client(self) -> int:
        """The largest number of rounds that one client can take part in."""
        return min(self.max_rounds_per_client or self.num_rounds, self.num_rounds)

    @property
    def total_steps(self) -> int:
        """Local steps from the first round to the last: what learning rate schedules span."""
        return self.num_rounds * self.steps_per_round

    @property
    def steps_per_round(self) -> int:
        """``local_steps``, or the steps in which each example is expected to be seen ``local_epochs`` times."""
        return math.ceil(self.local_epochs / self.sample_rate) if self.local_epochs else self.local_steps

    def settings(self) -> dict[str, Scalar]:
        """Every setting as it stands, in order: a Flower run config, or the body of a TOML file."""
        return dataclasses.asdict(self)

    def to_toml(self) -> str:
        """The settings as TOML, with the documentation of each as a comment."""
        lines = []
        for spec in dataclasses.fields(self):
            lines.append(f"{spec.name} = {_toml(getattr(self, spec.name))}  # {spec.metadata['doc']}")
        return "\n".join(lines) + "\n"

    def with_absolute_paths(self) -> RunConfig:
        """Paths resolved against the working directory, for code that runs elsewhere."""
        return dataclasses.replace(
            self,
            data_path=_absolute(self.data_path),
            cache_dir=_absolute(self.cache_dir),
            out=_absolute(self.out),
            client_table=_absolute(self.client_table),
            start_from=_absolute(self.start_from),
        )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> RunConfig:
        """From already typed scalars; an unknown key is an error that names the near ones."""
        known = [spec.name for spec in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=3)
                hint = f"did you mean {', '.join(near)}?" if near else "`fed-dpsat run --help` lists them"
                raise SettingError(key, values[key], "a setting", hint)
        return cls(**values)

    @classmethod
    def load(cls, path: Path | None = None, overrides: Iterable[str] = ()) -> RunConfig:
        """From a TOML file, if any, and ``key=value`` strings that win over it."""
        values: dict[str, Any] = {}
        if path is not None:
            try:
                values = tomllib.loads(path.read_text())
            except OSError as error:
                raise SettingError("config", str(path), "a readable file", error.strerror or "check the path") from None
            except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
                raise SettingError("config", str(path), "valid TOML", str(error)) from None
        return cls.from_mapping({**values, **parse_overrides(overrides)})


def parse_overrides(overrides: Iterable[str]) -> dict[str, Scalar]:
    """``key=value`` strings as settings, typed; raises ``SettingError`` for what has another form."""
    values = {}
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise SettingError("--set", override, "of the form key=value", "for example --set lr=2.0")
        values[key.strip()] = _parse(key.strip(), text.strip())
    return values


def _parse(key: str, text: str) -> Scalar:
    kinds = {spec.name: str(spec.type) for spec in dataclasses.fields(RunConfig)}
    if kinds.get(key) == "str":
        quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" and text.count(text[0]) == 2
        return text[1:-1] if quoted else text
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return value if isinstance(value, bool | int | float | str) else text


def _check_value(spec: dataclasses.Field[Any], value: object) -> None:
    limits = spec.metadata
    kind = str(spec.type)
    good = {
        "bool": isinstance(value, bool),
        "int": isinstance(value, int) and not isinstance(value, bool),
        "float": isinstance(value, int | float) and not isinstance(value, bool),
        "str": isinstance(value, str),
    }[kind]
    if not good:
        raise SettingError(spec.name, value, f"of type {kind}", f"it is the {limits['doc']}")
    if isinstance(value, str):
        if limits["choices"] and value not in limits["choices"]:
            near = difflib.get_close_matches(value, limits["choices"], n=1)
            raise SettingError(
                spec.name,
                value,
                f"one of {', '.join(limits['choices'])}",
                f"did you mean {near[0]}?" if near else f"it is the {limits['doc']}",
            )
    elif isinstance(value, int | float) and not (
        limits["above"] < value and limits["least"] <= value <= limits["most"]
    ):
        low = f"above {limits['above']:g}" if limits["above"] > -math.inf else f"at least {limits['least']:g}"
        high = f" and at most {limits['most']:g}" if limits["most"] < math.inf else ""
        raise SettingError(spec.name, value, low + high, f"it is the {limits['doc']}")


def _toml(value: Scalar) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return repr(value)


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path)) if path else path
