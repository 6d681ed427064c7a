"""TensorBoard: event files in the folder ``tensorboard`` of the run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fed_dpsat.lab.loggers.base import need, public_settings, scalars
from fed_dpsat.settings.config import RunConfig


class TensorBoard:
    """TensorBoard event files in the run folder; needs fed-dpsat[tensorboard].

    It writes a point per round and scalar; a resumed run hides the old points of its repeated rounds.
    """

    def __init__(self) -> None:
        self.open = need("torch.utils.tensorboard", "tensorboard").SummaryWriter

    def begin(self, config: RunConfig, folder: Path, next_round: int) -> None:
        path = folder / "tensorboard"
        self.writer = self.open(str(path), purge_step=next_round if path.exists() else None)
        self._text("config", public_settings(config), next_round)

    def round(self, record: Mapping[str, Any]) -> None:
        for name, value in scalars(record).items():
            self.writer.add_scalar(name, value, record["round"])
        self.writer.flush()

    def end(self, summary: Mapping[str, Any]) -> None:
        self._text("summary", summary, summary["rounds_completed"])
        self.writer.close()

    def _text(self, name: str, values: Mapping[str, Any], step: int) -> None:
        lines = json.dumps(values, indent=2).splitlines()
        self.writer.add_text(name, "\n".join(f"    {line}" for line in lines), step)


LOGGERS = {"tensorboard": TensorBoard}
