"""MLflow: one run, in the store and experiment that the environment variables of MLflow name."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fed_dpsat.lab.loggers.base import kept_id, need, public_settings, scalars
from fed_dpsat.settings.config import RunConfig

STATUS = {"completed": "FINISHED", "interrupted": "KILLED"}


class MLflow:
    """MLflow, at MLFLOW_TRACKING_URI; needs fed-dpsat[mlflow].

    It logs a metric per round and scalar, and settings as parameters; a resumed run keeps its id.

    MLflow reads ``MLFLOW_TRACKING_URI``; the default of ``MLFLOW_EXPERIMENT_NAME`` is fed-dpsat.
    """

    def __init__(self) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read at import
        self.mlflow = need("mlflow", "mlflow")

    def begin(self, config: RunConfig, folder: Path, next_round: int) -> None:
        self.client, kept = self.mlflow.MlflowClient(), kept_id(folder, "mlflow")
        if kept.exists():
            self.run_id = kept.read_text()
            self.client.update_run(self.run_id, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "fed-dpsat")
        experiment = self.client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self.client.create_experiment(name)
        self.run_id = self.client.create_run(experiment_id, run_name=folder.name).info.run_id
        settings = [self.mlflow.entities.Param(key, str(value)) for key, value in public_settings(config).items()]
        self.client.log_batch(self.run_id, params=settings)
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(self.run_id)

    def round(self, record: Mapping[str, Any]) -> None:
        now = int(1000 * time.time())
        metric = self.mlflow.entities.Metric
        metrics = [metric(name, value, now, record["round"]) for name, value in scalars(record).items()]
        self.client.log_batch(self.run_id, metrics=metrics)

    def end(self, summary: Mapping[str, Any]) -> None:
        self.client.log_dict(self.run_id, dict(summary), "summary.json")
        self.client.set_terminated(self.run_id, STATUS.get(summary["status"], "FAILED"))


LOGGERS = {"mlflow": MLflow}
