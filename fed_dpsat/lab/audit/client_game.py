"""The distinguishing game of the unit "client": the real release of the server, with and without one client.

The client moves the model by the whole bound C in every round that its coin selects; ``others`` do the same in an
orthogonal direction, with their own coins. The attacker sees all released models and no coin. Each repetition has its
own coins and noise.

With noise that is correlated over rounds, the client is in the rounds 1, 1 + min_separation, ... of a whole schedule.
The attacker computes the number of all releases that tells the two worlds best apart, for noise of their covariance:
it moves by at most 1 and has noise of the noise multiplier, like the number of one round otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from fed_dpsat.accounting.event import CLIENTS, PrivacyEvent
from fed_dpsat.flower.sums import ClientRelease, Part, merge
from fed_dpsat.flower.wire import records
from fed_dpsat.lab.audit.game import SIZE, AnyGame, GameResult, ledger_epsilon, result_of
from fed_dpsat.lab.audit.scores import Seen, Values
from fed_dpsat.step.correlated.measured import noise_matrix
from fed_dpsat.step.correlated.mechanism import CorrelatedMechanism


@dataclass(frozen=True, kw_only=True)
class ClientGame(AnyGame):
    """``rounds`` of ``release``; a ``sample_rate`` of 1 stands for public cohorts."""

    release: ClientRelease


def play_clients(game: ClientGame) -> GameResult:
    """Play both worlds; one half of the repetitions selects the attack, the other half measures it."""
    without, with_it = (_world(game, included) for included in (False, True))
    event = PrivacyEvent(noise_multiplier=game.noise_multiplier, sample_rate=game.sample_rate, steps=1, kind=CLIENTS)
    spent = ledger_epsilon([event] * game.rounds, game.delta)
    return result_of(game, without, with_it, steps=game.rounds, epsilon_ledger=spent)


def _world(game: ClientGame, included: bool) -> Seen:
    if isinstance(game.release.mechanism, CorrelatedMechanism):
        return _correlated_world(game, game.release.mechanism, included)
    release = replace(game.release, seed=2 * game.seed + included)
    bound, divisor = release.mechanism.clip_norm, release.mechanism.expected_batch_size
    u = torch.full((SIZE,), 1 / math.sqrt(SIZE), dtype=torch.float64)
    across = u * torch.tensor([1.0, -1.0]).repeat(SIZE // 2)
    before = records.to_arrays({"w": torch.zeros(SIZE, dtype=torch.float64)})
    coins = np.random.default_rng([game.seed, included]).random((game.repetitions, game.rounds, game.others + 1))
    drawn = coins < game.sample_rate
    drawn[:, :, -1] &= included
    seen = np.empty((game.repetitions, game.rounds, SIZE))
    for i, round in np.ndindex(game.repetitions, game.rounds):
        parts = [
            Part(
                accepted={client: {records.NUM_EXAMPLES: 1.0}},
                total={"w": bound * (u if client == game.others else across)},
            )
            for client in np.flatnonzero(drawn[i, round]).tolist()
        ]
        after = release.model(merge(parts), before, round=round + 1, attempt=i)
        seen[i, round] = records.to_params(after)["w"].numpy() * divisor / bound
    along: Values = seen @ u.numpy()
    return Seen(along=along, norms=np.square(seen).sum(2), moves=along)


def _correlated_world(game: ClientGame, mechanism: CorrelatedMechanism, included: bool) -> Seen:
    rounds, apart = mechanism.participation.num_steps, mechanism.participation.min_separation
    bound, divisor = mechanism.clip_norm, mechanism.expected_batch_size
    joins = np.arange(rounds) % apart == 0
    matrix = noise_matrix(mechanism.factorization.stream(), rounds)
    toward = np.linalg.solve(matrix @ matrix.T, joins)
    toward /= math.sqrt(float(toward @ joins)) * mechanism.sensitivity * bound
    before = records.to_arrays({"w": torch.zeros(SIZE, dtype=torch.float64)})
    u = torch.full((SIZE,), 1 / math.sqrt(SIZE), dtype=torch.float64)
    seen = np.empty((game.repetitions, 1, SIZE))
    for i in range(game.repetitions):
        seed = 2 * (game.seed * game.repetitions + i) + included
        release = replace(game.release, mechanism=replace(mechanism), seed=seed)  # its stream begins anew
        released = np.empty((rounds, SIZE))
        for step in range(rounds):
            move = {"w": bound * u * float(joins[step] and included)}
            one = Part(accepted={0: {records.NUM_EXAMPLES: 1.0}}, total=move)
            after = release.model(one, before, round=step + 1, attempt=0)
            released[step] = records.to_params(after)["w"].numpy() * divisor
        seen[i, 0] = toward @ released
    along: Values = seen @ u.numpy()
    return Seen(along=along, norms=np.square(seen).sum(2), moves=along)
