"""The mechanism that settings name, fitted once for its inputs."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from fed_dpsat import plugins
from fed_dpsat.settings.combinations import Settings
from fed_dpsat.step.correlated.base import Factorization
from fed_dpsat.step.correlated.measured import Measured
from fed_dpsat.step.correlated.sensitivity import Participation

KIND = "noise_mechanism"


def participation_of(config: Settings) -> Participation:
    """What a client may do in a run; one round of it, if coins amplify each turn of its group."""
    amplified = config.client_sampling == "cyclic"
    return Participation(
        num_steps=config.num_rounds,
        most=1 if amplified else config.rounds_per_client,
        min_separation=config.num_rounds if amplified else config.separation,
    )


def factorization_of(config: Settings) -> Factorization:
    """The factorisation of a run; raises ``SettingError`` for impossible sizes, ``PluginError`` for another object."""
    return _chosen(config.noise_mechanism, participation_of(config), config.bands, config.noise_buffers)


@lru_cache(maxsize=64)
def _chosen(name: str, participation: Participation, noise_bands: int, noise_buffers: int) -> Factorization:
    """A built-in mechanism, or one of the user's, of which only its noise counts and no other number is believed."""
    found = made(name, participation, noise_bands, noise_buffers)
    built_in: Factorization = found
    return built_in if is_built_in(name) else Measured.of(found, participation.num_steps)


def is_built_in(name: str) -> bool:
    """Whether ``name`` is a mechanism of the project."""
    return name in plugins.builtin(KIND)


def made(name: str, participation: Participation, noise_bands: int, noise_buffers: int) -> Any:
    """What the factory of ``name`` returns; raises ``PluginError`` for an object without ``stream``."""
    settings = {
        "participation": participation,
        "num_steps": participation.num_steps,
        "noise_bands": noise_bands,
        "noise_buffers": noise_buffers,
    }
    return plugins.required(KIND, name, plugins.call(KIND, name, plugins.load(KIND, name), settings, {}))
