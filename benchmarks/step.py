"""``python -m benchmarks.step``: medians of one step each way, and ratios to the fastest ordinary one.

Contestants take turns, on one core, allocator tuned, so that whatever else the machine does meets them alike. Seconds
are the processor's, which on one thread are those of an idle machine's wall; what waits for the processor adds none.
Peak memory is that of a process of its own: what one step adds to the resident set. ``--model`` takes the names of
``benchmarks/networks.py``, of ``benchmarks/contestants.py``, and all that the setting ``model`` takes. A network whose
library is missing, and a contestant that cannot run a network, have a row that says why.

With ``--device cuda`` seconds are the wall's, until the card is done, and memory is what torch has of the card; all
contestants compute in full float32 (but for bfloat16), as a run does.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.contestants import Step, contestants, problem
from fed_dpsat.errors import ModelError
from fed_dpsat.run.process import tune_allocator
from fed_dpsat.step.generators import training_on
from fed_dpsat.step.placement import is_card, require, torch_device

CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}

PLAIN = ("nonprivate contiguous", "nonprivate channels-last")

Row = dict[str, Any]


def main() -> None:
    """Parse, measure, print."""
    args = _arguments()
    require(args.device)
    tune_allocator()
    torch.set_num_threads(1)
    with training_on(torch_device(args.device)):  # as the loop of a client
        if args.peak:
            print(_peak_mb(args))
            return
        rows = [row for model in args.model for size in args.batch for row in _measure(args, model, size)]
    print(json.dumps(rows, indent=1) if args.json else (_summary if args.summary else _table)(rows))


def _measure(args: argparse.Namespace, model: str, size: int) -> list[Row]:
    device = torch_device(args.device)
    names = list(dict.fromkeys([*args.against, "nonprivate", *args.engine]))
    about: Row = {"model": model, "batch": size, "median_seconds": None, "ratio_to_nonprivate": None, "peak_mb": None}
    try:
        steps = contestants(names, problem(model, size, args.length, device), args.physical, device)
    except (ImportError, ModelError) as error:
        return [{"engine": "all", **about, "reason": _said(error)}]
    reasons = {name: _trouble(step) for name, step in steps.items()}
    clock = CLOCKS[args.clock or ("cpu" if args.device == "cpu" else "wall")]
    times: dict[str, list[float]] = {name: [] for name, reason in reasons.items() if not reason}
    for _ in range(args.repeats):
        for name in times:
            start = clock()
            steps[name]()
            times[name].append(clock() - start)
    medians = {name: statistics.median(t) for name, t in times.items()}
    plain = min(m for name, m in medians.items() if name in PLAIN)
    rows = [
        {
            "engine": name,
            **about,
            "median_seconds": round(median, 5),
            "ratio_to_nonprivate": round(median / plain, 3),
            "peak_mb": _peak_in_a_process(name, model, size, args) if args.memory else None,
            "reason": "",
        }
        for name, median in medians.items()
    ]
    return rows + [{"engine": name, **about, "reason": reason} for name, reason in reasons.items() if reason]


def _trouble(step: Step) -> str:
    """Warms up; why a contestant cannot run the model, or nothing."""
    try:
        step()
        step()
    except Exception as error:  # whatever Opacus says of a layer
        return _said(error)
    return ""


def _said(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no reason given"]
    return f"{type(error).__name__}: {' '.join(lines)[:160]}"


def _peak_in_a_process(name: str, model: str, size: int, args: argparse.Namespace) -> float:
    command = [sys.executable, "-m", "benchmarks.step", "--peak", name, "--model", model, "--batch", str(size)]
    command += ["--physical", str(args.physical), "--device", args.device, "--length", str(args.length)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def _peak_mb(args: argparse.Namespace) -> float:
    name, device = args.peak, torch_device(args.device)
    first, _, second = name.partition(" ")
    asked = second if second in ("bfloat16", "torch-kernels", "torch-draws") else first
    step = contestants([asked], problem(args.model[0], args.batch[0], args.length, device), args.physical, device)[name]
    if is_card(device):
        held = torch.cuda.memory_allocated(device)
        step()
        step()
        return round((torch.cuda.max_memory_allocated(device) - held) / 2**20, 1)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here, not from the parent process's
    before = _status_mb("VmRSS")
    step()
    step()
    return round(_status_mb("VmHWM") - before, 1)


def _status_mb(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def _table(rows: list[Row]) -> str:
    lines = ["| model | batch | engine | median ms | ratio to nonprivate | peak MB |", "|---|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda r: (r["model"], r["batch"], r["ratio_to_nonprivate"] or math.inf)):
        where = f"| {row['model']} | {row['batch']} | {row['engine']} "
        if row["reason"]:
            lines.append(f"{where}| does not run: {row['reason']} | | |")
            continue
        peak = "" if row["peak_mb"] is None else row["peak_mb"]
        lines.append(f"{where}| {1000 * row['median_seconds']:.0f} | {row['ratio_to_nonprivate']:.2f} | {peak} |")
    return "\n".join(lines)


def _summary(rows: list[Row]) -> str:
    """One line for a network and a batch: the figures that have targets, and why modes of Opacus do not run."""
    lines = [
        "| model | batch | planned / plain | memory, planned / plain | Opacus' best mode / planned | dp-sat / dp-sgd |",
        "|---|---|---|---|---|---|",
    ]
    for model, size in dict.fromkeys((row["model"], row["batch"]) for row in rows):
        own = {row["engine"]: row for row in rows if (row["model"], row["batch"]) == (model, size)}
        ran = {name: row["median_seconds"] for name, row in own.items() if not row["reason"]}
        if not ran:
            lines.append(f"| {model} | {size} | does not run: {next(iter(own.values()))['reason']} | | | |")
            continue
        plain = min((name for name in ran if name in PLAIN), key=ran.__getitem__)
        modes = {name: ran[name] for name in ran if name.startswith("opacus")}
        best = min(modes, key=modes.__getitem__) if modes else ""
        refused = [f"{name} {row['reason']}" for name, row in own.items() if row["reason"]]
        found = [
            _ratio(ran.get("planned"), ran[plain]),
            _ratio(own["planned"]["peak_mb"], own[plain]["peak_mb"]) if "planned" in own else "",
            "; ".join(filter(None, [f"{_ratio(modes[best], ran.get('planned'))} ({best})" if best else "", *refused])),
            _ratio(ran.get("dp-sat"), ran.get("dp-sgd")),
        ]
        lines.append(f"| {model} | {size} | " + " | ".join(found) + " |")
    return "\n".join(lines)


def _ratio(one: float | None, other: float | None) -> str:
    return f"{one / other:.2f}" if one and other else ""


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=lambda t: t.split(","), default=["tanh-cnn"], help="short names, by commas")
    parser.add_argument("--batch", type=lambda t: [int(b) for b in t.split(",")], default=[64])
    parser.add_argument("--engine", type=lambda t: t.split(","), default=["planned"], help="engines to rate")
    parser.add_argument(
        "--against",
        type=lambda t: t.split(","),
        default=["nonprivate", "vmap"],
        help="nonprivate, vmap, opacus (all modes), bfloat16 (nonprivate and planned), torch-kernels (planned without "
        "compiled ones), torch-draws (planned with torch's own dropout), dp-sgd, dp-sat, zeroth-order (whole steps), "
        "inference",
    )
    parser.add_argument("--length", type=int, default=64, help="tokens of a text")
    parser.add_argument("--physical", type=int, default=128, help="physical_batch_size")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N")
    parser.add_argument("--clock", choices=CLOCKS, help="seconds of this process's one thread (on the CPU), or wall")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--summary", action="store_true", help="the ratios that have targets, one line a network")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
