"""The limits that the owner of a device sets, in a TOML file on the device; a server can request less, never more.

A policy is as flat as a ``RunConfig`` and uses its names; the bound of a setting is its name with ``largest_`` or
``least_`` before it. This module checks each value from a server before the device reads data or loads a name.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from fed_dpsat.accounting.event import DISTRIBUTIONS
from fed_dpsat.client.assignment import Assignment
from fed_dpsat.data.decode import MODES
from fed_dpsat.device.journal import Refusal
from fed_dpsat.errors import InputError, SettingError
from fed_dpsat.run.logs import LOG_FORMATS
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.settings.data import BYTES
from fed_dpsat.settings.paths import in_folder, of_plugin
from fed_dpsat.step.optimizers.chain import split_chain

SANE_NOISE = 1e6
"""Above this noise, float32 cannot resolve a gradient."""
SANE_NUMBER = 2**31
ARGUMENTS = ("features_args", "model_args", "task_args", "optimizer_args", "clipping_args")
"""Settings whose text must be in the lists of the policy."""
LISTS = (
    *(
        "features",
        "models",
        "tasks",
        "adapters",
        "optimizers",
        "clippings",
        "noise_distributions",
        "strategies",
        "strategy_args",
    ),
    *ARGUMENTS,
)
SOURCES = {
    "images": ("folder", "parquet", "images", "function"),
    "table": ("csv", "jsonl", "parquet", "function"),
    "text": ("csv", "jsonl", "parquet", "folder", "function"),
}
"""By the content of the data, the values of ``data_source``; ``images`` is an older name of ``folder``."""
EXACT_ENGINES = ("auto", "planned", "vmap")
"""Engines of this project; an engine of another library is checked only on made-up examples."""
DEFAULT_OPTIMIZERS = ("dp-sgd", "dp-sat", "dp-sat-momentum")


class PolicyError(InputError):
    """An invalid policy file; the text names the key."""


def _key(doc: str, default: Any = dataclasses.MISSING) -> Any:
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The policy of one device. Raises ``PolicyError`` for a value outside its bounds."""

    folder: str = _key("folder of ledger, journal and log; on a disk that honours fsync")
    client: int = _key("number of this device in the federation")

    server: str = _key("address of the SuperLink, host:port; `fed-dpsat device run` connects to no other server", "")
    root_certificates: str = _key("file of the authority that must have signed the certificate of the server", "")
    private_key: str = _key("file of the private key of this device; the server has registered the public key", "")
    runs: tuple[int, ...] = _key("run ids that the device serves; an empty list means any run", ())

    dataset: str = _key("name that a run must give as its dataset: the permitted use of this data")
    content: str = _key("what the data are: images, table or text", "images")
    data_source: str = _key("folder (of texts, or of images: one per class), csv, jsonl, parquet, or function")
    data_path: str = _key("file or folder of the data, or module:function that returns Examples or a Dataset")
    dataset_args: str = _key("arguments of a table or of texts that no key fills: delimiter = ';'", "")
    class_names: tuple[str, ...] = _key("all classes of the federation in order, also classes without examples", ())
    image_size: tuple[int, ...] = _key("pixels of both sides of an image, 64, or height and width, [48, 64]", ())
    channels: int = _key("1 for grey images, 3 for colour", 3)
    fit: bool = _key("whether images of another size, or grey or colour otherwise, are converted, not refused", False)
    shape: tuple[int, ...] = _key("older form of channels and image_size: [channels, height, width]", ())
    mean: tuple[float, ...] = _key("per channel, of pixels scaled to 0..1; a public constant", ())
    std: tuple[float, ...] = _key("per channel, of pixels scaled to 0..1; a public constant", ())
    image_column: str = _key("older name of input_columns, of Parquet files with images", "image")
    input_columns: tuple[str, ...] = _key("columns that a model sees; empty is all declared ones, or text or image", ())
    label_column: str = _key("column of the labels; several by commas for several labels", "label")
    columns_file: str = _key("TOML file that declares the columns of a table, relative to this file", "")
    tokenizer: str = _key(
        "tokenizer of texts: bytes, a folder of transformers, or tokenizer.json, on the device", BYTES
    )
    tokenizer_sha256: str = _key("SHA-256 of the files of the tokenizer; without the right one it is not used", "")
    max_length: int = _key("largest number of tokens of a text; the rest is cut off", 256)

    privacy_unit: str = _key("what a run must protect: example, or user (a person of user_column)", "example")
    user_column: str = _key("column that says whose an example is, for privacy_unit = 'user'", "")
    largest_user_examples: int = _key("largest number of a person's examples in a step, held in memory together", 64)
    largest_epsilon: float = _key("budget for all releases of the device, over all runs, at largest_delta")
    largest_delta: float = _key("delta of the budget, and the largest delta of a run")
    least_noise_multiplier: float = _key("smallest noise on the sum, in units of clip_norm")
    noise_distributions: tuple[str, ...] = _key("permitted distributions of noise: gaussian, laplace", ("gaussian",))
    largest_clip_norm: float = _key("largest norm of one example's gradient", 10.0)
    largest_local_steps: int = _key("largest number of private steps in one round", 100)
    least_sample_rate: float = _key("smallest probability of an example to be in a batch", 1e-6)
    largest_sample_rate: float = _key("largest probability of an example to be in a batch", 1.0)
    features: tuple[str, ...] = _key("permitted extractors of features beside none at all, as the run names them", ())
    features_args: tuple[str, ...] = _key("permitted features_args, as written; an empty list permits none", ())
    models: tuple[str, ...] = _key("models that a run may train, as the run names them")
    model_args: tuple[str, ...] = _key("permitted model_args, as written; an empty list permits none", ())
    tasks: tuple[str, ...] = _key("tasks that a run may train for, as the run names them", ("classification",))
    task_args: tuple[str, ...] = _key("permitted task_args, as written; an empty list permits none", ())
    adapters: tuple[str, ...] = _key("permitted adapters beside none at all: lora, ffa-lora", ())
    start_from: str = _key("weights of frozen layers: a file on the device, relative to this file", "")
    optimizers: tuple[str, ...] = _key("permitted optimizers, including base optimizers", DEFAULT_OPTIMIZERS)
    optimizer_args: tuple[str, ...] = _key("permitted optimizer_args, as written; an empty list permits none", ())
    clippings: tuple[str, ...] = _key("permitted clipping rules", ("flat",))
    clipping_args: tuple[str, ...] = _key("permitted clipping_args, as written; an empty list permits none", ())
    strategies: tuple[str, ...] = _key(
        "strategies that may bring a client's half, code between the private steps; an empty list permits none", ()
    )
    strategy_args: tuple[str, ...] = _key("permitted strategy_args, as written; an empty list permits none", ())
    largest_parameters: int = _key("largest number of trained parameters", 50_000_000)
    largest_augmentations: int = _key("largest number of views of an image, held in memory together", 16)
    largest_physical_batch_size: int = _key("largest number of per-example gradients in memory", 1024)
    release_counts: bool = _key("whether a run may count examples without a finite gradient; exact, not private", False)
    threads: int = _key("number of intra-op threads", 1)

    metrics_port: int = _key("port of this machine with Prometheus metrics, none made of examples; 0 serves none", 0)
    log_format: str = _key("form of log and standard error: text, or json, an object per line", "text")

    def __post_init__(self) -> None:
        def check(name: str, good: bool, bound: str, remedy: str) -> None:
            if not good:
                raise PolicyError(str(SettingError(name, getattr(self, name), bound, remedy)))

        positive = "above 0 and finite"
        check("client", self.client >= 0, "at least 0", "number devices from 0")
        check("largest_epsilon", 0 < self.largest_epsilon < math.inf, positive, "inf is not a budget")
        check("largest_delta", 0 < self.largest_delta < 1, "in (0, 1)", "below 1 / examples of the device is usual")
        noise = self.least_noise_multiplier
        check("least_noise_multiplier", 0 < noise <= SANE_NOISE, f"in (0, {SANE_NOISE:g}]", "without noise no privacy")
        distributions = DISTRIBUTIONS["example"]
        known = bool(self.noise_distributions) and set(self.noise_distributions) <= set(distributions)
        check("noise_distributions", known, f"a list of {', '.join(distributions)}", "name those that are permitted")
        check("largest_clip_norm", 0 < self.largest_clip_norm < math.inf, positive, "0.1 to 10 is usual")
        check("largest_local_steps", self.largest_local_steps >= 1, "at least 1", "100 is plenty")
        check("largest_sample_rate", 0 < self.largest_sample_rate <= 1, "in (0, 1]", "1 is no sampling")
        low = 0 < self.least_sample_rate <= self.largest_sample_rate
        check("least_sample_rate", low, "in (0, largest_sample_rate]", "lower it")
        check("content", self.content in SOURCES, f"one of {', '.join(SOURCES)}", "say what the data are")
        sources = SOURCES[self.content]
        of = f"one of {', '.join(sources)} for content={self.content!r}"
        check("data_source", self.data_source in sources, of, "choose one, or another content")
        self._check_images(check)
        check("max_length", self.max_length >= 1, "at least 1", "256 is the default")
        check("tasks", bool(self.tasks), "a list with a name", "classification is the default")
        check("models", bool(self.models), "a list with a name", "list the networks that this device trains")
        check("largest_parameters", self.largest_parameters >= 1, "at least 1", "50000000 is the default")
        check("privacy_unit", self.privacy_unit in DISTRIBUTIONS, "example or user", "example is the default")
        check("user_column", bool(self.user_column) == (self.privacy_unit == "user"), *_PERSONS)
        check("largest_user_examples", self.largest_user_examples >= 1, "at least 1", "64 is the default")
        check("largest_augmentations", self.largest_augmentations >= 0, "at least 0", "0 allows no views")
        check("largest_physical_batch_size", self.largest_physical_batch_size >= 1, "at least 1", "128 suits most CPUs")
        check("metrics_port", 0 <= self.metrics_port < 2**16, "in [0, 65535]", "9464 is usual, 0 serves none")
        check("log_format", self.log_format in LOG_FORMATS, f"one of {', '.join(LOG_FORMATS)}", "text is the default")
        check("threads", 1 <= self.threads <= 1024, "in [1, 1024]", "at most the cores of the device")

    def _check_images(self, check: Callable[[str, bool, str, str], None]) -> None:
        channels = self.shape[0] if self.shape else self.channels
        if self.content == "images" and self.data_source != "function":
            once = not (self.shape and self.image_size)
            check("shape", once, "needed beside image_size", "leave it out: channels says whether images are grey")
            sizes, bound = self.image_size or self.shape[1:], "the pixels of both sides, or height and width"
            check("image_size", len(sizes) == 2 and min(sizes) > 0, bound, "write image_size = 64, or [48, 64]")
            name = "shape" if self.shape else "channels"
            check(name, channels in MODES, "of 1 or 3 channels", "1 is grey, 3 is colour")
            for name in ("mean", "std"):
                fits = len(getattr(self, name)) in (0, channels)
                check(name, fits, f"a list of {channels} numbers", "write one for each channel")
        check("mean", all(map(math.isfinite, self.mean)), "a list of finite numbers", "0.5 is usual")
        check("std", all(0 < one < math.inf for one in self.std), "a list of numbers above 0", "0.25 is usual")

    @property
    def cache(self) -> str:
        """The folder of decoded data and of features."""
        return str(Path(self.folder) / "cache")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of an image."""
        channels, height, width = self.shape or (self.channels, *self.image_size)
        return channels, height, width

    @classmethod
    def load(cls, path: Path) -> Policy:
        """From a TOML file; relative paths are relative to it. Raises ``PolicyError``."""
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise PolicyError(f"policy {path}: {error}") from None
        try:
            policy = cls(**_typed(cls, values))
        except PolicyError as error:
            raise PolicyError(f"policy {path}: {error}") from None
        return dataclasses.replace(
            policy,
            folder=_beside(path, policy.folder),
            root_certificates=_beside(path, policy.root_certificates),
            private_key=_beside(path, policy.private_key),
            start_from=_beside(path, policy.start_from),
            columns_file=_beside(path, policy.columns_file),
            tokenizer=BYTES if policy.tokenizer == BYTES else _beside(path, policy.tokenizer),
            data_path=of_plugin(policy.data_path, in_folder(path.parent))
            if policy.data_source == "function"
            else _beside(path, policy.data_path),
        )

    def admit(self, run: int, settings: Mapping[str, Any]) -> RunConfig:
        """The settings of the run for this device, without the paths and the cohort of the server.

        The seed of the server stays, only for public draws: initial weights, and directions of an optimizer, which
        sees no example. Batches, noise and random numbers inside a model come from the operating system of the device.

        Raises ``Refusal`` for an unknown setting, a wrong value, or a value that the policy forbids. Loads no name.
        """
        if self.runs and run not in self.runs:
            raise Refusal(f"run {run} is not one of the runs that this device serves; its owner can add it to runs")
        try:
            config = RunConfig.from_mapping(settings)
            steps = config.steps_per_round
        except OverflowError:
            raise Refusal(f"local_epochs={config.local_epochs} gives too many local_steps; lower it") from None
        except (InputError, TypeError) as error:
            raise Refusal(str(error)) from None
        if config.noise_source != "system":
            raise Refusal(
                f"noise_source={config.noise_source!r} is not 'system'; a device draws its noise only from the "
                "operating system: set noise_source=system"
            )
        if not config.private:
            raise Refusal("private=False is not allowed on this device; set private=true and add noise")
        if config.release_counts and not self.release_counts:
            raise Refusal("release_counts=True is not allowed on this device; set release_counts=false")
        if config.privacy_unit == "client":
            raise Refusal(
                f"privacy_unit={config.privacy_unit!r} leaves the noise to the server, which a device does not "
                f"trust; set privacy_unit={self.privacy_unit}"
            )
        self._listed("privacy_unit", config.privacy_unit, (self.privacy_unit,))
        if config.secure_aggregation:
            raise Refusal("secure_aggregation=True is not possible on a device with a policy yet; set it to false")
        self._listed("dataset", config.dataset, (self.dataset,))
        self._listed("model", config.model, self.models)
        self._listed("task", config.task, self.tasks)
        self._listed("optimizer", config.optimizer, self.optimizers)
        for name in split_chain(config.base_optimizer):
            self._listed("base_optimizer", name, self.optimizers)
        self._listed("clipping", config.clipping, self.clippings)
        self._listed("noise_distribution", config.noise_distribution, self.noise_distributions)
        ours = [("adapter", self.adapters), ("features", self.features)]
        for name, allowed in [*ours, *((name, getattr(self, name)) for name in ARGUMENTS)]:
            if given := getattr(config, name):
                self._listed(name, given, allowed or ("none",))
        if config.local_models:
            self._half(config)
        self._listed("engine", config.engine, EXACT_ENGINES)
        self._bounded("clip_norm", config.clip_norm, 0, self.largest_clip_norm)
        self._bounded("delta", config.delta, 0, self.largest_delta)
        self._bounded("local_steps", steps, 1, self.largest_local_steps)
        self._bounded("num_rounds", config.num_rounds, 1, SANE_NUMBER)
        self._bounded("user_examples", config.user_examples, 1, self.largest_user_examples)
        self._bounded("augmentations", config.augmentations, 0, self.largest_augmentations)
        rows = min(config.physical_batch_size, self.largest_physical_batch_size)
        own = {
            **_LOCAL,
            "cache_dir": self.cache,
            "user_column": self.user_column,
            "physical_batch_size": rows,
            "threads_per_client": self.threads,
            **self._start(config),
        }
        try:
            return dataclasses.replace(config, **own)
        except SettingError as error:
            raise Refusal(str(error)) from None

    def _half(self, config: RunConfig) -> None:
        """A strategy without a client's half is code of the server alone, which a device neither loads nor lists."""
        if config.strategy not in self.strategies:
            raise Refusal(
                f"strategy={config.strategy!r} brings a client's half (local_models={config.local_models}), and the "
                f"policy of this device allows {', '.join(self.strategies) or 'none'}; choose another one, or ask its "
                "owner to add it to strategies"
            )
        if config.strategy_args:
            self._listed("strategy_args", config.strategy_args, self.strategy_args or ("none",))

    def _start(self, config: RunConfig) -> dict[str, Any]:
        """Weights of frozen layers come from a file of the device; trained weights come in each message."""
        if not config.start_from or (config.train_layers == "all" and not config.adapter):
            return {"start_from": "", "start_head": "loaded"}
        if not self.start_from:
            name = "adapter" if config.adapter else "train_layers"
            remedy = "leave it empty" if config.adapter else "set train_layers=all"
            raise Refusal(
                f"{name}={getattr(config, name)!r} needs the weights of frozen layers, and the policy of this device "
                f"has no start_from; {remedy}"
            )
        return {"start_from": self.start_from}

    def admit_assignment(self, record: Mapping[str, Any], config: RunConfig) -> Assignment:
        """The assignment in a message of a run; raises ``Refusal`` for a missing key, a wrong type or value."""
        numbers = {"round": int, "attempt": int, "noise_multiplier": float, "sample_rate": float, "steps": int}
        kinds: dict[str, type] = {**numbers, "kind": str}
        if record.keys() != kinds.keys():
            raise Refusal(
                f"the assignment has keys {sorted(map(str, record))[:10]}, not {sorted(kinds)}; send exactly these"
            )
        for name, value in record.items():
            if type(value) is not kinds[name]:
                raise Refusal(f"{name} is a {type(value).__name__}, not a {kinds[name].__name__}; send one")
        self._bounded("round", record["round"], 1, SANE_NUMBER)
        self._bounded("attempt", record["attempt"], 0, SANE_NUMBER)
        self._bounded("noise_multiplier", record["noise_multiplier"], self.least_noise_multiplier, SANE_NOISE)
        self._bounded("sample_rate", record["sample_rate"], self.least_sample_rate, self.largest_sample_rate)
        self._bounded("steps", record["steps"], 1, self.largest_local_steps)
        try:
            assignment = Assignment.from_dict(record)
        except ValueError as error:  # also for an event of the unit "client"
            raise Refusal(str(error)) from None
        own_kind = DISTRIBUTIONS[config.privacy_unit][config.noise_distribution]
        self._listed("kind", assignment.event.kind, (own_kind,))
        return assignment

    def _listed(self, name: str, value: str, allowed: tuple[str, ...]) -> None:
        if value not in allowed:
            raise Refusal(f"{name}={value!r} is not allowed on this device; choose one of {', '.join(allowed)}")

    def _bounded(self, name: str, value: float, least: float, largest: float) -> None:
        if not least <= value <= largest:
            raise Refusal(
                f"{name}={value!r} is not in [{least:g}, {largest:g}], the range of this device; choose a value in it"
            )


_PERSONS = ("named with privacy_unit = 'user', and empty without", "name the column that says whose an example is")

_LOCAL: dict[str, Any] = {
    "data_source": "embedded",
    "data_path": "",
    "test_path": "",
    "test_share": 0.0,
    "input_columns": "",
    "label_column": "",
    "class_names": "",
    "columns_file": "",
    "tokenizer": BYTES,
    "validation_share": 0.0,
    "client_table": "",
    "statistics_from": "",
    "evaluate": "server",
    "holdout_share": 0.0,
    "evaluation_budget": 0.0,
    "out": "",
    "resume": False,
    "num_clients": 1,
    "dataset_args": "",
    "partition": "fed_dpsat.device.data:whole",
    "partition_by": "",
    "partition_args": "",
    "clients_per_round": 0,
    "max_rounds_per_client": 0,
    "min_clients": 1,
    "workers": 0,
    "gpus_per_worker": 0.0,
    "device": "cpu",
    "kernels": "auto",
}
"""Values on a device for settings that concern only the server; a device never opens a path of the server."""


def _typed(cls: type[Policy], values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with lists as tuples; ``PolicyError`` for an unknown, missing or mistyped key."""
    hints = get_type_hints(cls)
    for name in values:
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=1)
            raise PolicyError(f"{name} is not a key of a policy" + (f"; did you mean {near[0]}?" if near else ""))
    for spec in dataclasses.fields(cls):
        if spec.default is dataclasses.MISSING and spec.name not in values:
            raise PolicyError(f"{spec.name} is missing: {spec.metadata['doc']}")
    return {name: _value(name, value, hints[name]) for name, value in values.items()}


def _value(name: str, value: Any, kind: Any) -> Any:
    if get_origin(kind) is tuple:
        if name == "image_size" and type(value) is int:
            value = [value, value]
        if not isinstance(value, list):
            raise PolicyError(f"{name}={value!r} is not a list; write [...]")
        return tuple(_value(name, item, get_args(kind)[0]) for item in value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise PolicyError(f"{name}={value!r} is not of type {kind.__name__}")
    return value


def _beside(path: Path, name: str) -> str:
    return str((path.absolute().parent / Path(name).expanduser()).resolve()) if name else name
