"""The server's side of a run: strategy, ledger, evaluation and run folder around Flower's loop."""

from __future__ import annotations

import resource
import time
from collections import Counter
from collections.abc import Callable, Sequence
from logging import getLogger
from statistics import fmean
from typing import Any

from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fed_dpsat import plugins
from fed_dpsat.config import RunConfig
from fed_dpsat.errors import SettingError
from fed_dpsat.evaluation import Evaluation, evaluate
from fed_dpsat.experiment import Experiment
from fed_dpsat.flower import records
from fed_dpsat.flower.grid import SimulationGrid
from fed_dpsat.flower.nodes import FederationError, FederationOver
from fed_dpsat.flower.strategy import PrivateStrategy
from fed_dpsat.flower.strategy_state import StrategyStateError
from fed_dpsat.flower.updates import KnownNoise
from fed_dpsat.noise import NOISE_SOURCES
from fed_dpsat.params import Params
from fed_dpsat.plans import make_plans
from fed_dpsat.privacy import LedgerError
from fed_dpsat.privacy.ledger import Head, PrivacyLedger
from fed_dpsat.privacy.released import ASSUMPTIONS, epsilon_released
from fed_dpsat.run_folder import Checkpoint, RunFolder
from fed_dpsat.timing import Phases

log = getLogger("fed_dpsat")

Summary = dict[str, Any]
RoundRecord = dict[str, Any]
OnRound = Callable[[RoundRecord], None]
"""Called after each round with its lines of ``rounds.jsonl`` and, under ``timing``, of ``timing.jsonl``."""

COUNTS_RELEASED = "examples without a finite gradient, per client and round: exact, not covered by epsilon"
DECLARED_PUBLIC = ("number of examples of each client", "number of clients", "who takes part in which round")


class Recorder:
    """Turns rounds into lines: evaluates, asks the ledger, writes, and tells whoever watches."""

    def __init__(
        self, experiment: Experiment, strategy: PrivateStrategy, folder: RunFolder, on_round: OnRound | None
    ) -> None:
        self.experiment, self.strategy, self.folder, self.on_round = experiment, strategy, folder, on_round
        self.evaluation: Evaluation | None = None
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
            self.evaluation = (
                evaluate(self.experiment.loss_fn.module, params, self.experiment.dataset.test) if due else None
            )
        with self.strategy.phases("account"):
            record: RoundRecord = {
                "round": round,
                "test_accuracy": self.evaluation.accuracy if self.evaluation else None,
                "test_loss": self.evaluation.loss if self.evaluation else None,
                "epsilon": self.epsilon(),
                "asked": report.asked,
                "accepted": len(report.accepted),
                "dropped": report.dropped,
                "unexpected": report.unexpected,
                "retired": report.retired,
                "released": report.released,
                "kept_model": bool(round) and report.kept_model,
            }
            self.rounds_completed = round
            timing = self._timing(round)
            self.folder.append_round(record, timing)
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
        self.folder.cut_off(checkpoint.round)
        self.strategy.load_state_dict(
            checkpoint.server["strategy"],
            next_round=checkpoint.round + 1,
            same_noise=NOISE_SOURCES[self.experiment.config.noise_source].reproducible,
        )
        return records.to_arrays(checkpoint.params)

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
        examples = sum(
            plan.event.steps * plan.event.sample_rate * len(experiment.partitions[client])
            for client, plan in ((client, self.strategy.plans[client]) for client in accepted)
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
        if config.client_sampling != "poisson" or not rounds or self.experiment.carried_state():
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
            self.evaluation = evaluate(self.experiment.loss_fn.module, saved.params, self.experiment.dataset.test)
        return {
            "status": status,
            "ended_early": self.ended_early,
            "test_accuracy": self.evaluation.accuracy if self.evaluation else None,
            "test_loss": self.evaluation.loss if self.evaluation else None,
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
            "privacy_unit": "one example of one client, add-or-remove; maximum over clients",
            **self._released(),
            "threat_model": "a server that sees every update; no amplification by client sampling",
            "declared_public": DECLARED_PUBLIC,
            "also_released": [COUNTS_RELEASED] if config.release_counts else [],
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
    folder.open(config, objects=objects)
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
            phases=phases,
        )
        recorder = Recorder(experiment, private, folder, on_round)
        arrays = records.to_arrays(experiment.trained(1))
        if checkpoint is not None:
            arrays = recorder.begin_again(checkpoint)
        elif folder.resumes:
            folder.cut_off(-1)
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
            folder.close(summary)
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
    if not experiment.config.unfreeze_round or arrays.keys() == (trained := experiment.trained(round)).keys():
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


def _peak_memory_mb() -> float:
    """Of this process, without its workers."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _warn_about_delta(experiment: Experiment) -> None:
    smallest = min(len(indices) for indices in experiment.partitions)
    delta = experiment.config.delta
    if experiment.config.private and delta > 1 / smallest:
        log.warning(
            "delta=%g is above 1/%d: the smallest client has %d examples, and a guarantee is usually asked to fail "
            "for less than one of them; set delta below %.1e",
            delta,
            smallest,
            smallest,
            1 / smallest,
        )
