"""Evaluation on the clients' held-out examples: charge, add up, add noise.

A simulation computes here what each client would: the sum of its examples' vectors and, with the unit "example", its
noise. A charge is on disk before a number is made. A round that is repeated after a kill:

=================================== ======================================================================
the line of the round is            the evaluation
=================================== ======================================================================
not in ``rounds.jsonl``             released nothing: the charge that is there pays for it
there, with seeded noise            is the same release: the charge that is there pays for it
there, with system noise            is another release, of another model: a charge of its own, for the
                                    clients that can afford it; without any, the round has no evaluation
=================================== ======================================================================
"""

from __future__ import annotations

import logging
import math

import numpy as np
import torch

from fed_dpsat.accounting import epsilon
from fed_dpsat.accounting.evaluations import evaluation_event
from fed_dpsat.accounting.ledger import EVALUATIONS
from fed_dpsat.client.build import Experiment
from fed_dpsat.client.evaluation import batches
from fed_dpsat.client.private_metrics import Noised, lines_of, metrics_of_totals, vectors_of
from fed_dpsat.client.totals import Floats, noise_of_totals, noised_totals, weights_of
from fed_dpsat.flower.roster import Roster
from fed_dpsat.params import Params

log = logging.getLogger("fed_dpsat")


class PrivateEvaluation:
    """The evaluations of a run; ``seen`` is the last round whose line was written before a resume."""

    def __init__(self, experiment: Experiment, roster: Roster, seen: int = 0) -> None:
        self.experiment, self.roster, self.ledger, self.seen = experiment, roster, roster.ledger, seen
        self.event = evaluation_event(experiment.config)

    def __call__(self, round: int, params: Params, *, redone: bool) -> Noised | None:
        """Metrics of ``params`` after ``round``; None if no client can afford it.

        With ``redone``, releases of repeated rounds have cost more than was planned, so budgets are looked at.
        """
        of, config = self.experiment, self.experiment.config
        charged = self.ledger.attempts(round, first=EVALUATIONS)
        attempt = max(charged.values(), default=EVALUATIONS)
        if charged and round <= self.seen and config.noise_source == "system":
            attempt += 1
        clients = np.array(sorted(client for client, last in charged.items() if last == attempt), dtype=np.int64)
        if not len(clients):
            clients = self._able() if redone else np.arange(config.num_clients)
        if not len(clients):
            log.warning("round %d has no evaluation: no client has budget left for it", round)
            return None
        self.ledger.charge_many(round, attempt, [(clients, self.event)])
        if redone:
            self.roster.paid_more(clients)
        added = self._contributions(params, clients)
        z = self.event.noise_multiplier
        totals = noised_totals(added, z, config, "evaluation", round=round, attempt=attempt - EVALUATIONS)
        count = sum(len(of.held[client]) for client in clients) if config.privacy_unit == "example" else None
        noise = noise_of_totals(len(added), z, config)
        return metrics_of_totals(totals, noise, config, of.task.outputs, count)

    def _able(self) -> np.ndarray:
        """The clients whose budget has room for one more evaluation."""
        config = self.experiment.config
        budget = config.target_epsilon or math.inf
        found = [
            some
            for some, history in self.ledger.histories_of(range(config.num_clients)).groups()
            if epsilon([*history, self.event], config.delta, config.accountant) <= budget
        ]
        return np.sort(np.concatenate([np.empty(0, np.int64), *found]))

    def _contributions(self, params: Params, clients: np.ndarray) -> dict[str, Floats]:
        """By line, ``[num_clients, d]``; zeros of all but ``clients``."""
        of, config = self.experiment, self.experiment.config
        held = [of.held[client] for client in clients]
        indices = torch.from_numpy(np.concatenate(held))
        owners = torch.from_numpy(np.repeat(clients, [len(part) for part in held]))
        vectors, sums = vectors_of(config, of.task), dict[str, torch.Tensor]()
        for places, outputs, targets in batches(
            of.loss_fn.module, params, of.dataset.train, of.task.batch_size, indices
        ):
            for line, one in vectors(outputs, targets).items():
                if line not in sums:
                    sums[line] = torch.zeros(config.num_clients, one.shape[1], dtype=torch.float64)
                sums[line].index_add_(0, owners[places], one)
        sizes = np.array([len(part) for part in of.held], dtype=np.float64)
        weights = weights_of(sizes, config)[:, None]
        return {line: sums[line].numpy() * weights for line in lines_of(config)}
