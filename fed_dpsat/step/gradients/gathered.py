"""What a tape holds, parameter by parameter: contributions of several uses, and to functions of parameters."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fed_dpsat.params import Params
from fed_dpsat.step.gradients import derived
from fed_dpsat.step.gradients.capture import Tape
from fed_dpsat.step.gradients.contribution import Contribution, Rows
from fed_dpsat.step.gradients.shared import shared


def gathered(tape: Tape, leaves: Params) -> dict[str, Contribution]:
    """The contributions of ``tape`` by parameter; those of one parameter are added up example by example."""
    names = {id(leaf): name for name, leaf in leaves.items()}
    by_name: dict[str, list[Contribution]] = {}
    functions: list[tuple[Tensor, Contribution]] = []
    for tensor, contribution in tape.found:
        if (name := names.get(id(tensor))) is not None:
            by_name.setdefault(name, []).append(contribution)
        else:
            functions.append((tensor, contribution))
    for name, more in derived.spread(functions, leaves).items():
        by_name.setdefault(name, []).extend(more)
    return {name: _together(parts) for name, parts in by_name.items()}


def _together(parts: list[Contribution]) -> Contribution:
    if len(parts) == 1:
        return parts[0]
    return shared(parts) or Rows(data=functools.reduce(torch.add, (part.rows() for part in parts)))
