"""Weighted sums of replies in a fixed tree, whose bits depend on no worker, and the release of a sum.

The clients of a round, in their order, are the leaves of a binary tree, whose nodes of 2, 4, 8, ... clients begin at
multiples of their size. A process with the replies of consecutive clients adds up the nodes among them, two halves at a
time; the server adds the remaining nodes from the last one on. Sums are in float32 (float64 for float64 and whole
numbers), weighted by ``num-examples``.

====================== ===================================
case                   mean
====================== ===================================
one valid reply        that reply, to the bit
no valid reply         None
an invalid reply       not in the sum; the client is named
====================== ===================================

Under the unit "client" the sum is over bounded changes, and the server releases it with noise (``ClientRelease``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Message
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedProx, FedYogi, Strategy
from torch import Tensor

from fed_dpsat.client.unit import bounded_move
from fed_dpsat.flower.judge import Failure, Verdict, judge
from fed_dpsat.flower.wire import records
from fed_dpsat.params import Params
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.step.correlated.base import StreamError
from fed_dpsat.step.correlated.choose import factorization_of, participation_of
from fed_dpsat.step.correlated.mechanism import CorrelatedMechanism
from fed_dpsat.step.mechanism import GaussianMechanism
from fed_dpsat.step.noise import derive_generator
from fed_dpsat.step.secure_noise import system_generator

OF_THE_MEAN = (FedAvg, FedAvgM, FedAdagrad, FedAdam, FedYogi, FedProx)
"""Stock strategies that use only the weighted mean of the replies; a subclass may use more."""


SAME_FIT = 1e-6
"""Relative: other threads may fit other last digits."""


def only_mean(strategy: Strategy) -> bool:
    """Whether ``strategy`` uses only the mean of the replies by ``num-examples``: its ``only_mean`` declares it."""
    if type(strategy) in OF_THE_MEAN:
        keys = strategy.weighted_by_key, strategy.arrayrecord_key  # type: ignore[attr-defined]
        return keys == (records.NUM_EXAMPLES, records.ARRAYS)
    return bool(getattr(strategy, "only_mean", False))


@dataclass(kw_only=True)
class Part:
    """The sum of the replies of ``size`` clients, ``scale * total``; metrics of the valid ones, and failures.

    ``own``: no other object has the tensors, so ``Tree`` may write into them.
    """

    size: int = 1
    accepted: dict[int, Mapping[str, float]] = field(default_factory=dict)
    failed: dict[int, Failure] = field(default_factory=dict)
    total: Params | None = None
    scale: float = 1.0
    own: bool = False

    @property
    def weight(self) -> float:
        """The sum of weights."""
        return sum(metrics[records.NUM_EXAMPLES] for metrics in self.accepted.values())

    def mean(self) -> Params | None:
        """Weighted mean of the valid replies, in the types of the sum; None without one."""
        if self.total is None:
            return None
        if self.scale == self.weight:
            return self.total
        return {name: t / (self.weight / self.scale) for name, t in self.total.items()}

    def __getstate__(self) -> dict[str, Any]:
        arrays = None if self.total is None else {name: t.numpy() for name, t in self.total.items()}
        return {**self.__dict__, "total": arrays, "own": False}  # arrays need no copy to travel, tensors do

    def __setstate__(self, state: dict[str, Any]) -> None:
        arrays = state["total"]
        self.__dict__.update(state)
        self.total = None if arrays is None else {name: torch.from_numpy(a) for name, a in arrays.items()}


def part_of(
    client: int,
    reply: Message | None,
    verdict: Verdict | None,
    *,
    before: ArrayRecord | None = None,
    clip_norm: float | None = None,
) -> Part:
    """The reply of one client, or its failure; the arrays are read and not copied.

    With a ``clip_norm`` the part is the bounded move of the client from ``before``, with weight 1.
    """
    if reply is None or verdict is None or isinstance(verdict, Failure):
        return Part(failed={client: verdict} if isinstance(verdict, Failure) else {})
    arrays = records.arrays_in(reply.content, records.ARRAYS)
    assert arrays is not None  # or it would be a failure
    total = records.to_read(arrays)
    if clip_norm is not None and before is not None:
        move = bounded_move(total, records.to_read(before), clip_norm)
        return Part(accepted={client: verdict}, total=move, scale=1.0, own=True)
    return Part(accepted={client: verdict}, total=total, scale=verdict[records.NUM_EXAMPLES])


def judged_part(
    message: Message, reply: Message, client: int, *, release_counts: bool, clip_norm: float | None
) -> Part:
    """``part_of`` the ``reply`` of ``client`` to ``message``, after the judgement."""
    before = records.arrays_in(message.content, records.ARRAYS)
    verdict = judge(reply, message.content, client, release_counts=release_counts, clip_norm=clip_norm)
    return part_of(client, reply, verdict, before=before, clip_norm=clip_norm)


def stack_parts(params: Params, clients: Sequence[int], verdicts: Sequence[Verdict], start: int) -> list[Part]:
    """The parts of the replies ``params[K, ...]`` of ``clients`` from position ``start`` on: one node, if they are one.

    They are if all are valid, of one weight, and their number is a power of 2; the node has the bits of ``Tree``.
    """
    count = len(clients)
    accepted = {
        client: verdict for client, verdict in zip(clients, verdicts, strict=True) if isinstance(verdict, Mapping)
    }
    weights = {metrics[records.NUM_EXAMPLES] for metrics in accepted.values()}
    if len(accepted) < count or len(weights) > 1 or count & (count - 1) or start % count:
        return [
            Part(
                accepted={client: verdict},
                total={n: p[k] for n, p in params.items()},
                scale=verdict[records.NUM_EXAMPLES],
            )
            if isinstance(verdict, Mapping)
            else Part(failed={client: verdict})
            for k, (client, verdict) in enumerate(zip(clients, verdicts, strict=True))
        ]
    total = {}
    for name, p in params.items():
        halves = p.to(_accumulator(p)) if count > 1 else p
        while len(halves) > 1:
            halves = halves[::2] + halves[1::2]
        total[name] = halves[0]
    return [Part(size=count, accepted=accepted, total=total, scale=weights.pop(), own=count > 1)]


class Tree:
    """The nodes of the clients of a round from position ``start`` on, which are added in their order."""

    def __init__(self, start: int = 0) -> None:
        self.nodes: list[Part] = []
        self._end = start

    def add(self, part: Part) -> None:
        """Add the next client, or node; uses up the tensors that ``part`` owns."""
        self.nodes.append(part)
        self._end += part.size
        while self._halves_of_a_node():
            self._add_last_two()

    def total(self) -> Part:
        """The sum of all parts, which it uses up."""
        while len(self.nodes) > 1:
            self._add_last_two()
        return self.nodes.pop() if self.nodes else Part(size=0)

    def _halves_of_a_node(self) -> bool:
        sizes = [node.size for node in self.nodes[-2:]]
        return len(sizes) == 2 and sizes[0] == sizes[1] and self._end % sum(sizes) == 0

    def _add_last_two(self) -> None:
        last = self.nodes.pop()
        self.nodes[-1] = _sum(self.nodes[-1], last)


def merge(parts: Iterable[Part]) -> Part:
    """The sum of ``parts``, clients or nodes in their order; holds one node of each size in memory at a time."""
    tree = Tree()
    for part in parts:
        tree.add(part)
    return tree.total()


@dataclass(frozen=True, kw_only=True)
class ClientRelease:
    """The release of a round under the unit "client": the sum of bounded changes, noised by the server.

    ``mechanism`` has the bound C of one client, and divides by the EXPECTED size of a cohort, a constant.
    ``every_client`` is true if a round costs all clients and not only the drawn ones: each has a coin.

    ==================================== ================================================================
    case                                 release
    ==================================== ================================================================
    no client is drawn, or none replies  noise: the model would otherwise tell that no client was there
    fewer replies than drawn clients     their sum and the same noise, divided by the same constant
    a reply beyond the bound             the sum of the others, and the client is named
    a round of a resumed run             with correlated noise: seeded noise of all earlier rounds is drawn again
    a second attempt, correlated noise   ``StreamError``: noise of a step is released once
    ==================================== ================================================================

    Source: McMahan et al. 2018 (arXiv 1710.06963), with the estimator whose denominator is a constant. The proof is in
    ``docs/privacy.md``.
    """

    mechanism: GaussianMechanism
    every_client: bool
    seed: int
    noise_source: str

    @classmethod
    def of(cls, config: RunConfig, noise_multiplier: float) -> ClientRelease | None:
        """The release of ``config``; None for another unit."""
        if config.privacy_unit != "client":
            return None
        return cls(
            mechanism=_mechanism(config, noise_multiplier),
            every_client=config.client_sampling != "fixed",
            seed=config.seed,
            noise_source=config.noise_source,
        )

    def model(self, total: Part, before: ArrayRecord, *, round: int, attempt: int) -> ArrayRecord:
        """``before`` plus the private mean of the changes that ``total`` adds up, in the types of ``before``."""
        start = records.to_params(before)
        self._catch_up(sum(value.numel() for value in start.values()), round, attempt)
        moves = total.total or {name: torch.zeros_like(value, dtype=torch.float64) for name, value in start.items()}
        mean = self.mechanism.privatize(moves, self._generator(round, attempt))
        return records.to_arrays({name: (v.double() + mean[name]).to(v.dtype) for name, v in start.items()})

    @property
    def cannot_resume(self) -> str:
        """The reason why the noise of earlier rounds cannot come again; empty if it can."""
        if not isinstance(self.mechanism, CorrelatedMechanism) or self.noise_source == "seeded":
            return ""
        return (
            "noise_mechanism keeps secret noise of earlier rounds in memory alone, with noise_source='system'; a new "
            "run has a charge of its own"
        )

    def state_dict(self) -> dict[str, Tensor]:
        """The deviation of correlated noise in each round, which tells one fit from another; empty without it."""
        if not isinstance(self.mechanism, CorrelatedMechanism):
            return {}
        return {"noise_deviations": torch.from_numpy(self.mechanism.factorization.deviations())}

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raise ``StreamError`` if the run of ``state`` had another fit: its noise would not come again."""
        for name, here in self.state_dict().items():
            if name not in state or not torch.allclose(here, state[name], rtol=SAME_FIT):
                raise StreamError(
                    "the fit of noise_mechanism has other coefficients here than when the run began, and its earlier "
                    "noise would not come again; resume it with the numpy and scipy that it began with"
                )

    def _catch_up(self, size: int, round: int, attempt: int) -> None:
        """Bring correlated noise to ``round``, the next one that is released."""
        mechanism = self.mechanism
        if not isinstance(mechanism, CorrelatedMechanism):
            return
        if attempt or (self.cannot_resume and mechanism.state.taken != round - 1):
            raise StreamError(f"round {round}, attempt {attempt}: the noise of this step is not the next one")
        for earlier in range(mechanism.state.taken + 1, round):
            mechanism.skip(size, self._generator(earlier, 0))
        mechanism.state.check(round)

    def _generator(self, round: int, attempt: int) -> np.random.Generator:
        if self.noise_source == "system":
            return system_generator()
        return derive_generator(self.seed, purpose="noise", round=round, attempt=attempt)


def _mechanism(config: RunConfig, noise_multiplier: float) -> GaussianMechanism:
    sizes = {"clip_norm": config.clip_norm, "expected_batch_size": float(config.cohort_size)}
    if config.noise_mechanism == "independent" or not noise_multiplier:
        return GaussianMechanism(noise_multiplier=noise_multiplier, **sizes)
    return CorrelatedMechanism(
        noise_multiplier=noise_multiplier,
        **sizes,
        factorization=factorization_of(config),
        participation=participation_of(config),
    )


def _sum(a: Part, b: Part) -> Part:
    both = Part(size=a.size + b.size, accepted={**a.accepted, **b.accepted}, failed={**a.failed, **b.failed})
    if a.total is None or b.total is None:
        one = b if a.total is None else a
        both.total, both.scale, both.own = one.total, one.scale, one.own
    elif a.scale == b.scale:
        pair = (b.total, a.total) if b.own else (a.total, b.total)  # the choice of memory changes no bits
        both.total, both.scale, both.own = _added(*pair, own=a.own or b.own), a.scale, True
    else:
        weighted = {name: t.to(_accumulator(t)) * a.scale for name, t in a.total.items()}
        both.total, both.scale, both.own = _added(weighted, b.total, own=True, scale=b.scale), 1.0, True
    return both


def _added(tensors: Params, others: Params, *, own: bool, scale: float = 1.0) -> Params:
    """``tensors + scale * others``, in the memory of ``tensors`` if the caller has them as its ``own``."""
    total = {}
    for name, t in tensors.items():
        mine, other = t.to(_accumulator(t)), others[name].to(_accumulator(t))
        total[name] = torch.add(mine, other, alpha=scale, out=mine if own else None)
    return total


def _accumulator(t: Tensor) -> torch.dtype:
    return torch.float32 if t.is_floating_point() and t.dtype.itemsize <= 4 else torch.float64
