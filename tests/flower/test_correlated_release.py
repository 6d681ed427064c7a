"""Noise that is correlated over rounds, in the release of a server: what it is, what a client pays, how a run resumes.

Wrong versions stand beside the checks: each of them exceeds the bound, or is refused.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fed_dpsat import RunConfig, simulate
from fed_dpsat.accounting import LedgerError, PrivacyEvent, PrivacyLedger, epsilon
from fed_dpsat.accounting.event import correlated_kind
from fed_dpsat.accounting.plans import make_plans
from fed_dpsat.errors import InputError, RunError, SettingError
from fed_dpsat.flower.nodes import FederationError
from fed_dpsat.flower.roster import Roster, group_of
from fed_dpsat.flower.sums import ClientRelease, Part
from fed_dpsat.flower.wire import records
from fed_dpsat.run.extension import check_resumed
from fed_dpsat.run.folder import RunFolder
from fed_dpsat.simulation import resume
from fed_dpsat.step.correlated.base import StreamError
from fed_dpsat.step.correlated.choose import factorization_of, participation_of
from fed_dpsat.step.correlated.mechanism import CorrelatedMechanism
from fed_dpsat.step.correlated.toeplitz import Toeplitz
from fed_dpsat.step.noise import derive_generator, standard_normals
from fed_dpsat.step.secure_noise import grid_of, system_generator
from tests.simulation.test_resume import killed, what_came_of

CONFIG = RunConfig(
    privacy_unit="client",
    optimizer="dp-sgd",
    noise_mechanism="band-mf",
    noise_multiplier=0.7,
    delta=1e-2,
    clip_norm=0.05,
    num_clients=6,
    clients_per_round=2,
    num_rounds=6,
    min_separation=3,
    max_rounds_per_client=2,
)
MODEL = {"w": torch.zeros(3, 2), "b": torch.zeros(4)}
MOVES = {"w": torch.full((3, 2), 0.01, dtype=torch.float64), "b": torch.full((4,), -0.02, dtype=torch.float64)}
SIZE = 10


def of(**changes: object) -> RunConfig:
    return dataclasses.replace(CONFIG, **changes)  # type: ignore[arg-type]


def release_of(config: RunConfig) -> ClientRelease:
    made = ClientRelease.of(config, config.noise_multiplier)
    assert made is not None
    return made


def released(release: ClientRelease, round: int, attempt: int = 0) -> NDArray[np.float64]:
    """The mean change that ``release`` adds to a model in ``round``, flat."""
    moves = {name: value.clone() for name, value in MOVES.items()}
    total = Part(total=moves, accepted={0: {records.NUM_EXAMPLES: 1}})
    model = release.model(total, records.to_arrays(MODEL), round=round, attempt=attempt)
    return np.concatenate([value.numpy().ravel() for value in records.to_params(model).values()]).astype(np.float64)


def matrix(column: NDArray[np.float64]) -> NDArray[np.float64]:
    n = len(column)
    return np.array([[column[i - j] if i >= j else 0.0 for j in range(n)] for i in range(n)])


@pytest.mark.parametrize("mechanism", ["band-mf", "blt", "bisr"])
def test_c_times_the_noise_of_all_rounds_is_the_draw_of_each(mechanism: str) -> None:
    config = of(noise_mechanism=mechanism)
    factorization, release = factorization_of(config), release_of(config)
    assert isinstance(factorization, Toeplitz)
    moves = np.concatenate([value.numpy().ravel() for value in MOVES.values()])
    noise = np.stack([2 * released(release, round) - moves for round in range(1, 7)])
    scale = 0.7 * 0.05 * factorization.sensitivity(participation_of(config))
    drawn = [standard_normals(derive_generator(0, purpose="noise", round=r), SIZE).numpy() for r in range(1, 7)]
    normals = matrix(factorization.column) @ noise / scale
    np.testing.assert_allclose(normals, drawn, atol=1e-5)
    assert not np.allclose(normals / 0.9, drawn, atol=0.01)


def test_one_band_and_one_round_of_a_client_is_independent_noise_to_the_bit() -> None:
    once = of(noise_bands=1, max_rounds_per_client=1, num_clients=12, clients_per_round=2, min_separation=6)
    one, alone = release_of(once), release_of(dataclasses.replace(once, noise_mechanism="independent", noise_bands=0))
    assert isinstance(one.mechanism, CorrelatedMechanism)
    for round in range(1, 7):
        assert released(one, round).tobytes() == released(alone, round).tobytes()
    events = [
        make_plans(config)[0].event for config in (once, dataclasses.replace(CONFIG, noise_mechanism="independent"))
    ]
    assert epsilon([events[0]], 1e-5) == epsilon([events[1]], 1e-5)


def test_the_optimiser_of_a_server_is_told_the_noise_of_the_next_round() -> None:
    mechanism = release_of(of(noise_mechanism="tree")).mechanism
    assert isinstance(mechanism, CorrelatedMechanism)
    scale, deviations = mechanism.scale, mechanism.factorization.deviations()
    for step in range(6):
        assert mechanism.noise_std == pytest.approx(scale * deviations[step] / 2)
        mechanism.skip(3, np.random.default_rng(0))


def test_a_release_catches_up_with_its_run_and_gives_each_round_once() -> None:
    whole, later = release_of(CONFIG), release_of(CONFIG)
    all_rounds = [released(whole, round) for round in range(1, 7)]
    assert released(later, 4).tobytes() == all_rounds[3].tobytes()
    assert released(later, 5).tobytes() == all_rounds[4].tobytes()
    for round, attempt in ((5, 0), (2, 0), (6, 1)):
        with pytest.raises(StreamError):
            released(later, round, attempt)
    assert released(later, 6).tobytes() == all_rounds[5].tobytes()
    with pytest.raises(StreamError, match="covers 6 steps"):
        released(later, 7)


def test_another_fit_does_not_go_on() -> None:
    release = release_of(of(noise_mechanism="blt", noise_buffers=2))
    release.check_state_dict(release.state_dict())
    other = release_of(of(noise_mechanism="blt", noise_buffers=1)).state_dict()
    for state in (other, {}):
        with pytest.raises(StreamError, match="other coefficients here than when the run began"):
            release.check_state_dict(state)
    release_of(of(noise_mechanism="independent")).check_state_dict({})


def test_system_noise_is_never_drawn_again() -> None:
    release = release_of(of(noise_source="system"))
    released(release, 1)
    with pytest.raises(StreamError, match="round 3"):
        released(release, 3)
    with pytest.raises(StreamError):
        released(release, 1)


def test_system_noise_has_the_size_of_its_mechanism_and_lies_on_a_grid() -> None:
    config = of(noise_source="system")
    mechanism = release_of(config).mechanism
    assert isinstance(mechanism, CorrelatedMechanism)
    sums = [mechanism.privatize({"w": torch.zeros(20_000, dtype=torch.float64)}, system_generator()) for _ in range(6)]
    noise = np.stack([2 * one["w"].numpy() for one in sums])
    np.testing.assert_allclose(noise / grid_of(mechanism.scale), np.rint(noise / grid_of(mechanism.scale)), atol=1e-6)
    assert isinstance(mechanism.factorization, Toeplitz)
    normals = matrix(mechanism.factorization.column) @ noise / mechanism.scale
    tolerance = 5 * math.sqrt(2 / 20_000)
    np.testing.assert_allclose(normals.var(axis=1), 1, atol=tolerance)
    np.testing.assert_allclose(np.corrcoef(normals) - np.eye(6), 0, atol=tolerance)


def distance(config: RunConfig, rows: NDArray[np.float64], copies: tuple[int, ...] = ()) -> float:
    """How many deviations the worst client moves all releases by: 1 / noise_multiplier, if the claim holds.

    ``rows[n, n]`` is the noise of each release, for independent draws; ``copies`` are steps that are released twice,
    the second time with draws of their own.
    """
    steps, worst = list(range(config.num_rounds)), 0.0
    covariance = rows @ rows.T
    if copies:
        zeros = np.zeros((config.num_rounds, len(copies)))
        again = covariance[np.ix_(copies, copies)]
        covariance = np.block([[covariance, zeros], [zeros.T, again]])
    for first in range(config.min_separation):
        moved = np.array([float(s % config.min_separation == first) for s in [*steps, *copies]]) * config.clip_norm
        worst = max(worst, math.sqrt(float(moved @ np.linalg.solve(covariance, moved))))
    return worst


@pytest.mark.parametrize("mechanism", ["band-mf", "blt", "bisr"])
def test_the_worst_client_moves_all_releases_together_by_one_over_the_noise_multiplier(mechanism: str) -> None:
    config = of(noise_mechanism=mechanism)
    found = release_of(config).mechanism
    assert isinstance(found, CorrelatedMechanism)
    assert isinstance(found.factorization, Toeplitz)
    inverse, claimed = matrix(found.factorization.inverse_column), 1 / config.noise_multiplier
    assert distance(config, found.scale * inverse) == pytest.approx(claimed, rel=1e-9)
    once = dataclasses.replace(participation_of(config), most=1, min_separation=6)
    for wrong in (
        distance(config, 0.9 * found.scale * inverse),  # too little noise
        distance(config, found.scale / found.sensitivity * found.factorization.sensitivity(once) * inverse),
        distance(config, found.scale * inverse, copies=(3, 4)),  # rounds that were released twice, with other noise
        distance(dataclasses.replace(config, min_separation=2), found.scale * inverse),  # clients that come too early
        distance(config, found.scale * np.eye(6) * 0.5),  # independent noise of half that size
    ):
        assert wrong > 1.05 * claimed


def test_a_bound_that_changes_scales_the_whole_noise_of_a_round_and_not_its_draw() -> None:
    """y_t = x_t + C_t s w_t holds for any bounds C_t; buffers in absolute units do not, if the bound falls."""
    config, falling = of(noise_mechanism="bisr"), np.geomspace(1, 0.1, 6)
    found = release_of(config).mechanism
    assert isinstance(found, CorrelatedMechanism)
    assert isinstance(found.factorization, Toeplitz)
    inverse, moved = matrix(found.factorization.inverse_column), np.array([1.0, 0, 0, 1, 0, 0]) * falling * 0.05

    def moves(rows: NDArray[np.float64]) -> float:
        return math.sqrt(float(moved @ np.linalg.solve(rows @ rows.T, moved)))

    claimed = 1 / config.noise_multiplier
    assert moves(found.scale * np.diag(falling) @ inverse) <= claimed * (1 + 1e-9)
    assert moves(found.scale * np.diag(falling[::-1]) @ inverse @ np.diag(falling)) > 1.05 * claimed


def test_an_adversary_that_adapts_learns_no_more() -> None:
    """Whether a client adds its change to a round depends on earlier releases: delta by its likelihood ratios."""
    config, trials = CONFIG, 200_000
    found = release_of(config).mechanism
    assert isinstance(found, CorrelatedMechanism)
    stream, c = found.factorization.stream(), matrix(found.factorization.column)  # type: ignore[attr-defined]
    generator = np.random.default_rng(0)
    released, added = np.zeros((6, trials)), np.zeros((6, trials))
    last, used = np.full(trials, -9), np.zeros(trials, dtype=int)
    for step in range(6):
        noise = stream.next(lambda: torch.from_numpy(generator.standard_normal(trials)), step + 1).numpy()
        free = (step - last >= 3) & (used < 2)
        wants = released[:step].sum(axis=0) <= 0 if step else np.ones(trials, dtype=bool)
        joins = free & (wants | (step >= 3))
        added[step, joins] = 0.05
        last[joins], used[joins] = step, used[joins] + 1
        released[step] = added[step] + found.scale * noise
    with_it, without = c @ (released - added), c @ released
    ratios = (np.square(without) - np.square(with_it)).sum(axis=0) / (2 * found.scale**2)

    def delta(claimed: float) -> float:
        return float(np.maximum(0, -np.expm1(claimed - ratios)).mean())

    claimed = epsilon([PrivacyEvent(noise_multiplier=0.7, sample_rate=1, steps=1)], 0.1)
    assert 0.05 < delta(claimed) < 0.1 + 5 / math.sqrt(trials)
    less_noise = epsilon([PrivacyEvent(noise_multiplier=1.4, sample_rate=1, steps=1)], 0.1)
    assert delta(less_noise) > 0.11


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    simulate(CONFIG, folder)
    return folder


def cohorts(folder: Path) -> list[list[int]]:
    return [line["asked"] for line in RunFolder(folder, resume=True).rounds() if line["round"]]


def test_cohorts_keep_their_distance_and_number(whole: Path) -> None:
    asked = cohorts(whole)
    for client in range(6):
        mine = [round for round, cohort in enumerate(asked) if client in cohort]
        assert len(mine) == 2
        assert mine[1] - mine[0] >= 3


def test_the_first_round_of_a_client_pays_for_all(whole: Path) -> None:
    with PrivacyLedger(whole / "ledger.sqlite", readonly=True) as ledger:
        (event,) = ledger.history(0)
        assert event.kind == correlated_kind("band-mf", steps=6, participations=2, separation=3)
        assert (event.steps, event.noise_multiplier, event.sample_rate) == (2, 0.7, 1.0)
        alone = PrivacyEvent(noise_multiplier=0.7, sample_rate=1, steps=1)
        assert ledger.epsilon(1e-2) == pytest.approx(epsilon([alone], 1e-2))
        assert ledger.epsilon(1e-2, "rdp") == pytest.approx(epsilon([alone], 1e-2, "rdp"))
        assert ledger.rounds_by_client() == dict.fromkeys(range(6), 2)
    lines = RunFolder(whole, resume=True).rounds()
    assert {line["epsilon"] for line in lines if line["round"]} == {ledger_epsilon(alone)}


def ledger_epsilon(event: PrivacyEvent) -> float:
    return epsilon([dataclasses.replace(event, kind="poisson_gaussian_clients")], 1e-2)


def test_a_ledger_refuses_more_rounds_than_the_noise_is_for() -> None:
    kind = correlated_kind("blt", steps=6, participations=2, separation=3)
    event = PrivacyEvent(noise_multiplier=1.0, sample_rate=1, steps=1, kind=kind)
    with PrivacyLedger(":memory:") as ledger:
        ledger.charge_many(1, 0, {0: event, 1: event})
        ledger.charge_many(4, 0, {0: event})
        with pytest.raises(LedgerError, match="client 0 would take part 3 times"):
            ledger.charge_many(6, 0, {1: event, 0: event})
        assert ledger.rounds_by_client() == {0: 2, 1: 1}
        other = dataclasses.replace(event, kind=correlated_kind("blt", steps=7, participations=2, separation=3))
        ledger.charge_many(7, 0, {0: other})  # another mechanism is paid for by itself
        twice = [dataclasses.replace(event, kind="poisson_gaussian_clients", steps=2)]
        assert ledger.epsilon(1e-5) == pytest.approx(epsilon(twice, 1e-5))


def roster_of(config: RunConfig, ledger: PrivacyLedger) -> Roster:
    made = Roster(
        make_plans(config),
        ledger,
        delta=config.delta,
        accountant="pld",
        cohort_size=config.cohort_size,
        max_rounds_per_client=config.rounds_per_client,
        min_separation=config.separation,
        client_sampling=config.client_sampling,
        seed=config.seed,
    )
    made.join(range(config.num_clients))
    return made


def test_a_client_is_refused_too_early_and_too_often_before_a_charge() -> None:
    with PrivacyLedger(":memory:") as ledger:
        roster = roster_of(CONFIG, ledger)
        for round, clients in ((1, [0, 1]), (4, [0])):
            roster.check_promise(clients, round)
            ledger.charge_many(round, 0, dict.fromkeys(clients, roster.plans[0].event))
            roster.charged(clients, round)
        for asked, round in (([2, 0], 6), ([0], 9)):
            with pytest.raises(FederationError, match="client 0 was in 2 of at most 2 rounds"):
                roster.check_promise(asked, round)
        with pytest.raises(FederationError, match="client 1 was in 1 of at most 2 rounds, the last time in round 1"):
            roster.check_promise([1], 3)
        assert roster.eligible(3)[0].tolist() == [2, 3, 4, 5]
        again = roster_of(CONFIG, ledger)  # from the ledger alone
        assert [again.eligible(round)[0].tolist() for round in (3, 4, 9)] == [[2, 3, 4, 5], [1, 2, 3, 4, 5]] + [
            [1, 2, 3, 4, 5]
        ]


@pytest.mark.parametrize("point", [("charge_many", 4, True), ("settle_many", 4, False)])
def test_a_killed_run_goes_on_with_the_noise_of_an_uninterrupted_one(
    whole: Path, tmp_path: Path, point: tuple[str, int, bool]
) -> None:
    name, call, after = point
    killed(CONFIG, tmp_path / "run", PrivacyLedger, name, call, after=after)
    resume(tmp_path / "run", progress=False)
    assert what_came_of(tmp_path / "run") == what_came_of(whole)


def test_a_run_with_system_noise_ends_and_cannot_be_resumed(tmp_path: Path, untried: None) -> None:
    config = of(noise_source="system", noise_mechanism="blt", num_rounds=3, max_rounds_per_client=1)
    killed(config, tmp_path / "run", PrivacyLedger, "settle_many", 2, after=True)
    with pytest.raises((RunError, SettingError), match="keeps secret noise of earlier rounds in memory"):
        resume(tmp_path / "run", progress=False)


def test_a_run_with_correlated_noise_is_not_extended() -> None:
    begun = of(num_clients=8)
    with pytest.raises(SettingError, match="made for these rounds, and charged before the first"):
        check_resumed(begun, dataclasses.replace(begun, num_rounds=7), "run")


CYCLIC = dataclasses.replace(
    CONFIG,
    client_sampling="cyclic",
    num_clients=40,
    clients_per_round=5,
    noise_bands=4,
    min_separation=1,
    max_rounds_per_client=0,
    num_rounds=8,
)


def test_cyclic_coins_charge_the_group_of_a_round_at_the_rate_of_a_turn() -> None:
    event = make_plans(CYCLIC)[0].event
    assert (event.kind, event.sample_rate, event.steps) == ("poisson_gaussian_clients", 4 * 5 / 40, 1)
    assert CYCLIC.rounds_per_client == 2
    groups = [group_of(0, client, 4) for client in range(40)]
    assert set(groups) == set(range(4))
    with PrivacyLedger(":memory:") as ledger:
        roster = roster_of(CYCLIC, ledger)
        for round in range(1, 5):
            mine = [client for client in range(40) if groups[client] == round % 4]
            assert roster.population(round) == mine
            assert set(roster.cohort(round)[0]) <= set(mine)
            assert roster.tossed == len(mine)
        fewer = roster_of(dataclasses.replace(CYCLIC, num_clients=30), ledger)
        assert fewer.population(1) == [client for client in roster.population(1) if client < 30]


def test_cyclic_noise_has_the_longest_column_and_not_the_columns_of_a_schedule() -> None:
    mechanism = release_of(CYCLIC).mechanism
    assert isinstance(mechanism, CorrelatedMechanism)
    assert isinstance(mechanism.factorization, Toeplitz)
    assert mechanism.sensitivity == pytest.approx(float(np.linalg.norm(mechanism.factorization.coefficients)))


def test_cyclic_coins_cost_what_dp_accounting_says() -> None:
    """Four bands at a batch of 1 % over 1000 steps: noise 2.8785 for epsilon 1; rate and count of a turn."""
    config = dataclasses.replace(CYCLIC, num_clients=1000, clients_per_round=10, num_rounds=1000, delta=1e-6)
    config = dataclasses.replace(config, noise_multiplier=0.0, target_epsilon=1.0)
    event = make_plans(config)[0].event
    assert event.noise_multiplier == pytest.approx(2.8785, rel=2e-3)
    too_low = dataclasses.replace(event, sample_rate=config.client_rate)
    assert epsilon([too_low] * 250, 1e-6) < 0.3


def refusals() -> Iterator[tuple[dict[str, object], str]]:
    yield {"client_sampling": "poisson", "min_separation": 1, "max_rounds_per_client": 0}, "client_sampling='poisson'"
    yield {"privacy_unit": "example"}, "noise_mechanism='band-mf'"
    yield {"noise_bands": 4}, "noise_bands=4 is not at most min_separation=3"
    yield {"noise_mechanism": "bisr", "noise_bands": 7}, "noise_bands=7 is not at most num_rounds=6"
    yield {"noise_mechanism": "independent", "noise_bands": 2}, "noise_bands=2"
    yield {"max_rounds_per_client": 3}, "max_rounds_per_client=3 is not at most 2"
    yield {"min_separation": 4}, "min_separation=4 is not at most 3"
    yield {"min_separation": 7}, "min_separation=7 is not at most num_rounds=6"
    yield {"client_sampling": "cyclic", "noise_mechanism": "blt", "min_separation": 1}, "client_sampling='cyclic'"
    yield {"noise_mechanism": "none"}, "noise_mechanism='none'"


@pytest.mark.parametrize(("changes", "match"), list(refusals()))
def test_impossible_schedules_are_refused_in_one_line(changes: dict[str, object], match: str) -> None:
    with pytest.raises(InputError, match=match):
        factorization_of(of(**changes))
