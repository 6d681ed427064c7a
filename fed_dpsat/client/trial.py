"""A trial before any charge: copies of the objects of a run, on made-up examples of the shape and types of its data.

A model that no engine takes, a head with too few outputs, an optimizer that fails in its second step: without a trial,
each of these fails after clients were charged. So each run, and each client on a network or a device, first works
through a short run on made-up examples, and a failure there ends in one line.

======================= ================================================================================
part                    in the trial
======================= ================================================================================
inputs                  rows of the public test split; without one, random bytes, or random zeros and ones
labels                  made up, the largest class among them
examples of a client    ``ROWS``, each in each batch
local steps             2, or 3 for a larger odd number; all steps if the optimizer sends their sum
rounds                  2, if the run has them, so that clients use their kept state once
noise                   as much in the mean gradient as in the run, from separate streams
objects                 copies; the generators of torch, numpy and Python are restored
======================= ================================================================================
"""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fed_dpsat.accounting.plans import plan_of
from fed_dpsat.client.assignment import Assignment
from fed_dpsat.client.attackers import Attackers
from fed_dpsat.client.blame import Unfit, optimizer_remedy, told
from fed_dpsat.client.build import Experiment
from fed_dpsat.client.given import copied
from fed_dpsat.client.half import blank, received_by
from fed_dpsat.data.dataset import INPUTS, Dataset
from fed_dpsat.data.made_up import made_up
from fed_dpsat.data.names import split_names
from fed_dpsat.errors import ModelError
from fed_dpsat.params import Params, zeros_like
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.step import generators
from fed_dpsat.step.generators import seed, training_on
from fed_dpsat.step.gradients.loss import logits_of
from fed_dpsat.step.modes import in_mode
from fed_dpsat.step.noise import derive_seed
from fed_dpsat.step.optimizers.base import StepInfo, unknown_carried
from fed_dpsat.step.placement import moved
from fed_dpsat.step.query import first_point
from fed_dpsat.tasks.base import Task

ROWS = 4
APART = 1e-4
"""The largest relative change of an output by rounding, if the other examples of a batch change."""
PERSONS = (0, 0, 0, 1)
"""Whose the made-up examples of a client are, if persons are the unit."""
CARRIED_STEPS = 3
"""Each name in ``carries`` appears in the state within so many steps."""
FLOWER_LOGGER = "flwr"


def try_client(experiment: Experiment) -> None:
    """A client's rounds on made-up examples, without a server: model, loss, engine, clipping and optimizer.

    Raises ``TrialError`` for a failure.
    """
    with untouched(experiment.device), held_back_logs(), told(experiment):
        tried = rehearsal(experiment, 1, noise_multiplier=experiment.config.noise_multiplier or 1.0)
        check_outputs(tried)
        params, state = tried.shared(1), None
        for assignment in assignments(tried):
            params = {**tried.shared(assignment.round), **params}
            records = blank(received_by(tried.half, params))
            result = tried.client_round(0, assignment, params, state, records=records)
            check_result(result.params, params)
            params, state = result.params, result.state
        check_carried(tried)


def rehearsal(
    experiment: Experiment, clients: int, *, noise_multiplier: float, memo: dict[int, Any] | None = None
) -> Experiment:
    """``experiment`` of ``clients`` with ``ROWS`` made-up examples each, on copies of its objects.

    ``noise_multiplier`` is that of the run; the trial takes one with equal noise in the mean gradient, or in the mean
    of clients. ``memo`` is that of ``copy.deepcopy``, for copies that refer to the same objects.
    """
    config, memo = experiment.config, {} if memo is None else memo
    module = copied("model", experiment.loss_fn.module, memo)
    optimizer = copied("optimizer", experiment.optimizer, memo)
    attackers = experiment.attackers
    if attackers:
        attackers = Attackers(attack=copied("attack", attackers.attack, memo), clients=(0,))
    expected = config.sample_rate * min(experiment.sizes)
    size, of_run = {
        "example": (ROWS, expected),
        "user": (len(set(PERSONS)), expected),
        "client": (clients, config.cohort_size),
    }[config.privacy_unit]
    steps = config.steps_per_model
    stand_in = dataclasses.replace(
        config,
        num_clients=clients,
        clients_per_round=0,
        client_sampling="fixed",
        client_table="",
        statistics_from="",
        evaluate="server",
        holdout_share=0.0,
        evaluation_budget=0.0,
        max_rounds_per_client=0,
        min_separation=1,
        noise_mechanism="independent",
        noise_bands=0,
        noise_buffers=RunConfig.noise_buffers,
        min_clients=1,
        buffer_size=min(config.buffer_size, clients),
        secure_aggregation=config.secure_aggregation and clients > 1,
        sample_rate=1.0,
        local_epochs=0,
        local_steps=steps if experiment.subspace(1) is not None else min(steps, 2 + steps % 2),
        unfreeze_round=min(config.unfreeze_round, 2),
        budget_mode="calibrate",
        target_epsilon=0.0,
        noise_multiplier=noise_multiplier * size / of_run if config.private else 0.0,
        attack="",
        attackers=0.0,
        dropout_rate=0.0,
        client_timeout=0.0,
        workers=0,
        ray_address="",
        gpus_per_worker=0.0,
        seed=derive_seed(config.seed, purpose="trial"),
        out="",
        resume=False,
    )
    return dataclasses.replace(
        experiment,
        config=stand_in,
        dataset=_with_persons(
            config,
            made_up(experiment.dataset, clients * ROWS, public=not config.validation_share, rows=ROWS),
        ),
        partitions=np.split(np.arange(clients * ROWS), clients),
        held=(),
        loss_fn=dataclasses.replace(experiment.loss_fn, module=module),
        optimizer=optimizer,
        clipping=copied("clipping", experiment.clipping, memo),
        budgets=[0.0] * clients,
        named=False,
        attackers=attackers,
        half=copied("strategy", experiment.half, memo),
        watches={},
    )


def _with_persons(config: RunConfig, dataset: Dataset) -> Dataset:
    if config.privacy_unit != "user":
        return dataset
    name, train = split_names(config.user_column)[0], dataset.train
    numbers = np.tile(PERSONS, len(train) // ROWS) + np.repeat(np.arange(0, len(train), ROWS), ROWS)
    return dataclasses.replace(dataset, train=dataclasses.replace(train, columns={name: numbers}))


def assignments(tried: Experiment) -> list[Assignment]:
    """The assignments of a client of the trial, round by round."""
    plan = plan_of(tried.config)
    return [Assignment.of(plan, round=round) for round in range(1, min(tried.config.num_rounds, 2) + 1)]


def check_outputs(tried: Experiment) -> None:
    """Raise ``Unfit`` unless the model gives the outputs that the task takes, example by example, in training mode."""
    dataset, device, module, task = tried.dataset, tried.device, tried.loss_fn.module, tried.task
    params = moved({**tried.trained(1), **tried.trained(tried.config.num_rounds)}, device)
    for count in (ROWS, 1):
        inputs, targets = dataset.train.batch(torch.arange(count), device)
        with training_on(device), torch.no_grad():
            seed(device, tried.config.seed)
            outputs = tried.loss_fn.outputs(params, inputs)
        name = type(module).__name__
        try:
            logits = logits_of(outputs)
        except ModelError as error:
            remedy = "return a tensor of logits, or an object or a dict with the tensor as logits"
            raise Unfit("model", f"{name} gives {_described(outputs)}", remedy) from error
        if not task.fits(logits, count):
            given = ", ".join(f"{n} {list(t.shape)}" for n, t in named_leaves(inputs).items())
            narrow = logits.ndim > 1 and logits.shape[-1] < task.outputs and len(logits) == count
            remedy = f"make its last layer {task.outputs} wide" if narrow else "the batch first, also for one example"
            if logits.ndim == 1 and len(logits) == count:
                remedy = f"return {task.outputs} logits for each example, not a class or one number"
            seen = f"{name} gives {list(logits.shape)} for {given}, not {task.expected(count)}"
            raise Unfit("model", seen, remedy)
        if count == ROWS:
            _check_apart(tried, params)
        kept = _parts(task)
        losses = tried.loss_fn.criterion(outputs, targets)
        if not isinstance(losses, Tensor) or tuple(losses.shape) != (count,):
            found = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise Unfit("task", f"its loss of {count} examples is {found}", f"return losses [{count}]")
        if changed := [part for part, value in _parts(task).items() if kept.get(part) != value]:
            remedy = "keep nothing from call to call: the loss of an example depends on its own row alone"
            raise Unfit("task", f"its loss changes its {changed[0]!r}", remedy)


def _check_apart(tried: Experiment, params: Params) -> None:
    """Raise ``Unfit`` if, in evaluation mode, outputs of one example change with the other examples of its batch.

    A model that draws random numbers in that mode is not compared.
    """
    rows, module = torch.arange(ROWS), tried.loss_fn.module

    def first(indices: Tensor, seed_: int = 0) -> tuple[list[torch.Size], Tensor]:
        inputs, _ = tried.dataset.train.batch(indices, tried.device)
        with torch.no_grad(), training_on(tried.device), in_mode(module, training=False):
            seed(tried.device, seed_)
            row = logits_of(tried.loss_fn.outputs(params, inputs))[0]
            return [leaf.shape for leaf in named_leaves(inputs).values()], row

    shapes, alone = first(rows)
    if not torch.equal(alone, first(rows, 1)[1]):
        return
    for other in range(1, ROWS):  # another row in one place; texts keep their common length
        found, beside = first(torch.where(rows == other, 0, rows))
        away = float((alone - beside).abs().max()) if found == shapes else 0.0
        if away > APART * (1 + float(alone.abs().max())):
            remedy = (
                "a client trains each example alone, and sees nothing of the others: use no statistics over the batch, "
                "such as x.mean(0); fed_dpsat.testing.check_model finds more"
            )
            seen = f"{type(module).__name__} mixes examples: outputs of one change by {away:.3g} with the others"
            raise Unfit("model", seen, remedy)


def _described(outputs: object) -> str:
    """The type of ``outputs`` and the names of what it holds."""
    if outputs is None:
        return "None"
    held = list(outputs) if isinstance(outputs, Mapping) else list(getattr(outputs, "__dict__", ()))
    return f"a {type(outputs).__name__}" + (f" with {', '.join(map(str, held[:5]))}" if held else "")


def _parts(task: Task) -> dict[str, str]:
    return {name: repr(value) for name, value in vars(task).items()}


def named_leaves(inputs: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a batch by name; one without a name is called "inputs"."""
    return {INPUTS: inputs} if isinstance(inputs, Tensor) else dict(inputs)


def check_result(after: Params, before: Params) -> None:
    """Raise ``Unfit`` unless ``after`` has the names, in order, shapes and types of ``before`` and is finite."""
    wrong = "" if list(after) == list(before) else f"parameters {list(after)[:5]}, not {list(before)[:5]}"
    for name, p in before.items() if not wrong else ():
        if after[name].shape != p.shape or after[name].dtype != p.dtype:
            wrong = f"{name} as {after[name].dtype}{list(after[name].shape)}, not {p.dtype}{list(p.shape)}"
        elif not bool(after[name].isfinite().all()):
            wrong = f"NaN or inf in {name}"
    if wrong:
        raise Unfit("optimizer", f"its first steps give {wrong}", optimizer_remedy(wrong))


def check_carried(tried: Experiment) -> None:
    """Raise ``Unfit`` for a name in ``carries`` that neither ``init`` nor one of the first steps makes."""
    optimizer, params = tried.optimizer, moved(tried.trained(1), tried.device)
    state = optimizer.init(params)
    states = [state]
    for index in range(CARRIED_STEPS):
        info = StepInfo(index=index, noise_std=torch.tensor(0.0, dtype=torch.float64), round=1)
        gradient = zeros_like(first_point(optimizer.query_point(params, state, info)))
        params, state = optimizer.update(params, gradient, state, info)
        states.append(state)
    if unknown := unknown_carried(optimizer, states):
        raise Unfit("optimizer", f"it carries {unknown}", "correct the name in carries, or begin it in init")


@contextmanager
def untouched(device: torch.device) -> Iterator[None]:
    """Restore all generators that a plug-in may draw from, and the warnings filter."""
    with warnings.catch_warnings(), generators.kept(device):
        warnings.simplefilter("ignore")  # they appear in the run
        yield


@contextmanager
def held_back_logs() -> Iterator[None]:
    """Hold back the log of the library until the trial succeeds; after a failure, drop it."""
    ours, flower, kept = logging.getLogger("fed_dpsat"), logging.getLogger(FLOWER_LOGGER), list[logging.LogRecord]()

    def keep(record: logging.LogRecord) -> bool:
        kept.append(record)
        return False

    level = flower.level
    ours.addFilter(keep)
    flower.setLevel(logging.ERROR)
    try:
        yield
    finally:
        ours.removeFilter(keep)
        flower.setLevel(level)
    for record in kept:
        ours.handle(record)
