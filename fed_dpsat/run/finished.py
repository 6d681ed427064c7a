"""The model of a run, built again from its folder and loaded with the parameters of its last checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from fed_dpsat.client.build import Experiment
from fed_dpsat.errors import RunError, SettingError
from fed_dpsat.run.folder import Checkpoint, RunFolder


def read_run(run: Path, *, again: str) -> tuple[Experiment, Checkpoint]:
    """The objects of the run in the folder ``run``, on the CPU, with the whole training split, and its checkpoint.

    Raises ``SettingError`` for a folder without a run, for a run with objects from Python, and if a file that it read
    has changed, for which ``again`` is a remedy; ``RunError`` without a checkpoint.
    """
    folder = RunFolder(run, resume=True)
    if objects := folder.objects():
        raise SettingError("run", str(run), "described by its settings alone", f"it was given {', '.join(objects)}")
    folder.check_files(setting="run", value=str(run), again=again)
    checkpoint = folder.load_checkpoint()
    if checkpoint is None:
        raise RunError(f"{run} has no checkpoint; resume it to the end of a round")
    public = dataclasses.replace(folder.config(), device="cpu", gpus_per_worker=0.0, validation_share=0.0)
    return Experiment.build(public), checkpoint
