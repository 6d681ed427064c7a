"""The records of rounds: lines of ``rounds.jsonl`` and ``timing.jsonl``, loggers, checkpoints and the summary."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from logging import INFO, getLogger
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fed_dpsat.accounting import epsilon
from fed_dpsat.accounting.before import history_before
from fed_dpsat.accounting.evaluations import evaluation_history, is_evaluated
from fed_dpsat.accounting.event import UNITS
from fed_dpsat.accounting.ledger import Head
from fed_dpsat.client.build import Experiment
from fed_dpsat.client.evaluation import (
    Evaluation,
    Predictions,
    evaluate,
    measured,
    measured_on,
    metrics_of,
    quality_of,
    shown,
)
from fed_dpsat.client.personal import summarised
from fed_dpsat.client.private_metrics import released_metrics
from fed_dpsat.flower import sums
from fed_dpsat.flower.grid import SimulationGrid
from fed_dpsat.flower.inner import StrategyStateError
from fed_dpsat.flower.metrics import ServerMetrics
from fed_dpsat.flower.nodes import FederationError
from fed_dpsat.flower.private_evaluation import PrivateEvaluation
from fed_dpsat.flower.strategy import PrivateStrategy
from fed_dpsat.flower.updates import KnownNoise
from fed_dpsat.flower.wire import records
from fed_dpsat.params import Params
from fed_dpsat.run.folder import Checkpoint, RunFolder, jsonable
from fed_dpsat.run.loggers import Loggers
from fed_dpsat.run.logs import FIELDS
from fed_dpsat.run.outsider import epsilon_of_outsider
from fed_dpsat.run.promise import also_released, declared_public, delta_warning, threat_model
from fed_dpsat.run.throughput import Throughput
from fed_dpsat.step.averaging import ModelAverage
from fed_dpsat.step.noise import NOISE_SOURCES
from fed_dpsat.tasks.metric import Value

log = getLogger("fed_dpsat")

Summary = dict[str, Any]
RoundRecord = dict[str, Any]
OnRound = Callable[[RoundRecord], None]
"""A function that receives the record of each round; ``timing`` in it is the line of ``timing.jsonl``."""


class Recorder:
    """Evaluates after each round, asks the ledger, writes the record and the checkpoint, and calls ``on_round``."""

    def __init__(
        self,
        experiment: Experiment,
        strategy: PrivateStrategy,
        folder: RunFolder,
        on_round: OnRound | None,
        loggers: Loggers,
        known_noise: KnownNoise | None = None,
        grid: Grid | None = None,
        metrics: ServerMetrics | None = None,
        by_clients: PrivateEvaluation | None = None,
    ) -> None:
        self.experiment, self.strategy, self.folder, self.on_round = experiment, strategy, folder, on_round
        self.loggers, self.known_noise, self.metrics = loggers, known_noise, metrics
        self.by_clients, self.noised = by_clients, dict[str, Any]()
        self.grid = grid if experiment.has_own_models and isinstance(grid, SimulationGrid) else None
        self.evaluation: Evaluation | None = None
        self.personal: dict[str, float | int] = {}
        self.average: ModelAverage | None = None
        self.averaged: Evaluation | None = None
        if (config := experiment.config).averaging:
            self.average = ModelAverage(
                kind=config.averaging, decay=config.averaging_decay, models=config.averaging_models
            )
        self.quality_at: tuple[int, Evaluation, Predictions | None] | None = None
        self._before: Params | None = None
        self.rounds_completed = 0
        self.ended_early: str | None = None
        self.cannot_resume = ""
        self.redone = False
        self.throughput = Throughput(experiment, strategy.plans, strategy.phases)

    def epsilon(self) -> float:
        """The epsilon spent so far, the maximum over clients."""
        config = self.experiment.config
        return self.strategy.ledger.epsilon(config.delta, config.accountant)

    def after_round(self, round: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Flower's ``evaluate_fn``: called with the aggregated model after each round, and before the first round."""
        config, report = self.experiment.config, self.strategy.report
        params = records.to_params(arrays)
        due = is_evaluated(config, round)
        with self.strategy.phases("evaluate"):
            self.noised = {}
            self.evaluation = self._evaluate(round, params) if due else None
            self._add_to_average(round, params)
            self.averaged = self._evaluate_average() if due else None
            if self.grid and due:
                self.personal = measure_personal(self.grid, arrays, self.experiment)
        with self.strategy.phases("account"):
            record: RoundRecord = {
                "round": round,
                **self._tested(),
                **self._tested_average(),
                **self.noised,
                **(self.personal if due else {}),
                "epsilon": self.epsilon(),
                "asked": report.asked,
                **({} if report.tossed is None else {"tossed": report.tossed}),
                "accepted": len(report.accepted),
                "dropped": report.dropped,
                "unexpected": report.unexpected,
                "retired": report.retired,
                "released": report.released,
                "kept_model": report.kept_model and self.strategy.release is None,
                **({} if report.simulated_seconds is None else {"simulated_seconds": report.simulated_seconds}),
                **({} if report.arrived is None else {"arrived": report.arrived}),
                **self._movement(round, params),
            }
            self.rounds_completed = round
            timing = self.throughput.of_round(round, report.asked, report.accepted, report.bytes_down, report.bytes_up)
            self.folder.append_round(record, timing)
            if log.isEnabledFor(INFO):
                fields = jsonable({**record, "timing": timing})
                log.info("round %d of %d", round, config.num_rounds, extra={FIELDS: fields})
            if self.metrics:
                self.metrics.after_round(self.strategy, timing)
            self._save_checkpoint(round, params)
        if self.loggers:
            with self.strategy.phases("log"):
                self.loggers.round(jsonable({**record, "timing": timing}))
        if self.on_round:
            self.on_round({**record, "timing": timing})
        return None

    def begin_again(self, checkpoint: Checkpoint) -> ArrayRecord:
        """Restore the state of ``checkpoint``; returns the model to continue with.

        Raises ``LedgerError`` for a ledger without a charge that the checkpoint has seen, ``FederationError`` if the
        checkpoint has no state of the strategy.
        """
        if checkpoint.cannot_resume:
            raise FederationError(f"{self.folder.path} cannot be resumed: {checkpoint.cannot_resume}")
        self.strategy.ledger.check_extends(Head(*checkpoint.server["ledger_head"]), f"at round {checkpoint.round}")
        same_noise = NOISE_SOURCES[self.experiment.config.noise_source].reproducible
        begun = bool(self.strategy.ledger.attempts(checkpoint.round + 1))
        self.redone = not same_noise and (begun or checkpoint.server.get("redone", True))
        self.rounds_completed = checkpoint.round
        self._before = checkpoint.params
        if self.average:
            self.average.state = checkpoint.server["averaging"]
        self.folder.cut_off(checkpoint.round)
        self.strategy.load_state_dict(
            checkpoint.server["strategy"],
            next_round=checkpoint.round + 1,
            same_noise=same_noise,
        )
        return records.to_arrays(checkpoint.params)

    def begin_logging(self) -> None:
        """Start the loggers; they receive the complete rounds that a kill kept from them."""
        if not self.loggers:
            return
        begun = self.folder.rounds()
        next_round = self.loggers.begin(self.experiment.config, self.folder.path, len(begun) - 1)
        for record, timing in zip(begun[next_round:], self.folder.timing()[next_round:], strict=True):
            self.loggers.round({**record, "timing": timing})

    def _evaluate(self, round: int, params: Params) -> Evaluation | None:
        of = self.experiment
        if self.by_clients:
            noised = self.by_clients(round, params, redone=self.redone)
            if noised is None:
                return None
            self.noised = {"intervals": noised.intervals, "evaluation": noised.details}
            return Evaluation(values=noised.values, loss=noised.loss, num_examples=sum(map(len, of.held)))
        found, predictions = measured(of.loss_fn.module, params, of.dataset.test, of.task)
        self.quality_at = round, found, predictions
        return found

    def _tested(self) -> dict[str, Value | None]:
        """``test_accuracy`` and the like, None in a round without an evaluation."""
        names = released_metrics(self.experiment.config) if self.by_clients else shown(self.experiment.task)
        return _tested(self.evaluation, names, "test")

    def _add_to_average(self, round: int, params: Params) -> None:
        if self.average:
            self.average.add(round, params, self.experiment.shared(round) if round else {})

    def _evaluate_average(self) -> Evaluation | None:
        if self.average is None:
            return None
        of = self.experiment
        return evaluate(of.loss_fn.module, self.average.value, of.dataset.test, of.task)

    def _tested_average(self) -> dict[str, Value | None]:
        """As ``_tested``, of the average: ``averaged_test_accuracy`` and the like; empty without one."""
        return _tested(self.averaged, shown(self.experiment.task), "averaged_test") if self.average else {}

    def _movement(self, round: int, params: Params) -> dict[str, float | None]:
        """The norms of the change of the global model and of the noise in it; both are public.

        ``noise_norm`` is the root of the expected square of the noise in the mean by size; None if it is unknown.
        """
        before, self._before = self._before, params
        if before is not None and before.keys() != params.keys():  # layers joined with their frozen values
            before = {**self.experiment.shared(round), **before}
        accepted = self.strategy.report.accepted
        if not round or before is None:
            return {"update_norm": None, "noise_norm": None}
        # numpy adds in one order, whatever the number of threads: the same bits on each machine
        squared = sum(float(np.square((p - before[name]).double().numpy()).sum()) for name, p in params.items())
        noise, size = None, sum(p.numel() for p in params.values())
        if release := self.strategy.release:  # of the server, also without a reply
            mechanism = release.mechanism
            of_one = mechanism.noise_multiplier * mechanism.clip_norm / mechanism.expected_batch_size
            noise = math.sqrt(size) * of_one
        elif accepted and self.known_noise:
            sizes = [self.experiment.sizes[client] for client in accepted]
            events = [self.strategy.plans[client].event for client in accepted]
            variances = [self.known_noise.variance(e, n, round) for e, n in zip(events, sizes, strict=True)]
            of_mean = math.fsum(n**2 * v for n, v in zip(sizes, variances, strict=True)) / sum(sizes) ** 2
            noise = math.sqrt(size * of_mean)
        return {"update_norm": math.sqrt(squared), "noise_norm": noise}

    def quality(self) -> Summary | None:
        """The quality of the model of the last evaluation, for ``quality.json``."""
        if self.quality_at is None:
            return None
        dataset, task = self.experiment.dataset, self.experiment.task
        round, found, predictions = self.quality_at
        of_classes: dict[str, Any] = {"num_examples": found.num_examples}
        if predictions is not None:
            of_classes = dataclasses.asdict(quality_of(predictions, dataset.num_classes))
        return {
            "round": round,
            "measured_on": f"{measured_on(self.experiment.config)} of {dataset.name}",
            "class_names": dataset.class_names,
            **of_classes,
            "metrics": found.values if predictions is None else metrics_of(predictions, task),
        }

    def _save_checkpoint(self, round: int, params: Params) -> None:
        server: dict[str, Any] = {
            "ledger_head": tuple(self.strategy.ledger.head),
            "redone": self.redone,
            **({"averaging": self.average.state} if self.average else {}),
        }
        try:
            server["strategy"] = self.strategy.state_dict()
        except StrategyStateError as error:
            if not self.cannot_resume:
                log.warning("this run cannot be resumed: %s", error)
            self.cannot_resume = str(error)
        self.folder.save_checkpoint(
            Checkpoint(round=round, params=params, server=server, cannot_resume=self.cannot_resume)
        )

    def _beside_training(self) -> Summary:
        """What statistics before training, and all evaluations by clients, cost alone; nothing if there are none."""
        config = self.experiment.config
        costs = {"statistics_epsilon": history_before(config), "evaluation_epsilon": evaluation_history(config)}
        return {name: epsilon(paid, config.delta, config.accountant) for name, paid in costs.items() if paid}

    def _last_noised(self) -> Summary:
        """The metrics of the last evaluation by clients, as its line has them: a summary is no further release."""
        lines = [line for line in self.folder.rounds() if "intervals" in line]
        if not lines:
            return {f"test_{name}": None for name in (*released_metrics(self.experiment.config), "loss")}
        kept = {name: value for name, value in lines[-1].items() if name.startswith("test_")}
        return {**kept, "intervals": lines[-1]["intervals"]}

    def end_early(self, reason: str) -> None:
        """Note the reason why the run ends before its last round."""
        log.warning("the run ends: %s", reason)
        self.ended_early = reason

    def summary(self, status: str) -> Summary:
        """The state of the run, for ``summary.json``."""
        config, inner = self.experiment.config, self.strategy.inner
        if self.by_clients:
            tested = self._last_noised()
        elif status == "completed" and self.evaluation is None:  # ended early, or resumed at its end
            saved = self.folder.load_checkpoint()
            assert saved is not None  # after_round leaves one, also before the first round
            self.evaluation = self._evaluate(saved.round, saved.params)
            self.averaged = self._evaluate_average()
        return {
            "status": status,
            "ended_early": self.ended_early,
            **(tested if self.by_clients else self._tested()),
            **self._tested_average(),
            **({"averaging": config.averaging} if config.averaging else {}),
            "task": config.task,
            "metric": dataclasses.asdict(self.experiment.task.metrics[0]),
            **self.personal,
            "evaluated_on": config.evaluated_on,
            "epsilon": self.epsilon(),
            **self._beside_training(),
            "delta": config.delta,
            **({"delta_warning": warning} if (warning := delta_warning(self.experiment)) else {}),
            "accountant": config.accountant,
            "noise_distribution": config.noise_distribution,
            "noise_mechanism": config.noise_mechanism,
            "noise_multiplier": min(plan.event.noise_multiplier for plan in self.strategy.plans),
            "clip_norm": self.experiment.clipping.clip_norm,
            "sample_rate": config.sample_rate,
            "local_steps": config.steps_per_round,
            "rounds_completed": self.rounds_completed,
            "num_clients": config.num_clients,
            "unused_examples": self.experiment.unused_examples,
            "optimizer": config.optimizer,
            "base_optimizer": config.base_optimizer,
            "optimizer_args": config.optimizer_args,
            "strategy": config.strategy,
            "update_codec": config.update_codec,
            "dataset": config.dataset,
            "model": config.model,
            "model_args": config.model_args,
            "start_from": config.start_from,
            "start_sha256": self.experiment.start.sha256,
            "features": config.features,
            "features_sha256": config.features_sha256,
            "train_layers": config.train_layers,
            "adapter": config.adapter,
            "trained_parameters": sum(p.numel() for p in self.experiment.trained(config.num_rounds).values()),
            "seed": config.seed,
            **self.throughput.of_run(),
            "retired": self.strategy.retired,
            "ledger_head": self.strategy.ledger.head._asdict(),
            "privacy_unit": UNITS[config.privacy_unit],
            **epsilon_of_outsider(
                self.experiment,
                self.strategy.plans,
                self.folder.rounds(),
                status=status,
                redone=self.redone,
                retired=bool(self.strategy.retired),
                shows_single="" if sums.only_mean(inner) else type(inner).__name__,
            ),
            "threat_model": threat_model(config),
            "declared_public": declared_public(config),
            "also_released": also_released(config, personal=self.grid is not None),
            "noise": NOISE_SOURCES[config.noise_source].description,
        }


def _tested(found: Evaluation | None, names: Sequence[str], prefix: str) -> dict[str, Value | None]:
    values = found.values if found else dict.fromkeys(names)
    return {f"{prefix}_{name}": values[name] for name in names} | {f"{prefix}_loss": found and found.loss}


def measure_personal(grid: SimulationGrid, arrays: ArrayRecord, experiment: Experiment) -> dict[str, float | int]:
    """``summarised`` metrics of all clients that have a share of the test split, with the head that each keeps.

    A client that never trained has the initial head. Raises ``FederationError`` if a client fails.
    """
    content, found = RecordDict({records.ARRAYS: arrays}), dict[int, float]()
    messages = [
        Message(content, node, MessageType.EVALUATE)
        for node in grid.nodes_by_client(experiment.config.num_clients).values()
    ]
    for reply in grid.stream(messages):
        node = reply.metadata.src_node_id
        if reply.has_error():
            raise FederationError(f"node {node} could not evaluate its own model: {reply.error.reason}")
        metrics = reply.content.metric_records[records.METRICS]
        if metrics[records.NUM_EXAMPLES]:
            found[node] = float(metrics[records.METRIC])  # type: ignore[arg-type]
    return summarised(found, experiment.task.metrics[0])
