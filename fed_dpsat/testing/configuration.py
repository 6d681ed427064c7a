"""Checks of a configuration without training: the suites for all its plug-ins, and the trial of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fed_dpsat import plugins
from fed_dpsat.client.build import Experiment
from fed_dpsat.client.half import with_half
from fed_dpsat.data.dataset import Dataset
from fed_dpsat.data.made_up import made_up
from fed_dpsat.errors import InputError
from fed_dpsat.flower.federation import build_strategy
from fed_dpsat.flower.inner import StrategyStateError, capture_state
from fed_dpsat.flower.trial import try_federation
from fed_dpsat.models.norms import with_norm
from fed_dpsat.run.promise import delta_warning, unused_warning
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.step.correlated.choose import is_built_in, made
from fed_dpsat.step.correlated.sensitivity import Participation
from fed_dpsat.step.noise import derive_seed
from fed_dpsat.step.optimizers.chain import build_optimizer, described
from fed_dpsat.tasks.tokens import MaskedLM
from fed_dpsat.testing.clipping import check_clipping
from fed_dpsat.testing.conformance import ConformanceError
from fed_dpsat.testing.correlated import check_noise
from fed_dpsat.testing.dataset import check_dataset
from fed_dpsat.testing.model import check_model
from fed_dpsat.testing.optimizer import check_optimizer
from fed_dpsat.testing.partition import check_partition
from fed_dpsat.testing.strategy import check_strategy

ROWS = 16
"""Of which some are texts of one length."""


@dataclass(frozen=True, kw_only=True)
class Checked:
    """One part of a configuration: the number of passed ``checks``, the first ``problem``, and a ``note``."""

    part: str
    name: str
    checks: int = 0
    problem: str = ""
    note: str = ""


def check_configuration(config: RunConfig) -> Iterator[Checked]:
    """Check each part of ``config``, and at last the trial of all parts together.

    It writes only the cache of the data set. Raises ``InputError`` for a part that cannot be built.
    """
    experiment = Experiment.build(with_half(config))
    config = experiment.config
    data = experiment.dataset
    settings: dict[str, Any] = {
        **config.settings(),
        "total_steps": config.total_steps,
        "steps_per_round": config.steps_per_model,
        "input_shape": data.input_shape,
        "num_classes": experiment.task.outputs,
        **data.of_texts,
    }
    inputs, targets = _batch(data)
    of_run = config.settings()  # those of texts, such as a mask token, are what the data set gives to others
    yield _checked("dataset", config.dataset, lambda: check_dataset(lambda: _built("dataset", config, of_run)))
    if config.features:
        note = f"SHA-256 {config.features_sha256[:16]}"
        yield _checked("features", config.features, lambda: None, note)  # examples alone, when the data set was built
    yield _checked(
        "partition",
        config.partition,
        lambda: check_partition(
            lambda **given: _built("partition", config, {**settings, **given}),
            labels=data.train.classes,
            columns=data.train.columns,
            num_examples=len(data.train),
            num_clients=(config.num_clients,),
        ),
        note=unused_warning(experiment),
    )
    yield _checked(
        "model",
        config.model,
        lambda: (
            None  # it hides tokens by chance, also if it is evaluated: the trial below has its draws
            if isinstance(experiment.task, MaskedLM)
            else check_model(
                lambda: with_norm(
                    _built("model", config, {**settings, "seed": derive_seed(config.seed, purpose="model")}),
                    config.norm,
                )[0],
                inputs=inputs,
                targets=targets,
                task=experiment.task,
                engine=config.engine,
            )
        ),
    )
    yield _checked(
        "clipping",
        config.clipping,
        lambda: check_clipping(lambda clip_norm: _built("clipping", config, {**settings, "clip_norm": clip_norm})),
    )
    if not is_built_in(config.noise_mechanism):
        yield _checked("noise", config.noise_mechanism, lambda: check_noise(lambda steps: _own_noise(config, steps)))
    yield _checked(
        "optimizer",
        described(config.optimizer, config.base_optimizer),
        lambda: check_optimizer(
            lambda: build_optimizer(config.optimizer, config.base_optimizer, settings, config.optimizer_args)
        ),
    )
    yield _checked(
        "strategy",
        config.strategy,
        lambda: check_strategy(lambda: build_strategy(config)),
        note=_cannot_resume(config),
    )
    yield _checked("trial", "made-up examples", lambda: try_federation(experiment), note=delta_warning(experiment))


def _batch(data: Dataset) -> tuple[Any, Tensor]:
    """Made-up examples of the form of ``data`` in one batch, with their targets."""
    rows = made_up(data, 1, public=True, rows=ROWS).test
    return rows.batch(max(rows.alike(torch.arange(ROWS)), key=len))


def _built(kind: str, config: RunConfig, settings: dict[str, Any]) -> Any:
    return plugins.build(kind, getattr(config, kind), settings, getattr(config, f"{kind}_args"))


def _own_noise(config: RunConfig, steps: int) -> Any:
    once = Participation(num_steps=steps, most=1, min_separation=steps)
    return made(config.noise_mechanism, once, min(config.bands, steps), config.noise_buffers)


def _checked(part: str, name: str, check: Callable[[], list[str] | None], note: str = "") -> Checked:
    try:
        made = check()
    except (ConformanceError, InputError) as error:
        return Checked(part=part, name=name, problem=" ".join(str(error).split()), note=note)
    return Checked(part=part, name=name, checks=len(made or ["trial"]), note=note)


def _cannot_resume(config: RunConfig) -> str:
    try:
        capture_state(build_strategy(config))
    except StrategyStateError as error:
        return f"a run cannot resume: {error}"
    return ""
