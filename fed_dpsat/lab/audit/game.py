"""The distinguishing game: the real training step, many times, on two neighbouring data sets that an attack separates.

The adversary sets up the worst case. It knows the gradients of the loss and the ``others`` examples. The server sends
the same model in every round. The second world has one more example, whose gradient is clipped and points along ``u``.
The adversary sees all private gradients and all models. The gradients of the other examples are orthogonal to ``u``.
With ``follow`` they are 0 until the query point moves along ``u``, and then point along ``u``: information of the
ascent direction about the example is multiplied by their number. With ``examples_each`` the game is about a person: all
are persons with so many equal examples, and the second world has one more of them.

Each repetition has its own coins and noise. The first half of the repetitions selects an attack from ``scores`` and its
threshold; the second half measures it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fed_dpsat.accounting import PrivacyEvent, PrivacyLedger
from fed_dpsat.errors import SettingError
from fed_dpsat.lab.audit.bounds import check_confidence, gaussian_epsilon, two_world_epsilon
from fed_dpsat.lab.audit.scores import Guess, Seen, Values, choose, errors, scores
from fed_dpsat.params import Params, laid_end_to_end, trainable
from fed_dpsat.step.clipping import ClippingRule
from fed_dpsat.step.gradients.per_example import ModelLoss, clipped_gradient_sum
from fed_dpsat.step.loop import LocalResult, Member, Streams, step_info, train
from fed_dpsat.step.mechanism import MECHANISMS, Mechanism
from fed_dpsat.step.optimizers.base import PrivateOptimizer, State, next_round
from fed_dpsat.step.persons import Persons
from fed_dpsat.step.query import At
from fed_dpsat.step.sampling import PoissonSampler
from fed_dpsat.step.stacked import Stacked, Unstackable
from fed_dpsat.step.unchecked import unchecked

LAYERS, WIDTH = 16, 2
SIZE = LAYERS * WIDTH
STACK = 500


def ledger_epsilon(events: Sequence[PrivacyEvent], delta: float) -> float:
    """Epsilon in the ledger of one client whose rounds cost ``events``."""
    with PrivacyLedger(":memory:") as ledger:
        for round, event in enumerate(events, 1):
            ledger.charge(0, round, 0, event)
        return ledger.epsilon(delta)


def as_it_is(member: Member) -> Member:
    """The client of a game, unchanged; tests replace it by a broken one."""
    return member


@dataclass(frozen=True, kw_only=True)
class AnyGame:
    """A declared mechanism, the size of the game, and the bound. Raises ``SettingError`` for an invalid setting.

    ``repetitions`` counts one world.
    """

    noise_multiplier: float
    sample_rate: float = 1.0
    rounds: int = 1
    others: int = 1
    repetitions: int = 1000
    delta: float = 1e-5
    confidence: float = 0.95
    seed: int = 0
    noise_distribution: str = "gaussian"

    def __post_init__(self) -> None:
        check_confidence(self.confidence)
        for name, value, least in (("rounds", self.rounds, 1), ("others", self.others, 1)):
            if value < least:
                raise SettingError(name, value, f"at least {least}", "a game needs one")
        if self.repetitions < 20:
            raise SettingError("repetitions", self.repetitions, "at least 20", "half of them only choose the attack")


@dataclass(frozen=True, kw_only=True)
class Game(AnyGame):
    """One game of the training step.

    ``client`` may replace parts of a client and ``ledger`` the account, to play a broken mechanism. Repetitions train
    like clients of a run: ``stacked`` if possible, else one by one with ``engine``.
    """

    optimizer: PrivateOptimizer
    clipping: ClippingRule
    local_steps: int = 1
    follow: bool = False
    stacked: bool = True
    engine: str = "auto"
    examples_each: int = 0
    client: Callable[[Member], Member] = as_it_is
    ledger: Callable[[Sequence[PrivacyEvent], float], float] = ledger_epsilon


@dataclass(frozen=True, kw_only=True)
class GameResult:
    """``epsilon_lower`` holds with ``confidence``; ``epsilon_ledger`` is the charge for the same releases.

    ``epsilon_if_gaussian`` holds only for a Gaussian mechanism without sampling; with sampling it is None.
    """

    epsilon_lower: float
    epsilon_if_gaussian: float | None
    epsilon_ledger: float
    delta: float
    confidence: float
    repetitions: int
    steps: int
    guess: Guess
    false_positive_rate: float
    false_negative_rate: float

    @property
    def broken(self) -> bool:
        """Whether the lower bound is above the epsilon of the ledger."""
        return self.epsilon_lower > self.epsilon_ledger


def play(game: Game) -> GameResult:
    """Play both worlds; one half of the repetitions selects the attack, the other half measures it.

    The game skips the checks of plug-ins (``unchecked``), because it must play a broken one too.
    """
    with unchecked():
        (without, events), (with_it, _) = (_world(game, included) for included in (False, True))
    steps = game.rounds * game.local_steps
    return result_of(game, without, with_it, steps=steps, epsilon_ledger=game.ledger(events, game.delta))


def result_of(game: AnyGame, without: Seen, with_it: Seen, *, steps: int, epsilon_ledger: float) -> GameResult:
    """The result of ``game`` from two worlds with equal numbers of repetitions."""
    guess, false_positives, false_negatives, trials = judged(game, without, with_it)
    seen = false_positives, false_negatives, trials, game.delta, game.confidence
    return GameResult(
        epsilon_lower=two_world_epsilon(*seen),
        epsilon_if_gaussian=gaussian_epsilon(*seen) if _is_gaussian(game) else None,
        epsilon_ledger=epsilon_ledger,
        delta=game.delta,
        confidence=game.confidence,
        repetitions=len(without.along),
        steps=steps,
        guess=guess,
        false_positive_rate=false_positives / trials[0],
        false_negative_rate=false_negatives / trials[1],
    )


def _is_gaussian(game: AnyGame) -> bool:
    """Whether the declared mechanism is a Gaussian without sampling."""
    return game.sample_rate == 1 and game.noise_distribution == "gaussian"


def judged(game: AnyGame, without: Seen, with_it: Seen) -> tuple[Guess, int, int, tuple[int, int]]:
    """The attack with the best bound on the first half, and its errors and trials on the second half."""
    half = len(without.along) // 2

    def scored(world: Seen, rows: slice) -> dict[str, Values]:
        return scores(world.part(rows), game.noise_multiplier, game.sample_rate, game.noise_distribution)

    first, second = slice(None, half), slice(half, None)
    guess = choose(scored(without, first), scored(with_it, first), game.delta, game.confidence)
    return guess, *errors(guess, scored(without, second), scored(with_it, second))


class Crafted(nn.Module):
    """``inputs[B, SIZE + 1] -> outputs[B, 1]``: <a, w> + b relu(<u, w>), with (a, b) the row of an example."""

    def __init__(self) -> None:
        super().__init__()
        made = (nn.utils.skip_init(nn.Linear, WIDTH, 1, bias=False) for _ in range(LAYERS))  # type: ignore[no-untyped-call]
        self.layers = nn.ModuleList(made)
        for weight in self.parameters():
            nn.init.zeros_(weight)

    def forward(self, inputs: Tensor) -> Tensor:
        """The loss, as the only output."""
        even = torch.full_like(inputs[:, :WIDTH], 1 / math.sqrt(SIZE))
        pieces = zip(self.layers, torch.split(inputs[:, :-1], WIDTH, 1), strict=True)
        both = torch.cat([layer(torch.stack([piece, even], 1)) for layer, piece in pieces], 2).sum(2)
        return both[:, :1] + inputs[:, -1:] * torch.relu(both[:, 1:])


@functools.cache
def crafted_loss() -> ModelLoss:
    """The outputs of ``Crafted`` as losses, for optimizers that use outputs too."""
    return ModelLoss(Crafted(), criterion=lambda outputs, targets: outputs.squeeze(1))


def strongest_norm(clipping: ClippingRule, shapes: Params) -> float:
    """The norm of an evenly spread gradient with the largest norm after clipping; some rules drop large gradients."""
    norms = torch.logspace(-3, 3, 61, dtype=torch.float64) * clipping.clip_norm
    norms = torch.cat([norms, torch.tensor([float(getattr(clipping, "global_threshold", clipping.clip_norm))])])
    factors = clipping.factors({name: norms**2 * p.numel() / SIZE for name, p in shapes.items()})
    kept = torch.stack([f.double() ** 2 * norms**2 * shapes[name].numel() / SIZE for name, f in factors.items()])
    lengths = kept.sum(0)
    return float(norms[lengths >= lengths.max() * (1 - 1e-6)].min()) if math.isfinite(float(lengths.max())) else 1.0


def _start() -> Params:
    return trainable(Crafted())


def _rows(game: Game) -> Tensor:
    """``[others + 1, SIZE + 1]``; the example of the second world is the last row."""
    if game.noise_distribution == "laplace":  # numbers, which l1 clips to the bound along nearly every direction
        norm = 10 * game.clipping.clip_norm
    else:
        norm = strongest_norm(game.clipping, _start())
    along = torch.full((SIZE,), norm / math.sqrt(SIZE))
    across = along * torch.tensor([1.0, -1.0]).repeat(SIZE // 2)
    rows = torch.zeros(game.others + 1, SIZE + 1)
    if game.follow:
        rows[:-1, -1] = norm
    else:
        rows[:-1, :-1] = across
    rows[-1, :-1] = along
    return rows


def _world(game: Game, included: bool) -> tuple[Seen, list[PrivacyEvent]]:
    """The releases of all repetitions of one world, and the cost of the rounds of one repetition."""
    rows, persons = _rows(game), None
    count = game.others + included  # the divisor uses the declared size, which is public and equal in both worlds
    if each := game.examples_each:
        rows = rows.repeat_interleave(each, 0)
        persons = Persons.of(np.arange(count).repeat(each), most=each)
    sampler = PoissonSampler(num_examples=count, sample_rate=game.sample_rate)
    mechanism = MECHANISMS[game.noise_distribution](
        noise_multiplier=game.noise_multiplier,
        clip_norm=game.clipping.clip_norm,
        expected_batch_size=game.sample_rate * (game.others + 1),
    )
    start, along, norms, moves = _start(), [], [], []
    events: list[PrivacyEvent] = []
    for first in range(0, game.repetitions, STACK):
        ids = range(first, min(first + STACK, game.repetitions))
        states: list[State] = [game.optimizer.init(start)] * len(ids)
        gradients: list[Tensor] = []
        moved: list[Tensor] = []
        for round in range(1, game.rounds + 1):
            members = [
                Member(
                    batches=lambda indices: (rows[indices], torch.zeros(len(indices))),
                    state=states[k] if round == 1 else next_round(game.optimizer, start, states[k]),
                    first_step=(round - 1) * game.local_steps,
                    sampler=sampler,
                    mechanism=mechanism,
                    streams=Streams(seed=game.seed, client=int(included), round=round, attempt=i),
                    persons=persons,
                )
                for k, i in enumerate(ids)
            ]
            results, released = _train(game, start, [game.client(member) for member in members])
            states = [result.state for result in results]
            gradients.append(released)
            moved.append(torch.stack([-_flat(result.params) for result in results])[:, None])
            if not first:
                events.append(results[0].event)
        seen = torch.cat(gradients, 1) * (mechanism.expected_batch_size / game.clipping.clip_norm)
        along.append((seen * _signs(game, start, rows[-1:], seen, mechanism)).sum(2) / math.sqrt(seen.shape[2]))
        norms.append(seen.square().sum(2))
        moves.append(torch.cat(moved, 1).sum(2) / math.sqrt(SIZE))
    return Seen(**{n: torch.cat(t).numpy() for n, t in (("along", along), ("norms", norms), ("moves", moves))}), events


def _signs(game: Game, start: Params, row: Tensor, seen: Tensor, mechanism: Mechanism) -> Tensor:
    """``[T, 1]``: 1; for a method that releases numbers, ``[T, K]``: the effect of the example in each step.

    Its size is sqrt(K), so that it is a sign if K is 1.
    """
    steps, state = seen.shape[1], game.optimizer.init(start)
    if seen.shape[2] == SIZE:
        return torch.ones(steps, 1)
    signs = []
    for step in range(steps):  # the loss is linear without ``follow``, so the point does not matter
        at = game.optimizer.query_point(start, state, step_info(step, mechanism, Streams(seed=0, client=0, round=1)))
        total, _ = clipped_gradient_sum(crafted_loss(), at, (row, torch.zeros(1)), game.clipping, engine="vmap")
        effect = _flat(total)
        signs.append(effect * (math.sqrt(len(effect)) / effect.norm().clamp(min=1e-300)))
    return torch.stack(signs)


def _train(game: Game, start: Params, members: Sequence[Member]) -> tuple[Sequence[LocalResult], Tensor]:
    """One round of each repetition, and its private gradients, ``[n, steps, SIZE]``."""
    released: list[list[Tensor]] = []

    def watch(k: int, at: At, private_gradient: Params) -> None:
        released[k].append(_flat(private_gradient))

    for executor in (Stacked, None) if game.stacked else (None,):
        released[:] = [[] for _ in members]
        try:
            results = train(
                start,
                members,
                loss_fn=crafted_loss(),
                optimizer=game.optimizer,
                clipping=game.clipping,
                local_steps=game.local_steps,
                executor=executor,
                engine=game.engine,
                physical_batch_size=STACK * (game.others + 1),
                watch=watch,
            )
            break
        except Unstackable:
            continue
    return results, torch.stack([torch.stack(steps) for steps in released])


def _flat(params: Params) -> Tensor:
    return laid_end_to_end(params).detach().double()
