"""Where else a run is written: TensorBoard, MLflow, Weights & Biases or a logger of your own; off by default."""

from fed_dpsat.lab.loggers.base import RunLogger, public_settings, scalars
from fed_dpsat.lab.loggers.fan_out import Loggers

__all__ = ["Loggers", "RunLogger", "public_settings", "scalars"]
