"""What the planned engine does with a module, layer by layer, as a table; times beside it if asked for.

The plan is a count of multiplications (``conv.choose``, ``linear.choose``), not a race: every worker of a run, and
every run on any machine with vectors of the same width, picks the same strategies, so the same seed gives the same
bits. Times only inform.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fed_dpsat.params import trainable
from fed_dpsat.step.examples import Examples, count
from fed_dpsat.step.generators import training_on
from fed_dpsat.step.gradients import conv, linear, planned
from fed_dpsat.step.gradients.capture import Call, Tape
from fed_dpsat.step.gradients.contribution import Contribution, Parts, Rows, Unplanned
from fed_dpsat.step.gradients.derived import leaves_of
from fed_dpsat.step.gradients.formats import is_channels_last, laid_out
from fed_dpsat.step.gradients.loss import ModelLoss, logits_of
from fed_dpsat.step.gradients.product import Product
from fed_dpsat.step.gradients.routes import routes_of
from fed_dpsat.step.placement import device_of, finish


@dataclass(frozen=True, kw_only=True)
class Row:
    """One layer: its first parameter, its input, its strategy, what it holds, and seconds by strategy if timed.

    A tensor that is used outside of layers has the function that used it as its layer, and its own shape.
    """

    parameter: str
    layer: str
    input_shape: tuple[int, ...]
    channels_last: bool
    strategy: str
    bytes: int
    seconds: dict[str, float]


def plan_table(
    module: nn.Module,
    inputs: Examples,
    *,
    kernels: str = "auto",
    timed: bool = False,
    repeats: int = 5,
) -> tuple[list[Row], str]:
    """Rows in the order of the forward pass on made-up ``inputs``; or why each example has its own pass.

    ``timed`` runs every strategy that fits a layer ``repeats`` times and keeps the median: norms and weighted sum.
    """
    loss, params, batch = ModelLoss(module, _any_loss, kernels=kernels), trainable(module), count(inputs)
    device = device_of(module)
    targets = torch.zeros(batch, device=device)
    if isinstance(inputs, Tensor):
        inputs = laid_out(inputs, planned.channels_last(loss, params, inputs, targets))
    leaves = {name: p.requires_grad_() for name, p in params.items()}
    tape = Tape(keep_calls=True)
    try:
        with training_on(device):
            planned.run(tape, loss, leaves, inputs, targets, routes_of(loss))
    except (Unplanned, RuntimeError, NotImplementedError) as reason:
        return [], str(reason).strip().splitlines()[0]
    names = {id(leaf): name for name, leaf in leaves.items()}
    learning = [call for call in tape.calls if _held(call)]
    sizes: dict[int, int] = {}
    for t, held in tape.found:
        sizes[id(t)] = sizes.get(id(t), 0) + _bytes(held)
    layers = [_row(call, names, sizes, repeats if timed else 0) for call in learning]
    return layers + [_open_row(t, used, names, batch) for t, used in tape.opened], ""


def _open_row(t: Tensor, used: str, names: dict[int, str], batch: int) -> Row:
    """Of a tensor that is used outside of layers, by the function ``used``."""
    return Row(
        parameter=_shown(t, names),
        layer=used,
        input_shape=tuple(t.shape),
        channels_last=False,
        strategy="rows",
        bytes=batch * t.numel() * t.element_size(),
        seconds={},
    )


def plan_text(rows: list[Row], reason: str) -> str:
    """The table to print: one line per layer, times in milliseconds; "last" says where the channels are in memory."""
    if reason:
        return f"one pass per example, which is slow: {reason}"
    lines = [f"{'parameter':32} {'layer':12} {'input':22} {'strategy':10} {'held':>9}"]
    for row in rows:
        times = ", ".join(f"{name} {1000 * s:.1f} ms" for name, s in row.seconds.items())
        shape = "x".join(map(str, row.input_shape)) + (" last" if row.channels_last else "")
        lines.append(
            f"{row.parameter:32} {row.layer:12} {shape:22} {row.strategy:10} {row.bytes / 1e6:6.2f} MB {times}".rstrip()
        )
    return "\n".join(lines)


def _any_loss(outputs: Any, targets: Tensor) -> Tensor:
    return logits_of(outputs).flatten(1).square().sum(1)


def _held(call: Call) -> list[Tensor]:
    return [t for t in (call.weight, call.bias) if t is not None and t.requires_grad]


def _bytes(held: Contribution) -> int:
    """Of per-example gradients, or of the factors that they are products of."""
    if isinstance(held, Parts):
        return sum(map(_bytes, held.parts))
    if isinstance(held, Product):
        return held.inputs.nbytes + held.outputs.nbytes
    return held.data.nbytes if isinstance(held, Rows) else 0


def _row(call: Call, names: dict[int, str], sizes: dict[int, int], repeats: int) -> Row:
    held = _held(call)
    return Row(
        parameter=next((names[id(t)] for t in held if id(t) in names), _shown(held[0], names)),
        layer=call.name,
        input_shape=tuple(call.x.shape),
        channels_last=is_channels_last(call.x),
        strategy=getattr(call.layer, "strategy", "rows"),
        bytes=sum(sizes.get(id(t), 0) for t in held),
        seconds={name: _median(step, repeats) for name, step in _alternatives(call).items()} if repeats else {},
    )


def _shown(t: Tensor, names: dict[int, str]) -> str:
    """The name of a parameter, or those that ``t`` is a function of."""
    return names.get(id(t)) or "a function of " + ", ".join(names.get(id(leaf), "?") for leaf in leaves_of(t))


def _alternatives(call: Call) -> dict[str, Callable[[], Any]]:
    """A function that does norms and weighted sum of one layer, for every strategy that fits it."""
    layer, weight = call.layer, call.weight
    if weight is None or not isinstance(layer, conv.Convolution | linear.Linear):
        return {}
    strategies = ["product", "rows"] if isinstance(layer, linear.Linear) else conv.fitting(layer.geometry, call.x)
    x, w = call.x.detach(), weight.detach()
    with torch.no_grad():
        out, saved = layer.forward(x, w, None)
    factors = torch.ones(len(x), device=x.device)

    def step(strategy: str) -> None:
        found = replace(layer, strategy=strategy).backward(out, w, saved, False, ("weight",))[1]["weight"]
        found.squared_norms()
        found.weighted_sum(factors, None)
        finish(x.device)

    return {strategy: lambda strategy=strategy: step(strategy) for strategy in strategies}  # type: ignore[misc]


def _median(step: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeats // 2]
