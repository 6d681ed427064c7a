"""DP-SCAFFOLD: control variates against the drift of clients with different data (Noble, Bellet and Dieuleveut 2022).

*Reason*: between two rounds, steps of a client move towards its own optimum. A client adds ``c - c_k`` to each private
gradient: c_k is the mean of its private gradients in its last round, and c the mean of c_k over all clients. Source:
arXiv 2111.09278, Algorithm 1 at the level of records; SCAFFOLD is arXiv 1910.06378.

*Cost*: c_k is made of private gradients, so it is post-processing, and a round costs what it costs without it. Replies
and messages are twice as large, and c_k has the noise of one round.

*Bias*: models and control variates of clients have the same weight, whatever their size. The change of a client whose
reply is lost stays out of c.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from fed_dpsat.client.half import ClientHalf, Finished, Received, Records, Trained
from fed_dpsat.flower.wire import records
from fed_dpsat.params import Params, subtract, zeros_like
from fed_dpsat.step.optimizers.base import State

CONTROL = "control"


class ScaffoldClient(ClientHalf):
    """Corrects each private gradient by the control variates, and sends the change of its own one."""

    def sends(self, params: Params) -> Records:
        """The change of the client's control variate, one number for each parameter."""
        return {CONTROL: params}

    def receives(self, params: Params) -> Records:
        """The mean of the control variates over all clients."""
        return {CONTROL: params}

    def correct(self, model: int, private_gradient: Params, params: Params, received: Received, state: State) -> Params:
        """The private gradient minus the client's control variate plus the mean one."""
        common, own = received.records[CONTROL], state.get(CONTROL)
        without = subtract(private_gradient, own) if own else private_gradient
        return {name: g + common[name] for name, g in without.items()}

    def finish(self, received: Received, trained: Sequence[Trained], state: State) -> Finished:
        """The control variate is the mean private gradient of this round; that of no round is 0."""
        after = trained[0].mean_gradient
        change = subtract(after, state[CONTROL]) if state else after
        return Finished(params=trained[0].params, records={CONTROL: change}, state={CONTROL: after})


class DPScaffold(FedAvg):
    """DP-SCAFFOLD: control variates of noised gradients against the drift of clients (Noble et al. 2022)."""

    def __init__(self, num_clients: int) -> None:
        super().__init__()
        self.client_half = ScaffoldClient()
        self.num_clients, self.control = num_clients, ArrayRecord()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """FedAvg's messages with the mean control variate, which is 0 at the start."""
        if not self.control:
            self.control = records.to_arrays(zeros_like(records.to_params(arrays)))
        messages = list(super().configure_train(server_round, arrays, config, grid))
        for message in messages:
            message.content[CONTROL] = self.control
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The mean of the models; the control variate moves by the sum of the changes over ``num_clients``."""
        contents = [reply.content for reply in replies]
        if not contents:
            return None, None
        models, changes = (
            [records.to_params(content.array_records[key]) for content in contents] for key in (records.ARRAYS, CONTROL)
        )
        share = len(contents) / self.num_clients
        change = _mean(changes)
        before = records.to_params(self.control)
        self.control = records.to_arrays({name: (c + share * change[name]).to(c) for name, c in before.items()})
        return records.to_arrays(_mean(models)), None


def _mean(each: Sequence[Params]) -> Params:
    """The mean of float tensors; the first of whole numbers, which are not trained."""
    return {
        name: torch.stack([one[name] for one in each]).mean(0) if first.is_floating_point() else first
        for name, first in each[0].items()
    }


STRATEGIES = {"dp-scaffold": DPScaffold}
