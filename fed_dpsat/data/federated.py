"""The data of a configuration: its data set, and the examples of each client."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from fed_dpsat import plugins
from fed_dpsat.data.dataset import Dataset, Examples, check_plain
from fed_dpsat.data.features import with_features
from fed_dpsat.data.parts import disjoint_parts
from fed_dpsat.data.validation import hold_out, hold_out_of_each
from fed_dpsat.errors import SettingError
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.step import generators
from fed_dpsat.step.noise import Purpose, derive_generator, derive_seed
from fed_dpsat.step.placement import CPU


@dataclass(frozen=True, kw_only=True)
class Federated:
    """A data set, the ``partitions`` of its training split by client, and the ``settings`` that factories can name.

    ``held`` are the examples of each client that are for evaluation and in no partition.
    """

    dataset: Dataset
    partitions: list[np.ndarray]
    held: list[np.ndarray]
    settings: dict[str, Any]

    @property
    def whole(self) -> list[np.ndarray]:
        """By client, all its examples: those of its partition and those that it holds out."""
        return [np.concatenate(both) for both in zip(self.partitions, self.held, strict=True)]

    @classmethod
    def build(
        cls, config: RunConfig, dataset: Dataset | None = None, partition: Sequence[Any] | None = None
    ) -> Federated:
        """Build from the names in ``config``; a given ``dataset`` or ``partition`` replaces its name.

        Without the validation examples. Raises ``SettingError``, ``PluginError`` or ``DataError``.
        """
        settings: dict[str, Any] = {**config.settings(), "total_steps": config.total_steps}
        settings["steps_per_round"] = config.steps_per_model
        if dataset is None:
            with seeded(config, "partition"):
                dataset = plugins.build("dataset", config.dataset, settings, config.dataset_args)
        check_plain(plugins.required("dataset", config.dataset, dataset))
        if config.features:
            shapes = {"input_shape": dataset.input_shape, "num_classes": dataset.num_classes, **dataset.of_texts}
            dataset = with_features(dataset, config, {**settings, **shapes})
        if config.validation_share:
            dataset = hold_out(dataset, config.validation_share, derive_seed(config.seed, purpose="validation"))
        if config.num_clients > len(dataset.train):
            raise SettingError(
                "num_clients",
                config.num_clients,
                f"at most {len(dataset.train)}, the examples of {dataset.name}",
                "lower it; a client needs at least one example",
            )
        settings |= {"input_shape": dataset.input_shape, "num_classes": dataset.num_classes}
        parts = _dealt(config, dataset.train, settings) if partition is None else partition
        partitions = disjoint_parts(
            parts, num_clients=config.num_clients, num_examples=len(dataset.train), partition=config.partition
        )
        partitions, held = hold_out_of_each(
            partitions, config.holdout_share, derive_generator(config.seed, purpose="holdout"), len(dataset.train)
        )
        return cls(dataset=dataset, partitions=partitions, held=held, settings=settings)


def _dealt(config: RunConfig, train: Examples, settings: dict[str, Any]) -> Any:
    """The examples of each client. Only a partition is given labels and columns, which are private, as copies."""
    classes = train.classes
    with seeded(config, "partition"):
        return plugins.build(
            "partition",
            config.partition,
            {
                **settings,
                "seed": derive_seed(config.seed, purpose="partition"),
                "labels": None if classes is None else classes.copy(),
                "columns": {name: values.copy() for name, values in train.columns.items()},
                "num_examples": len(train),
            },
            config.partition_args,
        )


@contextmanager
def seeded(config: RunConfig, purpose: Purpose) -> Iterator[None]:
    """Seed all generators for a factory, and restore them afterwards."""
    with generators.kept(CPU):
        generators.seed(CPU, derive_seed(config.seed, purpose=purpose))
        yield
