"""Loggers to TensorBoard, MLflow and Weights & Biases, or your own; off by default."""

from fed_dpsat.lab.loggers.base import public_settings, scalars
from fed_dpsat.run.loggers import RunLogger

__all__ = ["RunLogger", "public_settings", "scalars"]
