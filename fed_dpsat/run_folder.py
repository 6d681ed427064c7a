"""A run is a folder: everything a reader needs to believe the number is in it, written as the run goes.

================== ===========================================================================
file               content
================== ===========================================================================
config.toml        every setting, as resolved
environment.json   versions, machine and command
rounds.jsonl       one line per round, whole at any time
ledger.sqlite      every charge, durable before the message that it pays for
checkpoint/        the model after the last round
summary.json       how it ended
================== ===========================================================================
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fed_dpsat.config import RunConfig
from fed_dpsat.errors import SettingError
from fed_dpsat.params import Params

PACKAGES = ("fed-dpsat", "torch", "torchvision", "flwr", "ray", "dp-accounting", "opacus", "numpy", "randomgen")


class RunFolder:
    """The files of one run under ``path``. Raises ``SettingError`` if something else is there already."""

    def __init__(self, path: Path) -> None:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise SettingError("out", str(path), "a new or an empty folder", "name another with --out")
        self.path = path

    @property
    def ledger_path(self) -> Path:
        """Where the ledger lies."""
        return self.path / "ledger.sqlite"

    @property
    def checkpoint_path(self) -> Path:
        """Where the model lies; ``torch.load(..., weights_only=True)`` reads it."""
        return self.path / "checkpoint" / "model.pt"

    def open(self, config: RunConfig) -> None:
        """Create the folder and say what runs in it."""
        self.checkpoint_path.parent.mkdir(parents=True, exist_ok=True)
        (self.path / "config.toml").write_text(dataclasses.replace(config, out="").to_toml())
        environment = {
            "command": sys.argv,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "packages": {name: version(name) for name in PACKAGES},
        }
        _write_atomically(self.path / "environment.json", _json(environment, indent=2) + "\n")

    def append_round(self, record: Mapping[str, Any]) -> None:
        """One line, in one write."""
        line = (_json(record) + "\n").encode()
        descriptor = os.open(self.path / "rounds.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, line)
        finally:
            os.close(descriptor)

    def save_model(self, params: Params, round: int) -> None:
        """The model after ``round``, replacing the one before."""
        temporary = self.checkpoint_path.with_suffix(".tmp")
        torch.save({"round": round, "params": params}, temporary)
        os.replace(temporary, self.checkpoint_path)

    def load_model(self) -> Params:
        """The model that was saved last."""
        params: Params = torch.load(self.checkpoint_path, weights_only=True)["params"]
        return params

    def close(self, summary: Mapping[str, Any]) -> None:
        """How it ended."""
        _write_atomically(self.path / "summary.json", _json(summary, indent=2) + "\n")


def jsonable(value: Any) -> Any:
    """``value`` with what JSON cannot hold as text: inf is "inf", NaN is "nan"."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(jsonable(value), indent=indent, allow_nan=False)


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
