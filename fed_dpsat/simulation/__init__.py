"""Many clients on one machine or a Ray cluster, behind Flower's grid."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flwr.serverapp.strategy import Strategy
from torch import nn

from fed_dpsat.config import RunConfig
from fed_dpsat.data.dataset import Dataset
from fed_dpsat.experiment import Experiment
from fed_dpsat.flower import client_app
from fed_dpsat.flower.federation import OnRound, Summary, run_federation
from fed_dpsat.flower.grid import Backend, SimulationGrid
from fed_dpsat.optimizers.base import PrivateOptimizer
from fed_dpsat.process import tune_allocator
from fed_dpsat.run_folder import RunFolder
from fed_dpsat.simulation.in_process import InProcessBackend


def simulate(
    config: RunConfig,
    out: str | Path,
    *,
    dataset: Dataset | None = None,
    model: nn.Module | None = None,
    optimizer: PrivateOptimizer | None = None,
    strategy: Strategy | None = None,
    on_round: OnRound | None = None,
) -> Summary:
    """Train the federation that ``config`` describes and leave a run folder at ``out``.

    An object that is given stands in for what ``config`` names. ``on_round`` is called with each line of
    ``rounds.jsonl``. Returns what ``summary.json`` holds; raises what ``Experiment.build`` and
    ``run_federation`` raise.
    """
    folder = RunFolder(Path(out))
    if config.tune_malloc:
        tune_allocator()
    config = config.with_absolute_paths()
    experiment = Experiment.build(config, dataset=dataset, model=model, optimizer=optimizer)
    with simulation_grid(experiment) as grid:
        return run_federation(grid, experiment, folder, strategy=strategy, on_round=on_round)


@contextmanager
def simulation_grid(experiment: Experiment) -> Iterator[SimulationGrid]:
    """A grid of ``num_clients`` nodes, in this process or on ``workers`` Ray workers; closed at the end."""
    config = experiment.config
    backend = _backend(experiment)
    grid = SimulationGrid(backend, config.num_clients)
    try:
        yield grid
    finally:
        grid.close()


def _backend(experiment: Experiment) -> Backend:
    config = experiment.config
    settings, nodes = config.settings(), config.num_clients
    own_app = client_app.make_client_app(lambda _: experiment)
    if config.workers == 0:
        return InProcessBackend(own_app, settings, nodes)
    from fed_dpsat.simulation.ray_backend import RayBackend  # seconds to import: only runs with workers pay

    return RayBackend(client_app.app if experiment.named else own_app, settings, nodes, config.workers)
