"""The server's side of a run: strategy, ledger, evaluation and run folder around Flower's loop."""

from __future__ import annotations

import dataclasses
import math
import resource
import time
from collections import Counter
from collections.abc import Callable, Sequence
from logging import getLogger
from statistics import fmean
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fed_dpsat import plugins
from fed_dpsat.config import RunConfig
from fed_dpsat.errors import SettingError
from fed_dpsat.evaluation import Evaluation, Predictions, evaluation_of, predict, quality_of
from fed_dpsat.experiment import Experiment
from fed_dpsat.flower import personal, records
from fed_dpsat.flower.buffered import Buffer
from fed_dpsat.flower.client_release import ClientRelease
from fed_dpsat.flower.grid import SimulationGrid
from fed_dpsat.flower.nodes import FederationError, FederationOver
from fed_dpsat.flower.strategy import PrivateStrategy
from fed_dpsat.flower.strategy_state import StrategyStateError
from fed_dpsat.flower.updates import KnownNoise
from fed_dpsat.loggers import Loggers
from fed_dpsat.noise import NOISE_SOURCES
from fed_dpsat.params import Params
from fed_dpsat.plans import make_plans
from fed_dpsat.privacy import LedgerError
from fed_dpsat.privacy.event import UNITS
from fed_dpsat.privacy.ledger import Head, PrivacyLedger
from fed_dpsat.privacy.released import ASSUMPTIONS, epsilon_released
from fed_dpsat.run_folder import Checkpoint, RunFolder, jsonable
from fed_dpsat.timing import Phases

log = getLogger("fed_dpsat")

Summary = dict[str, Any]
RoundRecord = dict[str, Any]
OnRound = Callable[[RoundRecord], None]
"""Called after each round with its lines of ``rounds.jsonl`` and, under ``timing``, of ``timing.jsonl``."""

PERSONAL_RELEASED = (
    "accuracy of clients' own models on shares of the public test split that follow their label counts: exact, not "
    "covered by epsilon, and a figure of simulations alone"
)
COUNTS_RELEASED = "examples without a finite gradient, per client and round: exact, not covered by epsilon"
DECLARED_PUBLIC = ("number of examples of each client", "number of clients", "who takes part in which round")
TRUSTED_SERVER = (
    "someone who sees every released model; the server is trusted: it sees each client's bounded change and adds noise"
)


def threat_model(config: RunConfig) -> str:
    """Whom epsilon is against, as it is printed beside it."""
    if config.privacy_unit == "example":
        return "a server that sees every update; no amplification by client sampling"
    if config.client_sampling == "poisson":
        return f"{TRUSTED_SERVER}; who was drawn, the seed and the run folder stay with it"
    return f"{TRUSTED_SERVER}; who takes part is known, no amplification by client sampling"


def declared_public(config: RunConfig) -> tuple[str, ...]:
    """What no epsilon covers, by declaration: a client's size and its coins are not, where the unit is the client."""
    if config.privacy_unit == "example":
        return DECLARED_PUBLIC
    return DECLARED_PUBLIC[1:2] if config.client_sampling == "poisson" else DECLARED_PUBLIC[1:]


MAX_LABEL_COUNTS = 10**6


class Recorder:
    """Turns rounds into lines: evaluates, asks the ledger, writes, and tells whoever watches."""

    def __init__(
        self,
        experiment: Experiment,
        strategy: PrivateStrategy,
        folder: RunFolder,
        on_round: OnRound | None,
        loggers: Loggers,
        known_noise: KnownNoise | None = None,
        grid: Grid | None = None,
    ) -> None:
        self.experiment, self.strategy, self.folder, self.on_round = experiment, strategy, folder, on_round
        self.loggers, self.known_noise = loggers, known_noise
        self.grid = grid if experiment.personal and isinstance(grid, SimulationGrid) else None
        self.evaluation: Evaluation | None = None
        self.personal: dict[str, float | int] = {}
        self.predictions: tuple[int, Predictions] | None = None
        self._before: Params | None = None
        self.rounds_completed = 0
        self.ended_early: str | None = None
        self.cannot_resume = ""
        self.phases: Counter[str] = Counter()
        self.clients = self.examples = 0.0
        self.bytes: list[tuple[int, int]] = []
        self.started = self._round_started = time.perf_counter()

    def epsilon(self) -> float:
        """Spent so far, the maximum over clients."""
        config = self.experiment.config
        return self.strategy.ledger.epsilon(config.delta, config.accountant)

    def after_round(self, round: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Flower's ``evaluate_fn``: called with the aggregated model after each round, and before the first."""
        config, report = self.experiment.config, self.strategy.report
        params = records.to_params(arrays)
        due = round % config.evaluate_every == 0 or round == config.num_rounds
        with self.strategy.phases("evaluate"):
            self.evaluation = self._evaluate(round, params) if due else None
            if self.grid and due:
                self.personal = personal.measure(self.grid, arrays, config.num_clients)
        with self.strategy.phases("account"):
            record: RoundRecord = {
                "round": round,
                "test_accuracy": self.evaluation.accuracy if self.evaluation else None,
                "test_loss": self.evaluation.loss if self.evaluation else None,
                **(self.personal if due else {}),
                "epsilon": self.epsilon(),
                "asked": report.asked,
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
            timing = self._timing(round)
            self.folder.append_round(record, timing)
            if self.loggers:  # before the checkpoint: a round that is logged twice is better than one never
                with self.strategy.phases("log"):
                    self.loggers.round(jsonable({**record, "timing": timing}))
            self._save_checkpoint(round, params)
        if self.on_round:
            self.on_round({**record, "timing": timing})
        return None

    def begin_again(self, checkpoint: Checkpoint) -> ArrayRecord:
        """Stand where ``checkpoint`` was made; the model to go on with.

        Raises ``LedgerError`` for a ledger that does not hold what was charged until then, ``FederationError`` where
        the server's state could not be kept.
        """
        if checkpoint.cannot_resume:
            raise FederationError(f"{self.folder.path} cannot be resumed: {checkpoint.cannot_resume}")
        if checkpoint.server.get("start_sha256", "") != self.experiment.start.sha256:
            raise FederationError(
                f"{self.experiment.config.start_from} is not the file that {self.folder.path} started from; restore it"
            )
        head = Head(*checkpoint.server["ledger_head"])
        if not self.strategy.ledger.extends(head):
            raise LedgerError(
                f"{self.folder.ledger_path} does not hold the {head.charges} charges that were in it at round "
                f"{checkpoint.round}: it is an older copy, or another run's; restore the right one"
            )
        self.rounds_completed = checkpoint.round
        self._before = checkpoint.params
        self.folder.cut_off(checkpoint.round)
        self.strategy.load_state_dict(
            checkpoint.server["strategy"],
            next_round=checkpoint.round + 1,
            same_noise=NOISE_SOURCES[self.experiment.config.noise_source].reproducible,
        )
        return records.to_arrays(checkpoint.params)

    def _evaluate(self, round: int, params: Params) -> Evaluation:
        self.predictions = round, predict(self.experiment.loss_fn.module, params, self.experiment.dataset.test)
        return evaluation_of(self.predictions[1])

    def _movement(self, round: int, params: Params) -> dict[str, float | None]:
        """How far the global model went, and how far the noise alone in it was to take it: both public.

        ``noise_norm`` is the root of the expected square, of the mean of the replies by size; None where it is unknown.
        """
        before, self._before = self._before, params
        if before is not None and before.keys() != params.keys():  # layers joined, from where they were frozen
            before = {**self.experiment.shared(round), **before}
        accepted = self.strategy.report.accepted
        if not round or before is None:
            return {"update_norm": None, "noise_norm": None}
        # numpy adds in one order, whatever the number of threads: the same bits on each machine
        squared = sum(float(np.square((p - before[name]).double().numpy()).sum()) for name, p in params.items())
        noise, size = None, sum(p.numel() for p in params.values())
        if release := self.strategy.release:  # the server's own, also where nobody replied
            mechanism = release.mechanism
            of_one = mechanism.noise_multiplier * mechanism.clip_norm / mechanism.expected_batch_size
            noise = math.sqrt(size) * of_one
        elif accepted and self.known_noise:
            sizes = [len(self.experiment.partitions[client]) for client in accepted]
            events = [self.strategy.plans[client].event for client in accepted]
            variances = [self.known_noise.variance(e, n, round) for e, n in zip(events, sizes, strict=True)]
            of_mean = math.fsum(n**2 * v for n, v in zip(sizes, variances, strict=True)) / sum(sizes) ** 2
            noise = math.sqrt(size * of_mean)
        return {"update_norm": math.sqrt(squared), "noise_norm": noise}

    def quality(self) -> Summary | None:
        """Of the model that was evaluated last, on the public test split, for ``quality.json``."""
        if self.predictions is None:
            return None
        dataset, held_out = self.experiment.dataset, self.experiment.config.validation_share
        split = "validation examples held out of the training split" if held_out else "public test split"
        round, predictions = self.predictions
        return {
            "round": round,
            "measured_on": f"{split} of {dataset.name}",
            "class_names": dataset.class_names,
            **dataclasses.asdict(quality_of(predictions, dataset.num_classes)),
        }

    def _save_checkpoint(self, round: int, params: Params) -> None:
        server: dict[str, Any] = {
            "ledger_head": tuple(self.strategy.ledger.head),
            "start_sha256": self.experiment.start.sha256,
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

    def _timing(self, round: int) -> dict[str, Any]:
        """Seconds by phase since the last round (the checkpoint of a round is in the next line), and throughput.

        Examples are those that are expected to be drawn: how many were drawn is not public.
        """
        now = time.perf_counter()
        seconds, self._round_started = now - self._round_started, now
        accepted, experiment = self.strategy.report.accepted, self.experiment
        of_clients = experiment.config.privacy_unit == "client"  # whose sizes are not public
        examples = (
            0.0
            if of_clients
            else sum(
                plan.event.steps * plan.event.sample_rate * len(experiment.partitions[client])
                for client, plan in ((client, self.strategy.plans[client]) for client in accepted)
            )
        )
        phases = self.strategy.phases.take()
        self.phases.update(phases)
        self.clients, self.examples = self.clients + len(accepted), self.examples + examples
        down, up = self.strategy.report.bytes_down, self.strategy.report.bytes_up
        self.bytes += [(down, up)] if round else []
        return {
            "round": round,
            "seconds": seconds,
            "phases": phases,
            "bytes_down": down,
            "bytes_up": up,
            "clients_per_second": len(accepted) / seconds,
            "examples_per_second": examples / seconds,
            "peak_memory_mb": _peak_memory_mb(),
        }

    def _released(self) -> Summary:
        """Epsilon against someone who sees the released models alone, where each client has a coin of its own.

        Not given where clients carry state from round to round: a later update would tell of an earlier coin.
        """
        config, rounds = self.experiment.config, self.rounds_completed
        unlike = config.client_sampling != "poisson" or config.privacy_unit != "example"
        if unlike or not rounds or self.experiment.carried_state():
            return {}
        events = {plan.event for plan in self.strategy.plans}
        epsilons = [
            epsilon_released(event, rounds, config.client_rate, config.delta, config.accountant) for event in events
        ]
        return {"epsilon_released": max(epsilons), "epsilon_released_assumptions": ASSUMPTIONS}

    def _totals(self) -> Summary:
        """Time and throughput of this process; a resumed run counts from there."""
        seconds = time.perf_counter() - self.started
        return {
            "seconds": seconds,
            "phases": dict(self.phases),
            "bytes_per_round": self._bytes_per_round(),
            "clients_per_second": self.clients / seconds,
            "examples_per_second": self.examples / seconds,
            "peak_memory_mb": _peak_memory_mb(),
        }

    def _bytes_per_round(self) -> dict[str, float]:
        """Of all clients together: models and what goes with them down, valid updates up, as they were written."""
        return {way: fmean(sent[at] for sent in self.bytes) for at, way in enumerate(("down", "up")) if self.bytes}

    def end_early(self, reason: str) -> None:
        """The run is over before its last round: say why."""
        log.warning("the run ends: %s", reason)
        self.ended_early = reason

    def summary(self, status: str) -> Summary:
        """How the run stands, for ``summary.json``."""
        config = self.experiment.config
        if status == "completed" and self.evaluation is None:  # ended early, or resumed at its end
            saved = self.folder.load_checkpoint()
            assert saved is not None  # after_round leaves one, also before the first round
            self.evaluation = self._evaluate(saved.round, saved.params)
        return {
            "status": status,
            "ended_early": self.ended_early,
            "test_accuracy": self.evaluation.accuracy if self.evaluation else None,
            "test_loss": self.evaluation.loss if self.evaluation else None,
            **self.personal,
            "evaluated_on": "validation" if config.validation_share else "test",
            "epsilon": self.epsilon(),
            "delta": config.delta,
            "accountant": config.accountant,
            "noise_multiplier": min(plan.event.noise_multiplier for plan in self.strategy.plans),
            "clip_norm": self.experiment.clipping.clip_norm,
            "sample_rate": config.sample_rate,
            "local_steps": config.steps_per_round,
            "rounds_completed": self.rounds_completed,
            "num_clients": config.num_clients,
            "optimizer": config.optimizer,
            "base_optimizer": config.base_optimizer,
            "optimizer_args": config.optimizer_args,
            "strategy": config.strategy,
            "update_codec": config.update_codec,
            "dataset": config.dataset,
            "model": config.model,
            "start_from": config.start_from,
            "start_sha256": self.experiment.start.sha256,
            "train_layers": config.train_layers,
            "trained_parameters": sum(p.numel() for p in self.experiment.trained(config.num_rounds).values()),
            "seed": config.seed,
            **self._totals(),
            "retired": self.strategy.retired,
            "ledger_head": self.strategy.ledger.head._asdict(),
            "privacy_unit": UNITS[config.privacy_unit],
            **self._released(),
            "threat_model": threat_model(config),
            "declared_public": declared_public(config),
            "also_released": [
                *([COUNTS_RELEASED] if config.release_counts else []),
                *([PERSONAL_RELEASED] if self.grid else []),
            ],
            "noise": NOISE_SOURCES[config.noise_source].description,
        }


def run_federation(
    grid: Grid,
    experiment: Experiment,
    folder: RunFolder,
    *,
    strategy: Strategy | None = None,
    on_round: OnRound | None = None,
    objects: Sequence[str] = (),
) -> Summary:
    """Train over the nodes of ``grid``; returns what ``summary.json`` holds.

    A ``folder`` that resumes goes on after its last checkpoint, to the same bits as if it had never been
    interrupted (with system noise: to a run of the same account, plus what the interrupted round had cost).

    Raises ``FederationError`` when clients do not join or all fail. Whatever ends the run, also Ctrl-C, the
    folder is left readable with a summary whose ``status`` says so.
    """
    config = experiment.config
    plans = make_plans(config)
    _warn_about_delta(experiment)
    inner = strategy or build_strategy(config)
    if strategy is not None and config.unfreeze_round:
        raise SettingError(
            "unfreeze_round",
            config.unfreeze_round,
            "possible with a strategy that was given as an object",
            "name it, so that it can begin anew with all layers",
        )
    loggers = Loggers.of(config)
    folder.open(config, objects=objects)
    if isinstance(grid, SimulationGrid) and not folder.resumes:
        folder.save_simulation(*_holdings(experiment))
    checkpoint = folder.load_checkpoint() if folder.resumes else None
    phases = Phases(trace=config.profile)
    if isinstance(grid, SimulationGrid) and config.profile:
        grid.on_span = lambda span: phases.add_span(
            f"client {span.client}", span.worker + 1, span.started, span.seconds
        )
    with PrivacyLedger(folder.ledger_path, must_exist=checkpoint is not None) as ledger:
        private = PrivateStrategy(
            inner,
            ledger,
            plans=plans,
            delta=config.delta,
            accountant=config.accountant,
            cohort_size=config.cohort_size,
            max_rounds_per_client=config.rounds_per_client,
            seed=config.seed,
            client_sampling=config.client_sampling,
            min_clients=config.min_clients,
            release_counts=config.release_counts,
            send_ascent=config.ascent_memory == "server",
            join_timeout=config.join_timeout,
            secure_threshold=config.secure_threshold if config.secure_aggregation else 0.0,
            release=ClientRelease.of(config, plans[0].event.noise_multiplier),
            buffer=_buffer(config),
            phases=phases,
            within=experiment.subspace,
        )
        recorder = Recorder(experiment, private, folder, on_round, loggers, _noise_of_mean(config, objects), grid)
        arrays = records.to_arrays(experiment.shared(1))
        if checkpoint is not None:
            arrays = recorder.begin_again(checkpoint)
        elif folder.resumes:
            folder.cut_off(-1)
        loggers.begin(config, folder.path, checkpoint.round + 1 if checkpoint else 0)
        status = "failed"
        try:
            private.start(
                grid,
                arrays,
                config.num_rounds,
                config.reply_timeout,
                evaluate_fn=recorder.after_round,
                done=checkpoint.round if checkpoint else None,
                before_round=lambda round, arrays: _unfrozen(experiment, private, round, arrays),
            )
            status = "completed"
        except FederationOver as reason:
            status = "completed"
            recorder.end_early(str(reason))
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        finally:
            summary = recorder.summary(status)
            if (quality := recorder.quality()) is not None:
                folder.save_quality(quality)
            folder.close(summary)
            loggers.end(jsonable(summary))
            if config.profile:
                phases.write_trace(
                    folder.trace_path,
                    ["server", "clients, here", *(f"worker {i}" for i in range(1, config.workers + 1))],
                )
    return summary


def _unfrozen(experiment: Experiment, private: PrivateStrategy, round: int, arrays: ArrayRecord) -> ArrayRecord:
    """The model with the layers that ``round`` trains; those that are new to it start where they were frozen.

    The inner strategy begins anew with them: what it has learned of the head alone has another shape.
    """
    if not experiment.config.unfreeze_round or arrays.keys() == (trained := experiment.shared(round)).keys():
        return arrays
    private.renew(build_strategy(experiment.config))
    return records.to_arrays({**trained, **records.to_params(arrays)})


def build_strategy(config: RunConfig) -> Strategy:
    """The inner strategy that ``config`` names; raises ``PluginError`` or ``FederationError`` if it is none."""
    settings = {**config.settings(), "known_noise": KnownNoise.of(config)}
    inner = plugins.build("strategy", config.strategy, settings, config.strategy_args)
    if not isinstance(inner, Strategy):
        raise FederationError(f"strategy={config.strategy!r} made a {type(inner).__name__}, not a Flower Strategy")
    return inner


def _buffer(config: RunConfig) -> Buffer | None:
    if not config.buffer_size:
        return None
    return Buffer(
        size=config.buffer_size,
        in_flight=config.cohort_size,
        staleness_exponent=config.staleness_exponent,
        seed=config.seed,
    )


def _noise_of_mean(config: RunConfig, objects: Sequence[str]) -> KnownNoise | None:
    """What is known of the noise in a round's global step; None unless that is the mean of honest SGD steps."""
    known = KnownNoise.of(config)
    other_step = config.attack or config.strategy != "fedavg" or set(objects) - {"dataset", "model"}
    return None if known.unknown or other_step or config.unfreeze_round else known


def _holdings(experiment: Experiment) -> tuple[list[int], list[list[int]] | None]:
    """Examples per client, and per client and class; those only where they stay a file of a few megabytes."""
    partitions, num_classes = experiment.partitions, experiment.dataset.num_classes
    sizes = [len(indices) for indices in partitions]
    if len(sizes) * num_classes > MAX_LABEL_COUNTS:
        return sizes, None
    labels = experiment.dataset.train.labels.numpy()
    return sizes, [np.bincount(labels[indices], minlength=num_classes).tolist() for indices in partitions]


def _peak_memory_mb() -> float:
    """Of this process, without its workers."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _warn_about_delta(experiment: Experiment) -> None:
    smallest = min(len(indices) for indices in experiment.partitions)
    delta = experiment.config.delta
    if experiment.config.privacy_unit == "client":
        if experiment.config.private and delta > 1 / experiment.config.num_clients:
            log.warning(
                "delta=%g is above 1/%d, one of the clients, whom epsilon is about; set it below",
                delta,
                experiment.config.num_clients,
            )
        return
    if experiment.config.private and delta > 1 / smallest:
        log.warning(
            "delta=%g is above 1/%d: the smallest client has %d examples, and a guarantee is usually asked to fail "
            "for less than one of them; set delta below %.1e",
            delta,
            smallest,
            smallest,
            1 / smallest,
        )
