"""Ditto: each client trains a model of its own beside the global one, and keeps it near (Li et al. 2021).

*Reason*: clients whose data differ want different models; few examples each want a common one. The weight ``mu`` of
``mu / 2 |v - w|^2`` chooses between local training (0) and the global model w (large). Source: Ditto, arXiv 2012.04221,
Algorithm 1.

*Cost*: a client trains twice on its data, so a round has ``2 * local_steps`` private steps and its event says so: noise
for a ``target_epsilon`` is that of twice the steps. The term of ``mu`` is added after the noise and costs nothing.

*Bias*: the model of a client is that of a regularised loss. ``mu`` times ``lr`` has to stay below 2.
"""

from __future__ import annotations

from collections.abc import Sequence

from flwr.serverapp.strategy import FedAvg

from fed_dpsat.client.half import ClientHalf, Finished, Received, Trained
from fed_dpsat.params import Params
from fed_dpsat.step.optimizers.base import State
from fed_dpsat.step.optimizers.proximal import pulled

OWN = "own"


class DittoClient(ClientHalf):
    """Trains the global model, which it sends, and then its own, which it keeps and uses."""

    models = 2

    def __init__(self, mu: float) -> None:
        self.mu = mu

    def start(self, received: Received, state: State) -> Sequence[Params]:
        """The global model, and the client's own; the own one begins as the global one."""
        return received.params, state.get(OWN, received.params)

    def correct(self, model: int, private_gradient: Params, params: Params, received: Received, state: State) -> Params:
        """The own model is pulled to the global one, as it was sent."""
        return pulled(private_gradient, params, received.params, self.mu) if model == 1 else private_gradient

    def finish(self, received: Received, trained: Sequence[Trained], state: State) -> Finished:
        """Send the first model, keep the second."""
        return Finished(params=trained[0].params, state={OWN: trained[1].params})

    def own_model(self, params: Params, state: State) -> Params:
        """The own model; the global one before the client's first round."""
        own: Params = state.get(OWN, params)
        return own


class Ditto(FedAvg):
    """Ditto: FedAvg, and a model of each client's own at a distance that mu sets; twice the steps (Li et al. 2021)."""

    only_mean = True

    def __init__(self, mu: float = 0.1) -> None:
        super().__init__()
        self.client_half = DittoClient(mu)


STRATEGIES = {"ditto": Ditto}
