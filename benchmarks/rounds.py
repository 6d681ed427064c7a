"""Seconds of one federated round, ours and others': ``python -m benchmarks.rounds --clients 1000 --workers 2 --json``.

================================ ====================================================================================
option                           what is measured
================================ ====================================================================================
``--clients N --model-mb M``     idle: N clients that return the received model; with ``--against flower`` stock
                                 Flower beside it
``--against loop,pfl``           training: 50 clients, 50 CIFAR-10 images each, 5 steps of batch 10, CNN of 1.6 M
                                 parameters, beside the bare PyTorch loop and pfl-research; also with local noise and,
                                 of one clipped change per client, with the server's
``--population N1,N2 --cohort K`` K clients of N train; the start is timed too
``--scaling 1,2``                training, by number of Ray workers; with ``--against loop`` as many bare loops
``--stack 1,8,32``               training of ``--clients`` small clients (256 by default), so many in one kernel
``--small``                      many small clients, beside a hand-written stacked loop and, with ``--before CHECKOUT``,
                                 an earlier build; also ``--against flower,pfl``; with ``--profile`` only where the
                                 time of one client goes
``--sleeping 1,2,4``             clients that sleep ``--sleep`` seconds, by number of Ray workers
================================ ====================================================================================

Every contestant is a process that takes turns with those it is compared with. Medians over ``--rounds`` rounds after a
warm-up round; ratios are medians of those of each turn. ``parent_cpu_seconds`` is the mean processor time per round of
the process that drives it, without its workers: on a busy machine the steadier figure. ``parent_mb`` is its peak
resident set, ``growth_mb`` what it gained from the warm-up round to the last one.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import json
import math
import signal
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.rounds_contestants import Setting
from benchmarks.rounds_measure import Entry, Measured, Row, entry, measure, ratio, table
from benchmarks.rounds_plugins import cifar_clients
from benchmarks.rounds_small import small
from benchmarks.rounds_small_profile import profiled
from fed_dpsat.settings.config import RunConfig

COHORT = 50
STACKED_CLIENTS, STACKED_MODELS = 256, ("linear", "mlp", "tanh-cnn-small")
SMALL_MODELS = ["linear", "mlp-small", "tanh-cnn-small"]
MAX_FLOWER_CLIENTS, MAX_FLOWER_ROUNDS = 1000, 3
DATA = Path(__file__).parents[2] / "shared" / "data" / "cifar10"
HOW_TO_INSTALL_PFL = (
    "pfl: not installed here, so it is left out; it wants other versions than ours, so give it an environment: "
    "`python -m venv pfl-env && pfl-env/bin/pip install 'pfl[pytorch]'`, then --pfl-python pfl-env/bin/python"
)
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
ALLOCATOR |= {"MALLOC_TOP_PAD_": str(256 << 20)}
"""What ``tune_allocator`` sets, for a contestant that does not import it."""


def idle(args: argparse.Namespace) -> list[Row]:
    """Idle clients of this project and of stock Flower."""
    setting = Setting(clients=args.clients, rounds=args.rounds, model_mb=args.model_mb)
    entries = []
    for workers in args.workers:
        entries.append(entry("idle", "ours", "ours-idle", dataclasses.replace(setting, workers=workers)))
    if "flower" in args.against and args.clients > MAX_FLOWER_CLIENTS:
        print(f"flower is left out above {MAX_FLOWER_CLIENTS} clients: its polling is quadratic", file=sys.stderr)
    elif "flower" in args.against:
        rounds = min(args.rounds, MAX_FLOWER_ROUNDS)
        stock = dataclasses.replace(setting, workers=max(1, *args.workers), rounds=rounds)
        entries.append(entry("idle", "flower", "flower", stock))
    return [each.row() for each in measure(entries, args.timeout)]


def training(args: argparse.Namespace) -> list[Row]:
    """The round of pfl's benchmark in this project, the bare loop and pfl: without, with local, with central noise."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.npz"
        if "pfl" in args.against and args.pfl_python:
            _write_data(data, args.data_path)
        elif "pfl" in args.against:
            print(HOW_TO_INSTALL_PFL, file=sys.stderr)
        for start, noise in itertools.product(range(args.starts), args.noise):
            setting = Setting(
                clients=COHORT,
                rounds=args.rounds,
                data_path=args.data_path,
                private=noise == "local",
                central=noise == "central",
                model_mb=6.5,
            )
            entries = []
            for workers in args.workers:
                entries.append(_train_entry("ours", dataclasses.replace(setting, workers=workers), noise))
            if "loop" in args.against:
                entries.append(_train_entry("loop", setting, noise))
            if data.exists():
                entries.append(_pfl_entry(args.pfl_python, data, setting, noise))
            rows += [{**row, "start": start} for row in _with_ratios(measure(entries, args.timeout))]
    return rows


def _train_entry(engine: str, setting: Setting, noise: str) -> Entry:
    data = "cifar10" if setting.data_path else "random images"
    return entry("train", engine, engine, setting, noise=noise, data=data)


def _pfl_entry(python: str, data: Path, setting: Setting, noise: str) -> Entry:
    arguments = [str(data), str(COHORT), str(setting.rounds + 1), noise]
    return dataclasses.replace(
        _train_entry("pfl", setting, noise),
        command=[python, "-m", "benchmarks.pfl_baseline", *arguments],
        env=ALLOCATOR,
    )


def _with_ratios(measured: list[Measured]) -> list[Row]:
    """Ratios of seconds to the loop and to pfl, turn by turn; in process also of processor time, which varies less."""
    rows = []
    references = {str(each.labels["engine"]): each for each in measured if each.labels["engine"] != "ours"}
    for each in measured:
        ratios = {f"ratio_to_{engine}": ratio(each.times, other.times) for engine, other in references.items()}
        if each.in_process:
            ratios |= {f"cpu_ratio_to_{engine}": ratio(each.cpu, other.cpu) for engine, other in references.items()}
        rows.append(each.row(**ratios))
    return rows


def _with_speedups(measured: list[Measured]) -> list[Row]:
    """The speedup of each over the first, turn by turn."""
    return [each.row(speedup=ratio(measured[0].times, each.times)) for each in measured]


def population(args: argparse.Namespace) -> list[Row]:
    """A small cohort of a large population; one population after the other."""
    rows = []
    for clients in args.population:
        for workers in args.workers:
            setting = Setting(clients=clients, cohort=args.cohort, rounds=args.rounds, workers=workers)
            labels = {"population": clients}
            one = entry("population", "ours", "ours-population", setting, **labels)
            rows += [each.row() for each in measure([one], args.timeout)]
    return rows


def scaling(args: argparse.Namespace) -> list[Row]:
    """Compute-bound rounds by number of workers, and as many bare loops; ``speedup`` is over the first of each."""
    setting = Setting(clients=COHORT, rounds=args.rounds, data_path=args.data_path, model_mb=6.5)
    contestants = {"ours": "ours", **({"loop": "loops"} if "loop" in args.against else {})}
    entries = []
    for engine, contestant in contestants.items():
        for workers in args.scaling:
            one = dataclasses.replace(setting, workers=workers)
            entries.append(entry("scaling", engine, contestant, one, noise="none"))
    measured = measure(entries, args.timeout)
    by_engine = ([each for each in measured if each.labels["engine"] == engine] for engine in contestants)
    return [row for those in by_engine for row in _with_speedups(those)]


def sleeping(args: argparse.Namespace) -> list[Row]:
    """Clients that sleep, by number of workers; ``ideal_seconds`` is ceil(clients / workers) * sleep."""
    rows = []
    setting = Setting(clients=args.clients, rounds=args.rounds, model_mb=args.model_mb, sleep=args.sleep)
    for workers in args.sleeping:
        ideal = math.ceil(args.clients / workers) * args.sleep
        for engine in ["ours", *(["flower"] if "flower" in args.against else [])]:
            contestant = "ours-idle" if engine == "ours" else engine
            one = entry(
                "sleeping", engine, contestant, dataclasses.replace(setting, workers=workers), warm_up=args.warm_up
            )
            for each in measure([one], args.timeout):
                over = statistics.median(each.times) / ideal
                rows.append(each.row(ideal_seconds=ideal, over_ideal=round(over, 3)))
    return rows


def _write_data(path: Path, data_path: str) -> None:
    """Write the normalised images of our clients, from which the users of pfl draw."""
    settings = RunConfig(private=False)
    examples = cifar_clients(COHORT, "parquet", data_path, settings.cache_dir).train
    inputs, labels = examples.batch(torch.arange(len(examples)))
    np.savez(path, inputs=inputs.numpy(), labels=labels.numpy())


def stacking(args: argparse.Namespace) -> list[Row]:
    """Small clients by how many of them train in one kernel, taking turns; ``speedup`` is over the first."""
    rows = []
    for model in STACKED_MODELS:
        setting = Setting(clients=args.clients or STACKED_CLIENTS, rounds=args.rounds, model=model)
        entries = []
        for stack in args.stack:
            one = dataclasses.replace(setting, stack=stack)
            entries.append(entry("stacking", "ours", "ours-small", one, model=model, stack=stack))
        rows += _with_speedups(measure(entries, args.timeout))
    return rows


def main() -> None:
    """Parse, measure, print."""
    args = _arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end the contestants too
    rows = []
    if args.small and "pfl" in args.against and not args.pfl_python:
        print(HOW_TO_INSTALL_PFL, file=sys.stderr)
    if args.small:
        rows += profiled(args) if args.profile else small(args, MAX_FLOWER_CLIENTS)
    elif args.population or args.scaling or args.sleeping or args.stack:
        rows += population(args) if args.population else []
        rows += scaling(args) if args.scaling else []
        rows += sleeping(args) if args.sleeping else []
        rows += stacking(args) if args.stack else []
    else:
        rows += idle(args) if args.clients else []
        rows += training(args) if {"loop", "pfl"} & set(args.against) else []
    print(json.dumps(rows, indent=1) if args.json else table(rows))


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _numbers(text: str) -> list[int]:
    return [int(name) for name in _names(text)]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=0, help="idle or sleeping clients; 0 measures none")
    parser.add_argument("--model-mb", type=float, default=2.0, help="their model, in 10^6 bytes")
    parser.add_argument("--workers", type=_numbers, default=[0], help="Ray workers, by commas; 0 is in process")
    parser.add_argument("--against", type=_names, default=[], help="flower, loop, pfl, by commas")
    parser.add_argument("--noise", type=_names, default=["none", "local", "central"], help="of training, by commas")
    parser.add_argument("--population", type=_numbers, default=[], help="clients there are, by commas")
    parser.add_argument("--cohort", type=int, default=100, help="clients of them that train in a round")
    parser.add_argument("--scaling", type=_numbers, default=[], help="Ray workers that train, by commas")
    parser.add_argument("--sleeping", type=_numbers, default=[], help="Ray workers whose clients sleep, by commas")
    parser.add_argument("--stack", type=_numbers, default=[], help="clients that train in one kernel, by commas")
    parser.add_argument("--small", action="store_true", help="small clients; --stack is that of ours (default 0)")
    parser.add_argument("--small-cohorts", type=_numbers, default=[100, 1000], help="clients of a round, by commas")
    parser.add_argument("--small-steps", type=_numbers, default=[1, 4], help="their local steps, by commas")
    parser.add_argument("--small-models", type=_names, default=SMALL_MODELS, help="their models, by commas")
    parser.add_argument("--before", default="", help="of --small: folder with a checkout of an earlier commit")
    parser.add_argument("--profile", action="store_true", help="of --small: microseconds of a client by phase")
    parser.add_argument("--sleep", type=float, default=0.1, help="seconds that a client sleeps")
    parser.add_argument("--rounds", type=int, default=7, help="rounds measured, after one that warms up")
    parser.add_argument("--starts", type=int, default=1, help="how often those that train are started anew")
    parser.add_argument("--warm-up", type=int, default=1, help="of --sleeping, rounds until all workers have started")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds a start or a round may take")
    parser.add_argument("--pfl-python", default=sys.executable if importlib.util.find_spec("pfl") else "")
    parser.add_argument(
        "--data-path",
        default=str(DATA) if DATA.is_dir() else "",
        help="folder of CIFAR-10 in Parquet; '' is random images",
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if unknown := set(args.noise) - {"none", "local", "central"}:
        parser.error(f"--noise {sorted(unknown)[0]}: not one of none, local, central")
    if unknown := set(args.against) - {"flower", "loop", "pfl"}:
        parser.error(f"--against {sorted(unknown)[0]}: not one of flower, loop, pfl")
    return args


if __name__ == "__main__":
    main()
