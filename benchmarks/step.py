"""``python -m benchmarks.step``: medians of one step each way, and ratios to the fastest ordinary one.

Contestants take turns, on one core, allocator tuned, so that whatever else the machine does meets them alike. Seconds
are the processor's, which on one thread are those of an idle machine's wall; what waits for the processor adds none.
Peak memory is that of a process of its own: what one step adds to the resident set.

With ``--device cuda`` seconds are the wall's, until the card is done, and memory is what torch has of the card; all
contestants compute in full float32 (but for bfloat16), as a run does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.contestants import Step, contestants
from fed_dpsat.run.process import tune_allocator
from fed_dpsat.step.generators import training_on
from fed_dpsat.step.placement import is_card, require, torch_device

CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}

Row = dict[str, str | int | float | None]


def main() -> None:
    """Parse, measure, print."""
    args = _arguments()
    require(args.device)
    tune_allocator()
    torch.set_num_threads(1)
    with training_on(torch_device(args.device)):  # as the loop of a client
        if args.peak:
            print(_peak_mb(args.peak, args.model[0], args.batch[0], args.physical, torch_device(args.device)))
            return
        rows = [row for model in args.model for size in args.batch for row in _measure(args, model, size)]
    print(json.dumps(rows, indent=1) if args.json else _table(rows))


def _measure(args: argparse.Namespace, model: str, size: int) -> list[Row]:
    names = list(dict.fromkeys([*args.against, "nonprivate", *args.engine]))
    steps = contestants(names, model, size, args.physical, torch_device(args.device))
    failed = {name for name, step in steps.items() if not _works(name, step)}
    clock = CLOCKS[args.clock or ("cpu" if args.device == "cpu" else "wall")]
    times: dict[str, list[float]] = {name: [] for name in steps if name not in failed}
    for _ in range(args.repeats):
        for name in times:
            start = clock()
            steps[name]()
            times[name].append(clock() - start)
    medians = {name: statistics.median(t) for name, t in times.items()}
    plain = min(m for name, m in medians.items() if name in ("nonprivate contiguous", "nonprivate channels-last"))
    return [
        {
            "engine": name,
            "model": model,
            "batch": size,
            "median_seconds": round(median, 5),
            "ratio_to_nonprivate": round(median / plain, 3),
            "peak_mb": _peak_in_a_process(name, model, size, args) if args.memory else None,
        }
        for name, median in medians.items()
    ]


def _works(name: str, step: Step) -> bool:
    """Whether a contestant can run the model, after a warm-up; a failure is printed."""
    try:
        step()
        step()
    except Exception as error:  # Opacus raises many classes for an unsupported layer
        print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:100]}", file=sys.stderr)
        return False
    return True


def _peak_in_a_process(name: str, model: str, size: int, args: argparse.Namespace) -> float:
    command = [sys.executable, "-m", "benchmarks.step", "--peak", name, "--model", model, "--batch", str(size)]
    command += ["--physical", str(args.physical), "--device", args.device]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def _peak_mb(name: str, model: str, size: int, physical: int, device: torch.device) -> float:
    first, _, second = name.partition(" ")
    step = contestants(
        [second if second in ("bfloat16", "torch-kernels", "torch-draws") else first], model, size, physical, device
    )[name]
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
    for row in sorted(rows, key=lambda r: (str(r["model"]), r["batch"], r["ratio_to_nonprivate"])):
        seconds = row["median_seconds"]
        assert isinstance(seconds, float)
        peak = "" if row["peak_mb"] is None else row["peak_mb"]
        lines.append(
            f"| {row['model']} | {row['batch']} | {row['engine']} | {1000 * seconds:.0f} "
            f"| {row['ratio_to_nonprivate']:.2f} | {peak} |"
        )
    return "\n".join(lines)


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
        "compiled ones), torch-draws (planned with torch's own dropout), dp-sgd, dp-sat (whole steps)",
    )
    parser.add_argument("--physical", type=int, default=128, help="physical_batch_size")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N")
    parser.add_argument("--clock", choices=CLOCKS, help="seconds of this process's one thread (on the CPU), or wall")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
