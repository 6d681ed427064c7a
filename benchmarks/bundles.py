"""What bundles of rows cost: ``python -m benchmarks.bundles [--model NAME,...] [--rows R] [--batch B] [--json]``.

Clipped sums of ``B`` rows, in turns on one thread, seconds of the processor, medians: each row bounded alone, and
``B / R`` bundles of ``R`` rows; for images also ``B / R`` examples with 1 and with ``R`` random views, which are made.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.contestants import problem
from fed_dpsat.params import trainable
from fed_dpsat.step.bundles import Bundles, Part
from fed_dpsat.step.clipping import FlatClipping
from fed_dpsat.step.draws import Draws
from fed_dpsat.step.gradients.per_example import ModelLoss, clipped_gradient_sum
from fed_dpsat.step.views import Views

RULE = FlatClipping(clip_norm=0.1)
SIZE = 128


def seconds(contestants: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Medians, in turns, after one turn that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(repeats + 1):
        for name, run in contestants.items():
            began = time.process_time()
            run()
            if turn:
                times[name].append(time.process_time() - began)
    return {name: statistics.median(each) for name, each in times.items()}


def measure(model: str, rows: int, batch: int, repeats: int) -> dict[str, float | str]:
    """Milliseconds by contestant, and the two ratios."""
    made = problem(model, batch)
    inputs, targets = made.inputs, made.targets
    loss, params = ModelLoss(made.module, made.criterion), trainable(made.module)
    bundles = Bundles(torch.full((batch // rows, rows), 1 / rows))

    def clipped(part: Part) -> None:
        clipped_gradient_sum(
            loss, params, part.batch, RULE, physical_batch_size=SIZE, draws=part.draws, bundles=part.bundles
        )

    def of_views(count: int) -> None:
        few = Part((inputs[: batch // rows], targets[: batch // rows]), Draws.fresh(batch // rows))
        for part in Views(count=count).parts(few, SIZE):
            clipped(part)

    contestants: dict[str, Callable[[], object]] = {
        "alone": lambda: clipped(Part((inputs, targets), Draws.fresh(batch))),
        "bundles": lambda: clipped(Part((inputs, targets), Draws.fresh(batch), bundles)),
    }
    if made.is_of_images:
        contestants |= {"1 view": lambda: of_views(1), f"{rows} views": lambda: of_views(rows)}
    found = seconds(contestants, repeats)
    ratios = {"bundles / alone": found["bundles"] / found["alone"]}
    if made.is_of_images:
        ratios[f"{rows} views / 1"] = found[f"{rows} views"] / found["1 view"]
    return {"model": model, **{name: 1000 * s for name, s in found.items()}, **ratios}


def main() -> None:
    """A line for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mlp,wide-linear-cnn,tanh-cnn,resnet20-gn")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one line of JSON for each model")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for model in args.model.split(","):
        found = measure(model, args.rows, args.batch, args.repeats)
        shown = {name: round(value, 3) if isinstance(value, float) else value for name, value in found.items()}
        print(json.dumps(shown) if args.json else "  ".join(f"{name} {value}" for name, value in shown.items()))


if __name__ == "__main__":
    main()
