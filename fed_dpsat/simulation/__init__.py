"""Many clients on one machine or on a Ray cluster, behind the grid of Flower."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import Strategy
from torch import nn

from fed_dpsat.client.build import Experiment
from fed_dpsat.client.given import refuse_names
from fed_dpsat.client.half import half_of, with_half
from fed_dpsat.data.dataset import Dataset
from fed_dpsat.errors import InputError, RunError, SettingError
from fed_dpsat.flower import client_app as client_app_module
from fed_dpsat.flower.federation import run_federation
from fed_dpsat.flower.grid import Backend, SimulationGrid
from fed_dpsat.flower.recorder import OnRound, RoundRecord
from fed_dpsat.flower.trial import try_federation
from fed_dpsat.flower.wire import compat
from fed_dpsat.run.bar import progress_bar
from fed_dpsat.run.folder import RunFolder, fresh, how_to_continue
from fed_dpsat.run.process import tune_allocator
from fed_dpsat.run.reading import load_run
from fed_dpsat.run.result import Run
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.settings.values import Scalar
from fed_dpsat.simulation.faults import Faults
from fed_dpsat.simulation.in_process import InProcessBackend
from fed_dpsat.simulation.state import kept_rounds
from fed_dpsat.step import generators
from fed_dpsat.step.clipping import ClippingRule
from fed_dpsat.step.optimizers.base import PrivateOptimizer
from fed_dpsat.tasks.base import Task


def simulate(
    config: RunConfig,
    out: str | Path | None = None,
    *,
    dataset: Dataset | None = None,
    partition: Sequence[Any] | None = None,
    task: Task | None = None,
    model: nn.Module | None = None,
    optimizer: PrivateOptimizer | None = None,
    clipping: ClippingRule | None = None,
    strategy: Strategy | None = None,
    client_app: ClientApp | None = None,
    on_round: OnRound | None = None,
    progress: bool = True,
    overwrite: bool = False,
) -> Run:
    """Train the federation of ``config`` and write a run folder; returns the run, as ``load_run`` reads it.

    The folder is ``out``, else the ``out`` of ``config``, else a new one, ``runs/DATASET-TIME``; ``path`` of the result
    names it. With ``progress``, a terminal and a notebook show a bar.

    With ``config.resume`` the run at ``out`` continues from its last checkpoint; give its objects again. With
    ``overwrite`` an earlier run at ``out`` is deleted, with its ledger, when this one begins (``run.folder.prepare``).

    An object replaces the one that ``config`` names, and ``client_app`` replaces the code of the clients. A
    ``partition`` is a list of indices of training examples for each client. The run calls
    ``on_round`` with each line of ``rounds.jsonl``. Raises the errors of ``Experiment.build`` and ``run_federation``.
    """
    if not isinstance(config, RunConfig):
        remedy = "RunConfig.load(FILE) reads a TOML file, RunConfig(num_rounds=5, ...) takes settings"
        raise SettingError("config", f"a {type(config).__name__}", "a RunConfig", remedy)
    named = str(out or config.out)
    if config.resume and not named:
        raise SettingError("resume", True, "possible without the folder of a run", "name it as out")
    path = Path(named) if named else fresh(dataset.name if isinstance(dataset, Dataset) else config.dataset)
    folder = RunFolder(path, resume=config.resume, overwrite=overwrite)
    if config.resume:
        folder.check_version(setting="resume", value=True, again="start a new run")
        folder.check_files(setting="resume", value=True, again="start a new run")
    if config.tune_malloc:
        tune_allocator()
    config = config.with_absolute_paths()
    given: dict[str, Any] = {"dataset": dataset, "partition": partition, "task": task, "model": model}
    given |= {"optimizer": optimizer, "clipping": clipping}
    refuse_names(**given, strategy=strategy)
    experiment = Experiment.build(with_half(config, strategy), **given, half=half_of(strategy))
    given |= {"strategy": strategy, "client_app": client_app}
    objects = [name for name, value in given.items() if value is not None]
    try_federation(experiment, strategy, objects)
    with (
        _told_how_to_continue(path),
        _shown(experiment, on_round, progress) as show,
        compat.without_info(),
        generators.returned(),  # Flower draws from random
        simulation_grid(experiment, client_app, folder) as grid,
    ):
        run_federation(grid, experiment, folder, strategy=strategy, on_round=show, objects=objects)
    return dataclasses.replace(load_run(path), module=experiment.loss_fn.module)


@contextmanager
def _told_how_to_continue(path: Path) -> Iterator[None]:
    """Add to an error, and to an interruption, what is in ``path`` and how the run goes on."""
    try:
        yield
    except BaseException as error:
        with suppress(InputError, RunError, OSError, ValueError):  # the error that ended the run is the one to show
            error.add_note(how_to_continue(path))
        raise


@contextmanager
def _shown(experiment: Experiment, on_round: OnRound | None, progress: bool) -> Iterator[OnRound | None]:
    """Yield the function that shows a round in a bar, with ``progress``, and calls ``on_round``."""
    if not progress:
        yield on_round
        return
    with progress_bar(experiment.config.num_rounds, experiment.task.metrics[0]) as show:

        def both(record: RoundRecord) -> None:
            show(record)
            if on_round:
                on_round(record)

        yield both


def resume(
    run: str | Path | Run,
    *,
    overrides: Mapping[str, Scalar] | None = None,
    on_round: OnRound | None = None,
    progress: bool = True,
) -> Run:
    """Continue ``run``, or the run in that folder; ``overrides`` may change settings of the machine, or extend it.

    For a complete run without changed settings it changes nothing. Raises ``SettingError`` for a folder without a
    run, for a run with objects from Python, and for settings that cannot change (``run.extension``).
    """
    path = run.path if isinstance(run, Run) else Path(run)
    folder = RunFolder(path, resume=True)
    if objects := folder.objects():
        raise SettingError(
            "run",
            str(path),
            "described by its settings alone",
            f"{', '.join(objects)} came from Python; give them again, to simulate(RunConfig(..., resume=True), ...)",
        )
    begun = folder.config()
    config = RunConfig.from_mapping({**begun.settings(), "resume": True, **(overrides or {})})
    folder.check_settings(config.with_absolute_paths())
    summary, extended = folder.summary(), config.num_rounds > begun.num_rounds
    if summary.get("status") == "completed" and not extended:
        for name, value in (overrides or {}).items():
            if getattr(begun, name) != value:
                remedy = f"a larger num_rounds extends it: --set num_rounds={begun.num_rounds + 1}"
                raise SettingError(name, value, f"of any effect in {run}, which is complete", remedy)
        return load_run(path)
    return simulate(config, path, on_round=on_round, progress=progress)


@contextmanager
def simulation_grid(
    experiment: Experiment, client_app: ClientApp | None = None, folder: RunFolder | None = None
) -> Iterator[SimulationGrid]:
    """A grid of ``num_clients`` nodes, in this process or on ``workers`` Ray workers; closed after the block.

    The states of clients go into ``folder``; without a folder they last as long as the grid.
    """
    backend, config = _backend(experiment, client_app, folder), experiment.config
    seconds = faults.waited if (faults := Faults.of(config)) and config.delay != "none" else None
    grid = SimulationGrid(backend, config.num_clients, seconds=seconds)
    try:
        yield grid
    finally:
        grid.close()


def _backend(experiment: Experiment, client_app: ClientApp | None, folder: RunFolder | None) -> Backend:
    config = experiment.config
    settings, nodes = config.settings(), config.num_clients
    checkpoint = folder.load_checkpoint() if folder and folder.resumes else None
    state_folder = folder.state_path.absolute() if folder else None  # a worker has a current folder of its own
    kept = kept_rounds(state_folder, checkpoint.round) if state_folder and checkpoint else {}
    faults = Faults.of(config)
    if config.workers == 0:
        app = client_app or client_app_module.make_client_app(lambda _: experiment)
        return InProcessBackend(app, settings, nodes, state_folder=state_folder, kept=kept, faults=faults)
    from fed_dpsat.simulation.ray_backend import RayBackend  # takes seconds to import

    built_there = client_app is None and experiment.named
    if client_app is None:
        client_app = client_app_module.app if built_there else client_app_module.make_client_app(lambda _: experiment)
    return RayBackend(
        client_app,
        settings,
        nodes,
        config.workers,
        address=config.ray_address,
        state_folder=state_folder,
        kept=kept,
        faults=faults,
        client_timeout=config.client_timeout,
        gpus_per_worker=config.gpus_per_worker,
        fingerprint=experiment.fingerprint if built_there else "",
    )
