"""The pass of one example by itself: it draws what it draws in a pass over a batch, and keeps nothing for the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fed_dpsat.step.draws import Draws
from fed_dpsat.step.gradients.drawing import ANSWERS, LOOKED_INTO, Pass
from fed_dpsat.step.gradients.level import Level
from fed_dpsat.step.gradients.passes import MARK, InPass, looked_into, name_of, tensors, writes
from fed_dpsat.step.gradients.rnn import CELLS

BACKWARDS = {function: looked_into(function) for function in (torch.autograd.grad, torch.autograd.backward)}


class One(Level):
    """The one example is what torch computes on: no level is opened."""

    def __init__(self) -> None:
        super().__init__(1)

    @contextmanager
    def below(self) -> Iterator[None]:
        """Nothing is below."""
        yield

    def wrap(self, whole: Tensor) -> Tensor:
        """``[*shape]`` of ``whole[1, *shape]``."""
        return whole.squeeze(0)


class Alone(InPass):
    """Marks what an example makes, also what it writes into, and answers its draws with ``draws``, those of it alone.

    Whether the others of its batch are beside it or not, its draws are the same: one example that needs a pass of its
    own must not change what others draw. What only the generators answer is seeded, and so is a block that
    ``torch.utils.checkpoint`` computes twice.
    """

    def __init__(self, draws: Draws) -> None:
        super().__init__()
        self.drawn = Pass(draws, One())

    def call(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], given: Sequence[Tensor]
    ) -> Any:
        """Torch's answer, or that of ``draws``; code of the module's that a backward pass runs is looked at too."""
        within = BACKWARDS.get(func) or LOOKED_INTO.get(func)
        if within is not None:
            with self:
                return within(*args, **kwargs)
        out = NotImplemented
        if func in ANSWERS and kwargs.get("generator") is None and not _computed_again():
            out = ANSWERS[func](self.drawn, *args, **kwargs)
        if out is NotImplemented and func in CELLS and torch.is_autocast_enabled(args[0].device.type):
            with torch.autocast(args[0].device.type, enabled=False):  # torch has no such layers in bfloat16 on a CPU
                out = func(*tree_map(lambda t: t.float() if isinstance(t, Tensor) else t, args), **kwargs)
        elif out is NotImplemented:
            out = func(*args, **kwargs)
        for t in tensors((args[:1] if writes(name_of(func)) else (), kwargs.get("out"))):
            t.__dict__[MARK] = self._mark
        return out


def _computed_again() -> bool:
    """Whether saved tensors are packed: ``torch.utils.checkpoint`` calls a block again to unpack them."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
