"""The distinguishing game of the unit "client": the real release of the server, with and without one client.

The client moves the model by the whole bound C in every round that its coin selects; ``others`` do the same in an
orthogonal direction, with their own coins. The attacker sees all released models and no coin. Each repetition has its
own coins and noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from fed_dpsat.accounting import PrivacyEvent
from fed_dpsat.errors import SettingError
from fed_dpsat.flower.client_release import ClientRelease
from fed_dpsat.flower.sums import Part, merge
from fed_dpsat.flower.wire import records
from fed_dpsat.lab.audit.bounds import check_confidence
from fed_dpsat.lab.audit.game import SIZE, GameResult, ledger_epsilon, result_of
from fed_dpsat.lab.audit.scores import Seen, Values


@dataclass(frozen=True, kw_only=True)
class ClientGame:
    """``rounds`` of ``release`` at the cost of ``event`` each. Raises ``SettingError`` for an invalid setting."""

    release: ClientRelease
    event: PrivacyEvent
    rounds: int = 1
    others: int = 1
    repetitions: int = 1000
    delta: float = 1e-5
    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        check_confidence(self.confidence)
        if self.rounds < 1:
            raise SettingError("rounds", self.rounds, "at least 1", "a game needs one")
        if self.repetitions < 20:
            raise SettingError("repetitions", self.repetitions, "at least 20", "half of them only choose the attack")

    @property
    def noise_multiplier(self) -> float:
        """The declared noise multiplier."""
        return self.event.noise_multiplier

    @property
    def sample_rate(self) -> float:
        """The probability of a client to be in a round; 1 for public cohorts."""
        return self.event.sample_rate


def play_clients(game: ClientGame) -> GameResult:
    """Play both worlds; one half of the repetitions selects the attack, the other half measures it."""
    without, with_it = (_world(game, included) for included in (False, True))
    spent = ledger_epsilon([game.event] * game.rounds, game.delta)
    return result_of(game, without, with_it, steps=game.rounds, epsilon_ledger=spent)


def _world(game: ClientGame, included: bool) -> Seen:
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
