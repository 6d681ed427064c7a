"""Where else a run is written: TensorBoard, MLflow, Weights & Biases or a logger of your own; off by default."""

from fed_dpsat.lab.loggers.base import public_settings, scalars
from fed_dpsat.run.loggers import RunLogger

__all__ = ["RunLogger", "public_settings", "scalars"]
