from __future__ import annotations

import pytest
import torch

from fed_dpsat import DPSAT, DPSGD, RunConfig, simulate
from fed_dpsat.step.optimizers.proximal import Proximal
from fed_dpsat.testing.problems import step_info

ANCHOR = {"w": torch.tensor([1.0, 2.0])}


def test_the_step_is_pulled_towards_the_anchor():
    """At w = anchor + (2, -2), lr 0.5, mu 0.1 and no gradient: w moves by -0.5 * 0.1 * (2, -2)."""
    optimizer = Proximal(base=DPSGD(lr=0.5), anchor=ANCHOR, proximal_mu=0.1)
    w = {"w": ANCHOR["w"] + torch.tensor([2.0, -2.0])}
    moved, _ = optimizer.update(w, {"w": torch.zeros(2)}, optimizer.init(w), step_info())
    assert torch.allclose(moved["w"] - w["w"], torch.tensor([-0.1, 0.1]))


def test_at_the_anchor_it_is_the_base():
    base = DPSAT(base=DPSGD(lr=0.5), rho=0.1)
    g = {"w": torch.tensor([3.0, -1.0])}
    found, _ = Proximal(base=base, anchor=ANCHOR, proximal_mu=0.1).update(ANCHOR, g, base.init(ANCHOR), step_info())
    expected, _ = base.update(ANCHOR, g, base.init(ANCHOR), step_info())
    assert torch.equal(found["w"], expected["w"])


@pytest.mark.slow
def test_stock_fedprox_reaches_the_clients(tmp_path):
    """With one local step it is FedAvg; with more it is not."""

    def loss(steps: int, mu: float) -> float:
        config = RunConfig(
            num_clients=2, num_rounds=2, local_steps=steps, noise_multiplier=1.0,
            strategy="flwr.serverapp.strategy:FedProx", strategy_args=f"proximal_mu = {mu}",
        )  # fmt: skip
        return simulate(config, tmp_path / f"{steps}-{mu}")["test_loss"]

    assert loss(1, 0.0) == loss(1, 0.5)
    assert loss(3, 0.0) != loss(3, 0.5)
