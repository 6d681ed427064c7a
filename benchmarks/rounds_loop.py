"""The bare PyTorch loop: only the arithmetic of a federated round, without records, ledger, checks or files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from benchmarks.turns import Turn
from fed_dpsat.client.build import Experiment
from fed_dpsat.params import Params, trainable
from fed_dpsat.run.process import tune_allocator
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.step.draws import Draws, thinning
from fed_dpsat.step.gradients.per_example import clipped_gradient_sum
from fed_dpsat.step.loop import Streams
from fed_dpsat.step.mechanism import GaussianMechanism
from fed_dpsat.step.noise import derive_generator
from fed_dpsat.step.sampling import PoissonSampler


def loop(config: RunConfig, turn: Turn) -> Params:
    """The model after ``num_rounds`` rounds of ``config``, by the same draws as ``simulate``.

    Under the unit "client", local training is not private: changes are clipped, and noised once per round.

    Not private: ``backward`` and ``torch.optim.SGD``, channels last, which is the faster layout. Private:
    ``clipped_gradient_sum``, noise, the same step. Dropout draws as it does there, example by example.
    """
    tune_allocator()
    experiment = Experiment.build(config)
    central = config.privacy_unit == "client"
    local = config.private and not central
    train_client = _private_client if local else _plain_client
    if not local:
        experiment.loss_fn.module.to(memory_format=torch.channels_last)
    model = trainable(experiment.loss_fn.module)
    turn()
    for round in range(1, config.num_rounds + 1):
        total: Params = {}
        for client in range(config.num_clients):
            trained = train_client(experiment, model, client, round)
            if central:
                trained = _clipped(trained, model, config.clip_norm)
            total = {name: total[name].add_(p) for name, p in trained.items()} if total else trained
        model = _noised(model, total, config, round) if central else _mean(total, config)
        turn()
    return model


def _mean(total: Params, config: RunConfig) -> Params:
    return {name: p / config.num_clients for name, p in total.items()}


def _clipped(trained: Params, model: Params, clip_norm: float) -> Params:
    change = {name: p.sub_(model[name]) for name, p in trained.items()}
    norm = float(torch.nn.utils.get_total_norm(list(change.values())))
    return {name: c.mul_(min(1.0, clip_norm / norm)) for name, c in change.items()}


def _noised(model: Params, total: Params, config: RunConfig, round: int) -> Params:
    mechanism = GaussianMechanism(
        noise_multiplier=config.noise_multiplier,
        clip_norm=config.clip_norm,
        expected_batch_size=float(config.num_clients),
    )
    private = mechanism.privatize(total, derive_generator(config.seed, purpose="noise", round=round))
    return {name: p + private[name] for name, p in model.items()}


class SameDropout(TorchFunctionMode):
    """Dropout with the numbers of ``draws``: the bare loop has to compute what ours computes."""

    def __init__(self, draws: Draws) -> None:
        super().__init__()
        self.draws, self.calls = draws, 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """``func`` of the arguments; a dropout by a mask."""
        kwargs = kwargs or {}
        if func is not functional.dropout or not kwargs.get("training", args[2:3] != (False,)):
            return func(*args, **kwargs)
        x, p = args[0], kwargs.get("p", args[1] if len(args) > 1 else 0.5)
        words, self.calls = self.draws.words(self.calls, x[0].numel()), self.calls + 1
        return x * torch.from_numpy(thinning(words, p)).view_as(x)


def _plain_client(experiment: Experiment, model: Params, client: int, round: int) -> Params:
    module, data, config = experiment.loss_fn.module, experiment.dataset.train, experiment.config
    module.load_state_dict(model)
    optimizer = torch.optim.SGD(module.parameters(), lr=config.lr)
    indices, sampler, streams = _draws(experiment, client, round)
    for step, batch in enumerate(sampler.batches(config.local_steps, streams.generator("sampling"))):
        inputs, targets = data.batch(indices[batch])
        inputs = inputs.contiguous(memory_format=torch.channels_last)
        optimizer.zero_grad()
        with SameDropout(streams.draws(step, batch)):
            losses = functional.cross_entropy(module(inputs), targets, reduction="sum")
        torch.autograd.backward(losses / sampler.expected_batch_size)
        optimizer.step()
    return trainable(module)


def _private_client(experiment: Experiment, model: Params, client: int, round: int) -> Params:
    data, config = experiment.dataset.train, experiment.config
    params = {name: p.clone() for name, p in model.items()}
    indices, sampler, streams = _draws(experiment, client, round)
    mechanism = GaussianMechanism(
        noise_multiplier=config.noise_multiplier,
        clip_norm=config.clip_norm,
        expected_batch_size=sampler.expected_batch_size,
    )
    noise = streams.generator("noise")
    for step, batch in enumerate(sampler.batches(config.local_steps, streams.generator("sampling"))):
        examples, draws = data.batch(indices[batch]), streams.draws(step, batch)
        clipped_sum, _ = clipped_gradient_sum(
            experiment.loss_fn,
            params,
            examples,
            experiment.clipping,
            physical_batch_size=config.physical_batch_size,
            draws=draws,
        )
        for name, gradient in mechanism.privatize(clipped_sum, noise).items():
            params[name].sub_(gradient, alpha=config.lr)
    return params


def _draws(experiment: Experiment, client: int, round: int) -> tuple[torch.Tensor, PoissonSampler, Streams]:
    """The examples of a client, its sampler and its generators."""
    indices = torch.from_numpy(np.asarray(experiment.partitions[client]))
    streams = Streams(seed=experiment.config.seed, client=client, round=round)
    sampler = PoissonSampler(num_examples=len(indices), sample_rate=experiment.config.sample_rate)
    return indices, sampler, streams
