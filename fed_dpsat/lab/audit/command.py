"""All audits of one configuration, as data and as text: the output of ``fed-dpsat audit``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fed_dpsat import plugins
from fed_dpsat.accounting.plans import make_plans
from fed_dpsat.errors import SettingError
from fed_dpsat.flower.sums import ClientRelease
from fed_dpsat.lab.audit.canaries import audit_one_run, check_private, check_unit, costliest_client
from fed_dpsat.lab.audit.client_game import ClientGame, play_clients
from fed_dpsat.lab.audit.game import Game, GameResult, play
from fed_dpsat.lab.audit.membership import draw_membership, membership_curve
from fed_dpsat.lab.audit.words import LIMITS, game_words, membership_words, one_run_words
from fed_dpsat.run.folder import RunFolder
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.settings.flat import parse_overrides
from fed_dpsat.step.optimizers.chain import build_optimizer

GAME_STEPS = 8
"""A game plays the first rounds, up to this number of steps; later rounds have the same mechanism."""


def config_of(path: Path | None, overrides: Sequence[str]) -> RunConfig:
    """The settings of a TOML file or a run folder, or the defaults.

    Raises ``SettingError`` for a run with objects from Python, which its settings do not describe.
    """
    if path is None or not path.is_dir():
        return RunConfig.load(path, overrides)
    folder = RunFolder(path, resume=True)
    if objects := folder.objects():
        raise SettingError("run", str(path), "described by its settings alone", f"it was given {', '.join(objects)}")
    return RunConfig.from_mapping({**folder.config().settings(), **parse_overrides(overrides)})


def game_of(config: RunConfig, *, repetitions: int, confidence: float) -> Game:
    """The game with the optimizer, clipping rule, noise and rates of the costliest client of ``config``."""
    settings: dict[str, Any] = {**config.settings(), "total_steps": config.total_steps}
    settings["steps_per_round"] = config.steps_per_round
    event = make_plans(config)[costliest_client(config)].event
    local_steps = min(config.steps_per_round, GAME_STEPS)
    return Game(
        optimizer=build_optimizer(config.optimizer, config.base_optimizer, settings, config.optimizer_args),
        clipping=plugins.build("clipping", config.clipping, settings, config.clipping_args),
        noise_multiplier=event.noise_multiplier,
        noise_distribution=config.noise_distribution,
        sample_rate=event.sample_rate,
        rounds=min(config.rounds_per_client, GAME_STEPS // local_steps),
        local_steps=local_steps,
        others=99 if config.clipping == "adaptive" else 1,
        repetitions=repetitions,
        delta=config.delta,
        confidence=confidence,
        seed=config.seed,
        stacked=config.stack_clients > 1,
        engine=config.engine,
        examples_each=config.user_examples if config.privacy_unit == "user" else 0,
    )


def client_game_of(config: RunConfig, *, repetitions: int, confidence: float) -> ClientGame:
    """The game with the release of ``config``, whose privacy unit is the client."""
    if config.client_sampling == "cyclic":
        bound = "possible in a game, which has no turns of groups"
        raise SettingError("client_sampling", "cyclic", bound, "play fixed with min_separation")
    event = make_plans(config)[0].event
    release = ClientRelease.of(config, event.noise_multiplier)
    assert release is not None  # the privacy unit is the client
    return ClientGame(
        release=release,
        noise_multiplier=event.noise_multiplier,
        sample_rate=event.sample_rate,
        rounds=1 if event.participations else min(config.rounds_per_client, GAME_STEPS),
        repetitions=repetitions,
        delta=config.delta,
        confidence=confidence,
        seed=config.seed,
    )


def _play(config: RunConfig, *, repetitions: int, confidence: float) -> GameResult:
    check_private(config)
    if config.privacy_unit == "client":
        return play_clients(client_game_of(config, repetitions=repetitions, confidence=confidence))
    return play(game_of(config, repetitions=repetitions, confidence=confidence))


def run_audit(
    config: RunConfig,
    *,
    attacks: Sequence[str],
    canaries: int,
    repetitions: int,
    models: int,
    figure: Path | None,
    confidence: float,
) -> tuple[dict[str, Any], list[str]]:
    """``(data, paragraphs)``: the game, one run for each of ``attacks``, and a membership curve if ``models``.

    A run without privacy has no guarantee to test, so it gets only the curve.
    """
    report: dict[str, Any] = {}
    words: list[str] = []
    if config.private or not models:
        if attacks:
            check_unit(config)
        played = _play(config, repetitions=repetitions, confidence=confidence)
        report["game"] = {**dataclasses.asdict(played), "broken": played.broken}
        words.append(game_words(played))
    for attack in attacks if config.private else ():
        found = audit_one_run(config, attack=attack, canaries=canaries, confidence=confidence, seed=config.seed)
        report[attack] = {**dataclasses.asdict(found), "broken": found.broken}
        words.append(one_run_words(found))
    if models:
        curve = membership_curve(config, models=models, seed=config.seed)
        if figure:
            draw_membership(curve, figure)
        report["membership"] = {
            name: value.tolist() if hasattr(value, "tolist") else value
            for name, value in dataclasses.asdict(curve).items()
        }
        words.append(membership_words(curve))
    return {**report, "limits": LIMITS}, [*words, LIMITS]
