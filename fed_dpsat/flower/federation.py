"""The server's side of a run: strategy, ledger, evaluation and run folder around Flower's loop."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from logging import getLogger

import numpy as np
from flwr.app import ArrayRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fed_dpsat import plugins
from fed_dpsat.accounting.before import BEFORE, history_before
from fed_dpsat.accounting.ledger import PrivacyLedger
from fed_dpsat.accounting.plans import ClientPlan, make_plans
from fed_dpsat.client.build import Experiment
from fed_dpsat.client.given import copied, renamed
from fed_dpsat.client.half import check_models, half_of, named_strategy, sent_by
from fed_dpsat.client.known_noise import KnownNoise
from fed_dpsat.errors import RunError, SettingError
from fed_dpsat.flower.buffered import Buffer
from fed_dpsat.flower.grid import SimulationGrid
from fed_dpsat.flower.inner import check_inner, say_overruled
from fed_dpsat.flower.metrics import ServerMetrics, serving
from fed_dpsat.flower.nodes import NOTHING, FederationOver
from fed_dpsat.flower.private_evaluation import PrivateEvaluation
from fed_dpsat.flower.recorder import OnRound, Recorder, Summary
from fed_dpsat.flower.roster import Roster
from fed_dpsat.flower.round import RoundKind
from fed_dpsat.flower.strategy import PrivateStrategy
from fed_dpsat.flower.sums import ClientRelease
from fed_dpsat.flower.wire import compat, records
from fed_dpsat.run import logs
from fed_dpsat.run.folder import RunFolder, jsonable
from fed_dpsat.run.inputs import inputs_of
from fed_dpsat.run.loggers import Loggers
from fed_dpsat.run.promise import delta_warning, unused_warning
from fed_dpsat.run.timing import Phases
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.step.noise import NOISE_SOURCES

log = getLogger("fed_dpsat")

MAX_LABEL_COUNTS = 10**6
"""The most label counts that a run folder holds."""


def run_federation(
    grid: Grid,
    experiment: Experiment,
    folder: RunFolder,
    *,
    strategy: Strategy | None = None,
    on_round: OnRound | None = None,
    objects: Sequence[str] = (),
) -> Summary:
    """Train over the nodes of ``grid``; returns the content of ``summary.json``.

    A ``folder`` that resumes continues after its last checkpoint and ends with the bits of an uninterrupted run. With
    system noise it ends with the same account plus the cost of the interrupted round.

    Raises ``FederationError`` if clients do not join or all fail. Any end, also Ctrl-C, leaves a readable folder and
    a summary with its ``status``.
    """
    experiment = dataclasses.replace(experiment, config=renamed(experiment.config, strategy=strategy))
    logs.use(experiment.config.log_format)
    with serving(experiment.config) as metrics:
        return _run(grid, experiment, folder, strategy, on_round, objects, metrics)


def _run(
    grid: Grid,
    experiment: Experiment,
    folder: RunFolder,
    strategy: Strategy | None,
    on_round: OnRound | None,
    objects: Sequence[str],
    metrics: ServerMetrics | None,
) -> Summary:
    config = experiment.config
    plans, before = make_plans(config), history_before(config)
    if before and not isinstance(grid, SimulationGrid):
        bound = "possible on devices, whose own ledgers do not hold the charges of statistics"
        raise SettingError("statistics_from", config.statistics_from, bound, "declare constants from public knowledge")
    if config.evaluate == "clients" and not isinstance(grid, SimulationGrid):
        bound = "possible on devices: their policies do not name evaluations"
        raise SettingError("evaluate", config.evaluate, bound, "set evaluate=server, with a public test split")
    compat.say_untested()
    compat.check_records()
    for warning in filter(None, (*experiment.start.notes, delta_warning(experiment), unused_warning(experiment))):
        log.warning("%s", warning)
    inner = build_strategy(config) if strategy is None else copied("strategy", strategy)
    check_inner(inner)
    say_overruled(inner, config)
    if strategy is not None and config.unfreeze_round:
        raise SettingError(
            "unfreeze_round",
            config.unfreeze_round,
            "possible with a strategy that was given as an object",
            "name it, so that it can begin anew with all layers",
        )
    loggers = Loggers.of(config)
    folder.open(config, objects=objects, inputs=inputs_of(experiment))
    if isinstance(grid, SimulationGrid):  # also of a resumed run, which may have been killed before this line
        folder.save_simulation(*_holdings(experiment))
    checkpoint = folder.load_checkpoint() if folder.resumes else None
    phases = Phases(trace=config.profile)
    if isinstance(grid, SimulationGrid) and config.profile:
        grid.on_span = lambda span: phases.add_span(
            f"client {span.client}", span.worker + 1, span.started, span.seconds
        )
    with PrivacyLedger(folder.ledger_path, must_exist=checkpoint is not None) as ledger:
        # a simulation asked its workers at their start
        same = NOTHING if isinstance(grid, SimulationGrid) else experiment.same
        for attempt, event in enumerate(before):
            ledger.charge_many(BEFORE, attempt, [(range(config.num_clients), event)])
        private = private_strategy(experiment, inner, ledger, plans, phases, same)
        known = _noise_of_mean(config, objects)
        own = (
            PrivateEvaluation(experiment, private.roster, folder.last_round()) if config.evaluate == "clients" else None
        )
        recorder = Recorder(experiment, private, folder, on_round, loggers, known, grid, metrics, own)
        arrays = records.to_arrays(experiment.shared(1))
        if checkpoint is not None:
            arrays = recorder.begin_again(checkpoint)
        elif folder.resumes:
            folder.cut_off(-1)
        recorder.begin_logging()
        status = "failed"
        try:
            private.start(
                grid,
                arrays,
                config.num_rounds,
                config.reply_timeout,
                evaluate_fn=recorder.after_round,
                done=checkpoint.round if checkpoint else None,
                before_round=lambda round, arrays: unfrozen(experiment, private, round, arrays),
            )
            status = "completed"
        except FederationOver as reason:
            status = "completed"
            recorder.end_early(str(reason))
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        finally:
            with (
                nullcontext() if status == "completed" else suppress(RunError)
            ):  # the error that ended the run is the one to show
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


def private_strategy(
    experiment: Experiment,
    inner: Strategy,
    ledger: PrivacyLedger,
    plans: Sequence[ClientPlan],
    phases: Phases | None = None,
    same: Mapping[str, str] = NOTHING,
) -> PrivateStrategy:
    """``inner`` in the wrapper that the configuration of ``experiment`` describes.

    Raises ``SettingError`` unless clients train as many models as the client's half of ``inner`` says.
    """
    config = experiment.config
    check_models(config, half_of(inner))
    roster = Roster(
        plans,
        ledger,
        delta=config.delta,
        accountant=config.accountant,
        cohort_size=config.cohort_size,
        max_rounds_per_client=config.rounds_per_client,
        seed=config.seed,
        client_sampling=config.client_sampling,
        min_clients=config.min_clients,
        min_separation=config.separation,
        secret_coins=not NOISE_SOURCES[config.noise_source].reproducible,
    )
    return PrivateStrategy(
        inner,
        roster,
        release_counts=config.release_counts,
        join_timeout=config.join_timeout,
        release=ClientRelease.of(config, plans[0].event.noise_multiplier),
        kind=_kind(config),
        phases=phases,
        within=experiment.subspace,
        same=same,
        sends=sent_by(experiment.half, experiment.shared(1)),
    )


def _kind(config: RunConfig) -> RoundKind:
    if config.secure_aggregation:  # loaded by name: flower imports no room above it
        kind: RoundKind = importlib.import_module("fed_dpsat.secagg.server").SecureSums(config.secure_threshold)
        return kind
    return Buffer.of(config) or RoundKind()


def unfrozen(experiment: Experiment, private: PrivateStrategy, round: int, arrays: ArrayRecord) -> ArrayRecord:
    """The model with the layers that ``round`` trains; new layers start from their frozen values.

    The inner strategy starts again with them, because its state for the head alone has another shape.
    """
    if not experiment.config.unfreeze_round or arrays.keys() == (trained := experiment.shared(round)).keys():
        return arrays
    private.renew(build_strategy(experiment.config))
    return records.to_arrays({**trained, **records.to_params(arrays)})


def build_strategy(config: RunConfig) -> Strategy:
    """The inner strategy that ``config`` names; raises ``PluginError`` for another object."""
    inner = named_strategy(config)
    if not isinstance(inner, Strategy):
        raise plugins.PluginError(
            f"strategy={config.strategy!r} is a {type(inner).__name__}; return a strategy of flwr.serverapp.strategy"
        )
    return inner


def _noise_of_mean(config: RunConfig, objects: Sequence[str]) -> KnownNoise | None:
    """The known noise in the global step of a round; None unless that step is the mean of honest SGD steps."""
    known = KnownNoise.of(config)
    other_step = config.attack or config.strategy != "fedavg" or set(objects) - {"dataset", "model"}
    return None if known.unknown or other_step or config.unfreeze_round else known


def _holdings(experiment: Experiment) -> tuple[list[int], list[list[int]] | None]:
    """Examples per client, and per client and class; None for the latter without classes or beyond the most."""
    partitions, num_classes = experiment.partitions, experiment.dataset.num_classes
    sizes, labels = experiment.sizes, experiment.dataset.train.classes
    if labels is None or len(sizes) * num_classes > MAX_LABEL_COUNTS:
        return sizes, None
    return sizes, [np.bincount(labels[indices], minlength=num_classes).tolist() for indices in partitions]
