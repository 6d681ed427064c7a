"""Flower's server handler and nothing else."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fed_dpsat.flower.client_app import from_run_config
from fed_dpsat.flower.federation import run_federation
from fed_dpsat.flower.trial import try_federation
from fed_dpsat.run.folder import RunFolder

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """One run, in ``out`` or in the folder ``runs/flower-<run id>`` below the working directory of Flower.

    With ``resume`` the run in ``out`` continues. A failure in a trial on made-up examples ends it before any charge.
    """
    experiment = from_run_config(context.run_config)
    config = experiment.config
    folder = Path(config.out or f"runs/flower-{context.run_id}")
    run_folder = RunFolder(folder, resume=config.resume)
    try_federation(experiment)
    run_federation(grid, experiment, run_folder)
