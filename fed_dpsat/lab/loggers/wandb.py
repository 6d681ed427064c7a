"""Weights & Biases: one run, online or, with ``WANDB_MODE=offline``, in the folder ``wandb`` of the run folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fed_dpsat.lab.loggers.base import kept_id, need, public_settings, scalars
from fed_dpsat.settings.config import RunConfig


class WeightsAndBiases:
    """Weights & Biases, online or with WANDB_MODE=offline; needs fed-dpsat[wandb].

    It logs a row per round, and settings as config; a resumed run keeps its id.

    W&B reads ``WANDB_MODE``, ``WANDB_ENTITY`` and its other variables; the default of ``WANDB_PROJECT`` is fed-dpsat.
    The logger sends nothing about the machine (host name, command, code, console, hardware).
    """

    def __init__(self) -> None:
        self.wandb = need("wandb", "wandb")

    def begin(self, config: RunConfig, folder: Path, next_round: int) -> None:
        kept = kept_id(folder, "wandb")
        kept.parent.mkdir(exist_ok=True)
        if not kept.exists():
            kept.write_text(os.urandom(4).hex())
        self.run = self.wandb.init(
            project=os.environ.get("WANDB_PROJECT", "fed-dpsat"),
            id=kept.read_text(),
            resume="allow",
            name=folder.name,
            dir=str(folder),
            config=public_settings(config),
            settings=self.wandb.Settings(
                console="off",
                silent=True,
                save_code=False,
                disable_git=True,
                disable_code=True,
                host="",
                x_disable_meta=True,
                x_disable_stats=True,
                x_disable_machine_info=True,
                x_save_requirements=False,
            ),
        )

    def round(self, record: Mapping[str, Any]) -> None:
        self.run.log(scalars(record), step=record["round"])

    def end(self, summary: Mapping[str, Any]) -> None:
        self.run.summary.update({key: value for key, value in summary.items() if key != "phases"})
        self.run.finish(exit_code=0 if summary["status"] == "completed" else 1)


LOGGERS = {"wandb": WeightsAndBiases}
