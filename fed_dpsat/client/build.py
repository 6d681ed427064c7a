"""The objects that a configuration names: data, partition, model, optimizer, clipping rule, attackers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fed_dpsat import plugins
from fed_dpsat.accounting.plans import read_table
from fed_dpsat.client.attackers import Attackers
from fed_dpsat.client.fingerprint import contents, fingerprint
from fed_dpsat.client.form import form_of
from fed_dpsat.client.given import copied, renamed
from fed_dpsat.client.half import HALF, ClientHalf, check_models, half_of, named_strategy
from fed_dpsat.client.personal import PERSONAL, deal_test, personal_names, without
from fed_dpsat.client.start import begin, check_one_input, check_passes
from fed_dpsat.client.task import build_task, check_optimizer
from fed_dpsat.client.train import CLIPPING, Training, with_stacks
from fed_dpsat.data.dataset import Dataset, check_plain
from fed_dpsat.data.federated import Federated, seeded
from fed_dpsat.data.made_up import made_up_examples
from fed_dpsat.data.names import split_names
from fed_dpsat.data.parts import disjoint_parts
from fed_dpsat.errors import SettingError, warn_once
from fed_dpsat.models.ties import check_memory, named_tensors
from fed_dpsat.params import Params, trainable
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.step.clipping import AdaptiveClipping, ClippingRule, check_clip_norm
from fed_dpsat.step.gradients import compiled
from fed_dpsat.step.gradients.per_example import ModelLoss
from fed_dpsat.step.noise import derive_seed
from fed_dpsat.step.optimizers.base import PrivateOptimizer, carried_names
from fed_dpsat.step.optimizers.chain import build_optimizer, described
from fed_dpsat.step.placement import decided, module_on, torch_device
from fed_dpsat.tasks.base import Task


@dataclass(frozen=True, kw_only=True)
class Experiment(Training):
    """The objects of a run. Clients and server build the same objects from the same configuration.

    ``budgets`` are the target epsilons by client. ``named`` is true if every object came from a name, so that another
    process can build it too. Raises ``DataError`` for ``partitions`` that do not divide ``dataset``
    (``disjoint_parts``), and for splits of a class other than ``Examples``, whose batches may mix examples.
    """

    budgets: Sequence[float]
    named: bool = True

    def __post_init__(self) -> None:
        config = self.config
        check_clip_norm(self.clipping.clip_norm)
        check_plain(self.dataset)
        parts = disjoint_parts(
            self.partitions,
            num_clients=config.num_clients,
            num_examples=len(self.dataset.train),
            partition=config.partition,
        )
        object.__setattr__(self, "partitions", parts)
        if config.privacy_unit == "user":
            self._check_persons()
        if self.views:
            one = self.dataset.train.inputs
            self.views.check(tuple(one.shape[1:]) if isinstance(one, Tensor) else None)

    def _check_persons(self) -> None:
        """Raise ``DataError`` for a person without a name; warn if clients share persons: epsilon is for one client."""
        assert self.person_of is not None
        if len(texts := self.dataset.train.texts) > 1:
            raise SettingError(
                "privacy_unit",
                "user",
                f"possible with several texts of an example ({', '.join(texts)}), whose lengths differ within a person",
                "make one text of them, or take example or client",
            )
        if sum(self.sizes) > len(np.unique(np.concatenate([self.person_of[part] for part in self.partitions]))):
            column = split_names(self.config.user_column)[0]
            warn_once(
                "privacy_unit=user: some persons have examples in several clients, and epsilon covers those of one; "
                f"set partition=natural and partition_by={column} to keep a person in one client"
            )
        if min(self.sizes) == 1:
            warn_once("privacy_unit=user: a client with one person alone learns nothing that noise does not hide")

    @classmethod
    def build(
        cls,
        config: RunConfig,
        *,
        dataset: Dataset | None = None,
        partition: Sequence[Any] | None = None,
        task: Task | None = None,
        model: nn.Module | None = None,
        optimizer: PrivateOptimizer | None = None,
        clipping: ClippingRule | None = None,
        half: ClientHalf | None = None,
    ) -> Experiment:
        """Build from the names in ``config``; a copy of a given object replaces its name.

        ``partition`` has the indices of the training examples of each client, without those for validation. ``half`` is
        that of a strategy that was given as an object; a named one is loaded if ``config.local_models`` says so.
        The model is moved to ``config.device``. Raises ``SettingError``, ``PluginError`` or ``DataError`` before any
        client is asked.
        """
        given: dict[str, Any] = {"dataset": dataset, "partition": partition, "task": task, "model": model}
        given |= {"optimizer": optimizer, "clipping": clipping}
        config = renamed(decided(config), **given)
        config = dataclasses.replace(config, kernels=compiled.decided(config.kernels))
        named = all(value is None for value in [*given.values(), half])
        half = copied("strategy", half) if half else half_of(named_strategy(config)) if config.local_models else None
        check_models(config, half)
        data = Federated.build(config, dataset, partition)
        dataset, partitions, held, settings = data.dataset, data.partitions, data.held, data.settings
        config = dataclasses.replace(config, features_sha256=dataset.features)
        task = build_task(config, dataset, settings, task)
        settings |= {"task": task.name, "num_classes": task.outputs, **dataset.of_texts}
        if model is None:
            check_one_input(config.model, dataset.train)
            with seeded(config, "model"):
                model = plugins.build("model", config.model, settings, config.model_args)
        else:
            check_memory(plugins.required("model", config.model, model))  # a copy would separate shared memory
            model = copied("model", model)
        with seeded(config, "adapter"):
            model, start = begin(plugins.required("model", config.model, model), config)
        if optimizer is None:
            optimizer = build_optimizer(config.optimizer, config.base_optimizer, settings, config.optimizer_args)
        else:
            optimizer = copied("optimizer", plugins.required("optimizer", config.optimizer, optimizer))
        check_optimizer(task, optimizer, described(config.optimizer, config.base_optimizer))
        if clipping is None:
            clipping = plugins.build("clipping", config.clipping, settings, config.clipping_args)
        else:
            clipping = copied("clipping", clipping)
        plugins.required("clipping", config.clipping, clipping)
        attackers = Attackers.of(config, settings)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        config = with_stacks(config, clipping, trained)
        module = module_on(model, torch_device(config.device))
        check_passes(module, dataset.train)
        return cls(
            config=config,
            dataset=attackers.poisoned(dataset, partitions) if attackers else dataset,
            partitions=partitions,
            held=held,
            loss_fn=ModelLoss(module, task.loss, precision=config.precision, kernels=config.kernels),
            task=task,
            optimizer=optimizer,
            clipping=clipping,
            budgets=[row.target_epsilon for row in read_table(config)],
            named=named,
            attackers=attackers,
            start=start,
            personal=personal_names(trainable(model), config.personal_layers, named_tensors(model)),
            half=half,
        )

    @property
    def unused_examples(self) -> int:
        """The number of training examples that no client holds."""
        return len(self.dataset.train) - sum(len(part) for part in (*self.partitions, *self.held))

    @functools.cached_property
    def contents(self) -> dict[str, str]:
        """Digests of partition, data, and the unsent part of the model: equal in every process of a run."""
        sent = without(dict(self.loss_fn.module.named_parameters()), self.personal).keys() & self.start.names
        return contents(self.dataset, self.partitions, self.loss_fn.module, sent, self.person_of)

    @property
    def fingerprint(self) -> str:
        """One digest of the ``contents``."""
        return fingerprint(self.contents)

    @property
    def same(self) -> dict[str, str]:
        """What a server says of its experiment: the fingerprint as "sha256", and the form of its data."""
        return {"sha256": self.fingerprint, **form_of(self.dataset)}

    def carried_state(self) -> set[str]:
        """Names of the state that a client keeps from one round to the next."""
        adaptive = isinstance(self.clipping, AdaptiveClipping)
        others = {CLIPPING: adaptive, PERSONAL: bool(self.personal), HALF: self.half is not None}
        return carried_names(self.optimizer) | {name for name, kept in others.items() if kept}

    def shared(self, round: int = 1) -> Params:
        """The initial values of the parameters that ``round`` sends and averages: all but the ``personal`` ones."""
        return without(self.trained(round), self.personal)

    def made_up_inputs(self, count: int) -> Tensor | dict[str, Tensor]:
        """``count`` made-up inputs of the model, as one batch on its device."""
        examples = made_up_examples(self.dataset.train, None, count, self.dataset.num_classes)
        return examples.batch(torch.arange(count), self.device)[0]

    @functools.cached_property
    def test_shares(self) -> list[np.ndarray]:
        """The share of each client of the public test split."""
        labels, public = self.dataset.train.classes, self.dataset.test.classes
        if labels is None or public is None:  # as if all were of one class
            labels, public = (np.zeros(len(split), np.int64) for split in (self.dataset.train, self.dataset.test))
        return deal_test(labels, public, self.partitions, derive_seed(self.config.seed, purpose="partition"))
