"""Flat settings: TOML, ``--set key=value`` and Flower's run config have the same names and values."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fed_dpsat.errors import SettingError
from fed_dpsat.left import successor
from fed_dpsat.settings.combinations import Settings
from fed_dpsat.settings.paths import beside
from fed_dpsat.settings.values import Scalar

SPECS = {spec.name: spec for spec in dataclasses.fields(Settings)}
"""Every setting by its name, in order."""
ELSEWHERE = {
    "batch_size": "sample_rate: a batch is a Poisson sample; expected size / number of examples of a client",
    "client_resources": "threads_per_client and gpus_per_worker",
    "epochs": "local_epochs, or local_steps",
    "fraction_train": "clients_per_round, a number of clients",
    "learning_rate": "lr",
    "local_batch_size": "sample_rate: a batch is a Poisson sample; expected size / number of examples of a client",
    "max_grad_norm": "clip_norm",
    "max_physical_batch_size": "physical_batch_size",
    "min_available_nodes": "join_timeout, the time until all clients must have joined",
    "min_train_nodes": "min_clients",
    "num_supernodes": "num_clients",
    "target_delta": "delta",
}
"""What has another name in Flower or Opacus, and its name here."""


def read_toml(path: Path) -> dict[str, Any]:
    """The values of a TOML file; raises ``SettingError`` for a file that cannot be read or is no TOML."""
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise SettingError("config", str(path), "a readable file", error.strerror or "check the path") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingError("config", str(path), "valid TOML", str(error)) from None


def read_settings(path: Path) -> dict[str, Any]:
    """``read_toml`` of a file of settings, whose relative paths are relative to the file."""
    return beside(read_toml(path), path.parent, SPECS.values())


def to_toml(settings: Mapping[str, Scalar]) -> str:
    """``settings`` as TOML, with the documentation of each as a comment."""
    return "".join(f"{name} = {_toml(value)}  # {SPECS[name].metadata['doc']}\n" for name, value in settings.items())


def parse_overrides(overrides: Iterable[str]) -> dict[str, Scalar]:
    """``key=value`` strings as settings, typed; raises ``SettingError`` for a string of another form."""
    values = {}
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise SettingError("--set", override, "of the form key=value", "for example --set lr=2.0")
        values[key.strip()] = _parse(key.strip(), text.strip())
    return values


def check_names(values: Mapping[str, Any]) -> None:
    """Raise ``SettingError`` for a key that is no setting; the error gives the nearest names."""
    for key in values:
        if key not in SPECS:
            near = difflib.get_close_matches(key, SPECS, n=3)
            hint = f"did you mean {', '.join(near)}?" if near else "`fed-dpsat run --help-all` lists them"
            hint = f"it is {ELSEWHERE[key]}" if key in ELSEWHERE else hint
            raise SettingError(key, values[key], "a setting", successor(key) or hint)


def _parse(key: str, text: str) -> Scalar:
    if key in SPECS and SPECS[key].type == "str":
        quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" and text.count(text[0]) == 2
        return text[1:-1] if quoted else text
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return value if isinstance(value, bool | int | float | str) else text


def _toml(value: Scalar) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return repr(value)
