"""One line for a failure in a trial: the object that the error is blamed on, the place in it, and the remedy.

The innermost frame that belongs to an object decides. A frame belongs to an object if it is a method of one
(model, optimizer, clipping rule, strategy, attack), or if its function is declared with ``blamed_on``.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import CodeType, FunctionType
from typing import TypeVar, cast

import torch
from torch import nn

from fed_dpsat.client.build import Experiment
from fed_dpsat.client.evaluation import passed
from fed_dpsat.errors import InputError, ModelError, RunError, SettingError, place
from fed_dpsat.step.gradients.per_example import clipped_gradient_sum
from fed_dpsat.step.optimizers.base import links
from fed_dpsat.step.optimizers.chain import described
from fed_dpsat.step.stacked import stacked_sum

LONGEST = 300
ENGINES = {clipped_gradient_sum.__code__, stacked_sum.__code__}
EVALUATION = {passed.__code__}
MARKED: dict[CodeType, str] = {}
"""Functions that were declared with ``blamed_on``, and the kind of object that each calls."""

WIDTHS: tuple[tuple[type[nn.Module], str, int], ...] = (
    (nn.Linear, "in_features", -1),
    (nn.Conv1d, "in_channels", -2),
    (nn.Conv2d, "in_channels", -3),
    (nn.Conv3d, "in_channels", -4),
)
"""Layers, the attribute with the width of their inputs, and the axis of the inputs that has it."""

REMEDIES = {
    "clipping": "fed_dpsat.testing.check_clipping finds more",
    "optimizer": "run fed_dpsat.testing.check_optimizer on it",
    "strategy": "fed_dpsat.testing.check_strategy finds more",
    "task": "see fed_dpsat.tasks.base.Task",
    "attack": "see fed_dpsat.lab.attacks.Attack",
    "engine": "check_model and check_clipping of fed_dpsat.testing find whether model or clipping rule is wrong",
    "codec": "set update_codec=fp32",
}

PLUGGED = {"model", "clipping", "optimizer", "strategy", "attack", "task"}
"""Kinds of objects whose error has a place in the code of a user."""

DIVERGED = ("NaN or inf", "numbers beyond")
"""How a check describes numbers that a smaller step may avoid."""

Function = TypeVar("Function", bound=Callable[..., object])


def blamed_on(kind: str) -> Callable[[Function], Function]:
    """A decorator: an error in this function, and in no object that it calls, is blamed on ``kind``."""

    def mark(function: Function) -> Function:
        MARKED[cast(FunctionType, function).__code__] = kind
        return function

    return mark


def optimizer_remedy(seen: str) -> str:
    """The remedy for an optimizer whose result is as ``seen``; a lower lr is one for numbers that grow."""
    lower = "lower lr, and " if any(words in seen for words in DIVERGED) else ""
    return f"{lower}{REMEDIES['optimizer']}"


class TrialError(InputError):
    """A failure on made-up examples; nothing was charged."""


class Unfit(Exception):
    """A fault of a ``kind`` of object that raised no error itself; ``seen`` describes it."""

    def __init__(self, kind: str, seen: str, remedy: str) -> None:
        super().__init__(seen)
        self.kind, self.seen, self.remedy = kind, seen, remedy


@contextmanager
def told(experiment: Experiment, objects: Sequence[str] = (), strategy: object = None) -> Iterator[None]:
    """Turn an error inside into a ``TrialError`` of one line; ``objects`` names those given in Python."""
    try:
        yield
    except (TrialError, SettingError):  # already one line with a remedy
        raise
    except Unfit as unfit:
        raise TrialError(_said(experiment, unfit.kind, objects, unfit.seen, unfit.remedy)) from None
    except Exception as error:  # a plug-in raises any error
        kind, where, remedy = _blamed(error, experiment, strategy)
        own = isinstance(error, InputError | RunError)
        misfit = _misfit(error) if kind == "model" and isinstance(error, RuntimeError) else ""
        line = f"{_line(error)}{place(error) if kind in PLUGGED else ''}"
        detail = f"{where}{error}" if own else f"{where}{misfit or line}"
        raise TrialError(_said(experiment, kind, objects, detail, "" if own and ";" in detail else remedy)) from error


def _said(experiment: Experiment, kind: str, objects: Sequence[str], seen: str, remedy: str) -> str:
    config = experiment.config
    values = {
        **config.settings(),
        "codec": config.update_codec,
        "optimizer": described(config.optimizer, config.base_optimizer),
    }
    named = f"{kind}={values[kind]!r}" if kind in values else kind
    name = f"the {kind} that was given" if kind in objects else named
    end = f"; {remedy}" if remedy else ""
    return f"{name} fails on made-up examples of {experiment.dataset.name}: {seen}{end} (nothing was charged)"


def _line(error: BaseException) -> str:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}"[:LONGEST] if first else type(error).__name__


def _blamed(error: BaseException, experiment: Experiment, strategy: object) -> tuple[str, str, str]:
    """The kind of object that ``error`` is blamed on, the place in it, and the remedy, by the innermost such frame."""
    halves = [one for one in (strategy, experiment.half) if one is not None]
    kinds: dict[str, set[type]] = {
        "clipping": {type(experiment.clipping)},
        "optimizer": {type(link) for link in links(experiment.optimizer)},
        "strategy": {part for half in halves for part in type(half).__mro__} - {object},
        "attack": {type(experiment.attackers.attack)} if experiment.attackers else set(),
        "task": {type(experiment.task)},
    }
    kind, where, engine, root = "the run", "", False, None
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    for frame in frames:
        owner = frame.f_locals.get("self")
        if frame.f_code in ENGINES:
            kind, where, engine = "engine", "", True
        elif frame.f_code in EVALUATION:
            kind, where, engine = "model", "in evaluation: ", False
        elif marked := MARKED.get(frame.f_code):
            kind, where = marked, ""
        elif isinstance(owner, nn.Module):
            root = owner if root is None else root
            kind, where = "model", _layer(root, owner)
        elif found := [name for name, types in kinds.items() if type(owner) in types]:
            kind, where = found[0], f"{frame.f_code.co_name}: "
    if engine and (kind == "model" or isinstance(error, ModelError)):
        kind = "model"
        remedy = (
            f"its forward pass works, its per-example gradients (engine={experiment.config.engine}) do not: compute "
            "that layer in another way"
        )
        return kind, where, remedy
    if kind == "model":
        return kind, where, f"its inputs are {_inputs_of(experiment)}: make it take those, or choose a model that does"
    return kind, where, REMEDIES.get(kind, "")


def _misfit(error: RuntimeError) -> str:
    """The width that the innermost layer has and the width that it gets, if they differ; otherwise empty."""
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        layer, given = frame.f_locals.get("self"), frame.f_locals.get("input")
        for kind, name, axis in WIDTHS:
            if isinstance(layer, kind) and isinstance(given, torch.Tensor) and given.ndim >= -axis:
                width, gets = getattr(layer, name), given.shape[axis]
                return f"its {name} is {width}, and it gets {gets}" if width != gets else ""
    return ""


def _inputs_of(experiment: Experiment) -> str:
    x, _ = experiment.dataset.train.batch(torch.arange(0))
    if isinstance(x, dict):
        named = (
            f"{name} {str(t.dtype).removeprefix('torch.')} [B, {', '.join(map(str, t.shape[1:]))}]"
            for name, t in x.items()
        )
        return f"keyword arguments {', '.join(named)}"
    kind = str(x.dtype).removeprefix("torch.")
    normalised = ", normalised" if experiment.dataset.train.mean else ""
    return f"{kind} [B, {', '.join(map(str, x.shape[1:]))}]{normalised}"


def _layer(root: nn.Module, layer: nn.Module) -> str:
    name = next((name for name, part in root.named_modules() if part is layer), "")
    return f"layer {name} ({type(layer).__name__}): " if name else f"{type(layer).__name__}: "
