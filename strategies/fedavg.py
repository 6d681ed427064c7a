"""Federated averaging (McMahan et al. 2017)."""

from __future__ import annotations

from flwr.serverapp.strategy import FedAvg


def fedavg() -> FedAvg:
    """FedAvg: the mean of the models of clients, weighted by their public sizes (McMahan et al. 2017)."""
    return FedAvg()


STRATEGIES = {"fedavg": fedavg}
