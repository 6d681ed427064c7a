"""MR-MTL: each client trains a model of its own, pulled to the mean of all (Liu, Hu, Wu and Smith 2022).

*Reason*: a client that continues from its own model pays once for its data, where Ditto pays twice. The weight ``mu``
of ``mu / 2 |v - w|^2`` chooses between local training (0) and one model w for all (large); with more privacy noise a
larger ``mu`` is better, because the mean of clients has less noise. Source: arXiv 2206.07902, Algorithm 1; the mean is
weighted by size here.

*Bias*: a client's model is that of a regularised loss. ``mu`` times ``lr`` has to stay below 2.
"""

from __future__ import annotations

from collections.abc import Sequence

from flwr.serverapp.strategy import FedAvg

from fed_dpsat.client.half import ClientHalf, Finished, Received, Trained
from fed_dpsat.params import Params
from fed_dpsat.step.optimizers.base import State
from fed_dpsat.step.optimizers.proximal import pulled

OWN = "own"


class MRMTLClient(ClientHalf):
    """Continues from its own model, which is pulled to the mean; sends it and keeps it."""

    def __init__(self, mu: float) -> None:
        self.mu = mu

    def start(self, received: Received, state: State) -> Sequence[Params]:
        """The client's model of its last round; the global one in its first."""
        return [state.get(OWN, received.params)]

    def correct(self, model: int, private_gradient: Params, params: Params, received: Received, state: State) -> Params:
        """Pulled to the mean of the models of clients, as it was sent."""
        return pulled(private_gradient, params, received.params, self.mu)

    def finish(self, received: Received, trained: Sequence[Trained], state: State) -> Finished:
        """Send and keep the model."""
        return Finished(params=trained[0].params, state={OWN: trained[0].params})

    def own_model(self, params: Params, state: State) -> Params:
        """The client's model; the global one before its first round."""
        own: Params = state.get(OWN, params)
        return own


class MRMTL(FedAvg):
    """MR-MTL: a model for each client, pulled to the mean of all with the weight mu (Liu et al. 2022)."""

    only_mean = True

    def __init__(self, mu: float = 0.1) -> None:
        super().__init__()
        self.client_half = MRMTLClient(mu)


STRATEGIES = {"mr-mtl": MRMTL}
