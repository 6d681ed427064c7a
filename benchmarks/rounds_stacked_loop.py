"""The hand-written loop over stacks of clients: only the arithmetic of DP-SAT, and the draws of ``simulate``.

It has no records, ledger, checks or files. All parameters of a client are one row ``[d]``, so a stack of ``K`` clients
is ``[K, d]``.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.rounds_stacked_sums import clipped_sums, taps_last
from benchmarks.turns import Turn
from fed_dpsat.client.build import Experiment
from fed_dpsat.params import Params, cut, laid_end_to_end, trainable
from fed_dpsat.run.process import tune_allocator
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.step.noise import Purpose, derive_key

NORMALS = 1 << 16
"""Made at a time: they stay in the cache."""


def stacked_loop(config: RunConfig, turn: Turn) -> Params:
    """The model after ``num_rounds`` rounds of ``config``, ``stack_clients`` at a time.

    For clients with equal numbers of examples of one array, which are used as they are; for a ``Sequential`` of linear
    layers, 3x3 convolutions with padding 1, 2x2 average pools, and other layers without parameters; for flat clipping,
    Gaussian noise, and DP-SAT over DP-SGD without momentum.
    """
    tune_allocator()
    experiment = Experiment.build(config)
    module = experiment.loss_fn.module
    start = trainable(module)
    order, back = taps_last(module)
    model = laid_end_to_end(start)[order]
    data = experiment.dataset.train.of_classes("the loop")
    places = torch.from_numpy(np.stack(experiment.partitions))
    last = torch.zeros(config.num_clients, len(model))
    turn()
    for round in range(1, config.num_rounds + 1):
        total = torch.zeros_like(model)
        for first in range(0, config.num_clients, config.stack_clients):
            clients = range(first, min(first + config.stack_clients, config.num_clients))
            members = slice(clients.start, clients.stop)
            trained, last[members] = _train(
                config, module, order, model, last[members], data, places[members], clients, round
            )
            total += trained.sum(0)
        model = total / config.num_clients
        turn()
    return cut(model[back], start)


def _train(
    config: RunConfig,
    module: nn.Module,
    order: Tensor,
    model: Tensor,
    last: Tensor,
    data: tuple[Tensor, Tensor],
    places: Tensor,
    clients: range,
    round: int,
) -> tuple[Tensor, Tensor]:
    """Parameters ``[K, d]`` after a round of ``clients``, and their last private gradients, from those before it."""
    count, examples = places.shape
    steps, d = config.local_steps, len(model)
    coins = (_words(config.seed, "sampling", clients, round, steps * examples) >> np.uint64(11)) * 2.0**-53
    batches = _batches(coins.reshape(count, steps, examples) < config.sample_rate)
    words = _words(config.seed, "noise", clients, round, steps * math.ceil(d / 2)).reshape(count, steps, -1)
    params = model.expand(count, d).clone()
    for step, (chosen, real) in enumerate(batches):
        norms = torch.linalg.vector_norm(last, dim=1, keepdim=True)
        at = torch.addcmul(params, torch.where(norms > 0, config.rho / norms, 0), last)
        where = places.gather(1, chosen).flatten()
        inputs = data[0].index_select(0, where).unflatten(0, chosen.shape)
        last = clipped_sums(module, at, inputs, data[1].index_select(0, where), real, config.clip_norm)
        noise = _normals(words[:, step]).index_select(1, order)
        last.add_(noise, alpha=config.noise_multiplier * config.clip_norm)
        last.div_(config.sample_rate * examples)
        params.add_(last, alpha=-config.lr)
    return params, last


_philox = np.random.Philox(key=0)
_state = dict(_philox.state)


def _words(seed: int, purpose: Purpose, clients: range, round: int, count: int) -> np.ndarray:
    """The first ``count`` words of the stream of each client, uint64 ``[K, count]``: one generator, a key for each."""
    words = np.empty((len(clients), count), dtype=np.uint64)
    for row, client in zip(words, clients, strict=True):
        _state["state"]["key"] = np.frombuffer(derive_key(seed, purpose=purpose, client=client, round=round), np.uint64)
        _philox.state = _state
        row[:] = _philox.random_raw(count)
    return words


def _batches(coins: np.ndarray) -> list[tuple[Tensor, Tensor]]:
    """By step: which examples, ``[K, B]``, and which of these are there; the largest batch of the stack has ``B``."""
    order = torch.from_numpy(np.argsort(~coins, axis=2, kind="stable"))
    sizes = torch.from_numpy(coins.sum(2))
    found = []
    for step in range(coins.shape[1]):
        largest = int(sizes[:, step].max())
        found.append((order[:, step, :largest], torch.arange(largest) < sizes[:, step, None]))
    return found


def _normals(words: np.ndarray) -> Tensor:
    """``words[K, n] -> normals[K, 2n]``: row by row those of ``fed_dpsat.step.noise``, for ``n`` up to 2^15."""
    first, second = torch.from_numpy(words.view(np.int32)).unflatten(1, (2, -1)).unbind(1)
    normals = torch.empty(len(words), 2, words.shape[1])
    rows = max(1, NORMALS // normals[0].numel())
    for some, bits, turned in zip(normals.split(rows), first.split(rows), second.split(rows), strict=True):
        radius = (bits & 0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31).log_().mul_(-2).sqrt_()
        angle = turned.float().mul_(math.pi * 2.0**-31)
        torch.mul(angle.cos(), radius, out=some[:, 0])
        torch.mul(angle.sin_(), radius, out=some[:, 1])
    return normals.flatten(1)
