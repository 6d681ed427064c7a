"""The contestants of the round benchmark: functions that train and call ``turn`` when set up and after each round.

``python -m benchmarks.rounds_contestants NAME JSON`` runs one as a process that takes turns (``benchmarks.turns``).
All of them train with one thread; ours and the loop with the same allocator settings.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from benchmarks.rounds_loop import loop
from benchmarks.rounds_plugins import Padded, one_example_each
from benchmarks.rounds_small_flower import flower_small
from benchmarks.rounds_small_run import run, small_config
from benchmarks.rounds_stacked_loop import stacked_loop
from benchmarks.turns import Contestant, Turn, turn_from_stdin
from fed_dpsat.flower.wire import records
from fed_dpsat.params import Params, trainable
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.simulation import simulate
from fed_dpsat.step.loop import LocalResult

NOISE_MULTIPLIER, CENTRAL_NOISE_MULTIPLIER = 1.0, 0.01
LOOP_TIMEOUT = 600.0
FLOWER_ARRAYS, FLOWER_METRICS = "arrays", "metrics"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What one contestant does. ``cohort`` 0 asks all clients; ``sleep`` is seconds that an idle client sleeps.

    ``private``: a client's examples are clipped and noised on it; ``central``: its whole change is clipped, and the
    server adds noise.
    """

    clients: int
    rounds: int
    workers: int = 0
    model_mb: float = 0.0
    private: bool = False
    central: bool = False
    cohort: int = 0
    sleep: float = 0.0
    data_path: str = ""
    stack: int = 1
    model: str = ""
    local_steps: int = 4


def training_config(setting: Setting) -> RunConfig:
    """pfl's cifar10_iid round: 50 images a client, 5 steps of (expected) batch 10, learning rate 0.1.

    Without privacy, gradients as they are; else clipped example by example to 0.4 (pfl's bound), noise 1. Or, with
    ``central``, a client's change clipped to 0.4, and noise 0.01 on the sum: more would drown 50 clients, and a model
    of NaN takes another time.
    """
    private: dict[str, Any] = {"noise_multiplier": NOISE_MULTIPLIER, "clip_norm": 0.4}
    if setting.central:
        private |= {"noise_multiplier": CENTRAL_NOISE_MULTIPLIER, "privacy_unit": "client"}
    return RunConfig(
        dataset="benchmarks.rounds_plugins:cifar_clients",
        data_source="parquet",
        data_path=setting.data_path,
        model="benchmarks.rounds_plugins:pfl_cnn",
        num_clients=setting.clients,
        optimizer="dp-sgd",
        lr=0.1,
        local_steps=5,
        sample_rate=0.2,
        num_rounds=setting.rounds,
        evaluate_every=setting.rounds,
        workers=setting.workers,
        private=setting.private or setting.central,
        **(private if setting.private or setting.central else {"clip_norm": float("inf")}),
    )


def ours(setting: Setting, turn: Turn) -> Params:
    """A whole run of fed_dpsat: private strategy, ledger on disk, run folder. Returns the last model."""
    return _simulate(training_config(setting), turn)


def ours_population(setting: Setting, turn: Turn) -> Params:
    """A linear model of 170 parameters, one example per client, ``cohort`` of many clients train in a round."""
    config = _tiny_config(setting, dataset="benchmarks.rounds_plugins:one_example_each")
    return _simulate(config, turn)


def small_settings(setting: Setting) -> RunConfig:
    """As ``small_config`` of the setting."""
    names = ("clients", "rounds", "model", "local_steps", "stack")
    return small_config(**{name: getattr(setting, name) for name in names})


def ours_idle(setting: Setting, turn: Turn) -> Params:
    """Clients that return the received model with a valid event: a round without training."""
    return _simulate(
        _tiny_config(setting),
        turn,
        client_app=idle_app(setting.sleep),
        dataset=one_example_each(setting.clients),
        model=_padded(setting),
    )


def idle_app(sleep: float) -> ClientApp:
    """A client of the federation that does nothing but unpack the model, sleep, and pack it again."""
    app = ClientApp()

    @app.query()
    def identify(message: Message, context: Context) -> Message:
        client = int(context.node_config[records.PARTITION_ID])
        return Message(records.identity_content(client, 1), reply_to=message)

    @app.train()
    def do_nothing(message: Message, context: Context) -> Message:
        assignment = records.read_assignment(message.content)
        params = records.to_params(message.content.array_records[records.ARRAYS])
        if sleep:  # 0 too lets another process have the core
            time.sleep(sleep)
        result = LocalResult(params=params, state={}, event=assignment.event, nonfinite_examples=0)
        client = int(context.node_config[records.PARTITION_ID])
        return Message(records.reply_content(client, assignment, result, 1), reply_to=message)

    return app


def flower(setting: Setting, turn: Turn) -> None:
    """Stock Flower: ``run_simulation``, FedAvg, and clients that echo."""
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    client, server, everyone = ClientApp(), ServerApp(), setting.clients
    model = records.to_arrays(trainable(_padded(setting)))

    @client.train()
    def echo(message: Message, context: Context) -> Message:
        if setting.sleep:
            time.sleep(setting.sleep)
        content = {
            FLOWER_ARRAYS: message.content[FLOWER_ARRAYS],
            FLOWER_METRICS: MetricRecord({"num-examples": 1}),
        }
        return Message(RecordDict(content), reply_to=message)

    def after_round(round: int, arrays: ArrayRecord) -> None:
        turn()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = FedAvg(
            fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=everyone, min_available_nodes=everyone
        )
        strategy.start(grid, model, setting.rounds, evaluate_fn=after_round)

    cpus = max(setting.workers, 1)
    run_simulation(
        server,
        client,
        everyone,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0}, "init_args": {"num_cpus": cpus}},
    )


def loops(setting: Setting, turn: Turn) -> None:
    """``workers`` bare loops, each with its share of the clients: the limit of the machine."""
    share = dataclasses.replace(setting, clients=setting.clients // setting.workers, workers=0)
    command = [sys.executable, "-m", "benchmarks.rounds_contestants", "loop", json.dumps(dataclasses.asdict(share))]
    running = [Contestant(command, {}, LOOP_TIMEOUT) for _ in range(setting.workers)]
    try:
        turn()
        with ThreadPoolExecutor(len(running)) as pool:
            for _ in range(setting.rounds):
                list(pool.map(Contestant.round, running))
                turn()
    finally:
        for each in running:
            each.end()


CONTESTANTS: dict[str, Callable[[Setting, Turn], object]] = {
    "ours": ours,
    "ours-idle": ours_idle,
    "ours-population": ours_population,
    "ours-small": lambda setting, turn: run(small_settings(setting), turn),
    "stacked-loop": lambda setting, turn: stacked_loop(small_settings(setting), turn),
    "flower-small": lambda setting, turn: flower_small(small_settings(setting), turn),
    "loop": lambda setting, turn: loop(training_config(setting), turn),
    "loops": loops,
    "flower": flower,
}


def _simulate(config: RunConfig, turn: Turn, **objects: Any) -> Params:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        simulate(config, out, on_round=lambda _: turn(), progress=False, **objects)
        params: Params = torch.load(out / "checkpoint" / "model.pt", weights_only=True)["params"]
        return params


def _tiny_config(setting: Setting, **settings: Any) -> RunConfig:
    return RunConfig(
        num_clients=setting.clients,
        clients_per_round=setting.cohort,
        num_rounds=setting.rounds,
        evaluate_every=setting.rounds,
        workers=setting.workers,
        optimizer="dp-sgd",
        sample_rate=1.0,
        noise_multiplier=NOISE_MULTIPLIER,
        **settings,
    )


def _padded(setting: Setting) -> Padded:
    torch.manual_seed(0)
    return Padded(setting.model_mb)


def main() -> None:
    """Run one contestant."""
    name, setting = sys.argv[1:]
    torch.set_num_threads(1)
    CONTESTANTS[name](Setting(**json.loads(setting)), turn_from_stdin())


if __name__ == "__main__":
    main()
