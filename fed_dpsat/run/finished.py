"""The model of a run, built again from its folder and loaded with the parameters of its last checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import nn

from fed_dpsat.client.build import Experiment
from fed_dpsat.client.fingerprint import unsent
from fed_dpsat.client.given import copied
from fed_dpsat.client.start import begin
from fed_dpsat.data.federated import seeded
from fed_dpsat.errors import RunError, SettingError
from fed_dpsat.params import Params
from fed_dpsat.run.folder import Checkpoint, RunFolder
from fed_dpsat.run.inputs import CONTENTS
from fed_dpsat.step.averaging import value_of


def read_run(run: Path, *, again: str) -> tuple[Experiment, Checkpoint]:
    """The objects of the run in the folder ``run``, on the CPU, with the whole training split, and its checkpoint.

    Raises ``SettingError`` for a folder without a run, for a run with objects from Python, and if a file that it read
    has changed, for which ``again`` is a remedy; ``RunError`` without a checkpoint.
    """
    folder = RunFolder(run, resume=True)
    if objects := folder.objects():
        remedy = f"it was given {', '.join(objects)}; in Python, load_run(...).model(network) takes the network"
        raise SettingError("run", str(run), "described by its settings alone", remedy)
    folder.check_files(setting="run", value=str(run), again=again)
    checkpoint = _checkpoint(folder)
    public = dataclasses.replace(folder.config(), device="cpu", gpus_per_worker=0.0, validation_share=0.0)
    return Experiment.build(public), checkpoint


def trained(run: Path, *, again: str, averaged: bool = False) -> Experiment:
    """As ``read_run``, with the parameters of the checkpoint, or the average of models, in the model of the experiment.

    Raises also ``SettingError`` for a run without one model for all clients, and ``RunError`` if the frozen layers that
    were built again are not those of the run.
    """
    _check_one_model(RunFolder(run, resume=True))
    experiment, checkpoint = read_run(run, again=again)
    _check_frozen(run, experiment.contents["model"])
    _fill(experiment.loss_fn.module, _average(run, checkpoint) if averaged else checkpoint.params)
    return experiment


def trained_copy(run: Path, module: nn.Module, *, begun: bool, averaged: bool = False) -> nn.Module:
    """A copy of ``module`` on the CPU with the parameters of the checkpoint of ``run``, or the average of its models.

    ``module`` is the network that was given to the run, or, if ``begun``, the one that the run made of it. Raises
    ``SettingError`` for another network, and the errors of ``trained`` about the run.
    """
    folder, copy = RunFolder(run, resume=True), copied("model", module).cpu()
    _check_one_model(folder)
    checkpoint = _checkpoint(folder)
    params = _average(run, checkpoint) if averaged else checkpoint.params
    if not begun:
        config = folder.config()
        with seeded(config, "adapter"):
            copy, start = begin(copy, config)
        _check_names(run, copy, params)
        _check_frozen(run, unsent(copy, start.names))
    _fill(copy, params)
    return copy


def _average(run: Path, checkpoint: Checkpoint) -> Params:
    if (state := checkpoint.server.get("averaging")) is None:
        raise SettingError(
            "averaged", True, f"possible: {run} has no average", "leave it out, or train with averaging=ema"
        )
    return value_of(state)


def _fill(module: nn.Module, params: Params) -> None:
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name in params:
                p.copy_(params[name])


def _checkpoint(folder: RunFolder) -> Checkpoint:
    if (found := folder.load_checkpoint()) is None:
        raise RunError(f"{folder.path} has no checkpoint; resume it to the end of a round")
    return found


def _check_one_model(folder: RunFolder) -> None:
    if layers := folder.config().personal_layers:
        bound = f"a run with one model: personal_layers={layers!r} stay with its clients"
        raise SettingError("run", str(folder.path), bound, "take a run that shares all layers")


def _check_names(run: Path, module: nn.Module, params: Params) -> None:
    own = {name: p.shape for name, p in module.named_parameters()}
    for name, p in params.items():
        if own.get(name) != p.shape:
            found = f"has {list(own[name])}" if name in own else "has no such parameter"
            raise SettingError(
                "model",
                type(module).__name__,
                f"the network of {run}: {name} is {list(p.shape)} there, and it {found}",
                "give the network that was given to simulate",
            )


def _check_frozen(run: Path, digest: str) -> None:
    if digest not in {one.sha256 for one in RunFolder(run, resume=True).inputs() if one.name == CONTENTS["model"]}:
        raise RunError(f"{run}: the frozen layers of its model are other ones when they are built again")
