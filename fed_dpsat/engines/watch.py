"""Whether every operation of a forward pass keeps the examples of a batch apart, one operation at a time.

``vmap`` cannot mix examples; one pass over a whole batch can, and may do so only for data that no probe makes up. So
while the probe runs, each operation on a tensor that came from the batch has to give tensors that start with the batch
again, whose row 1 does not feel the other rows, and may not turn such a tensor into a Python number: then neither a
branch nor a threshold can depend on other examples, whatever the data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from fed_dpsat.engines.capture import ATTENTION, Capture, Tape
from fed_dpsat.engines.contribution import MAY_MIX, Unplanned
from fed_dpsat.placement import generator_states, rewind

ABOUT = frozenset(
    {"size", "dim", "numel", "__len__", "is_floating_point", "is_complex", "is_contiguous", "stride", "element_size"}
    | {"nelement", "data_ptr", "is_signed", "has_names"}
)
"""Methods that say something about a tensor and nothing of its numbers."""

UNSET = frozenset({"new_empty", "empty_like"})
"""Tensors whose numbers say nothing yet."""


class Watch(Capture):
    """A ``Capture`` that follows what came from ``inputs`` and ``targets``; raises ``Unplanned``, naming what mixes."""

    def __init__(
        self, tape: Tape, plan: dict[Callable[..., Any], Callable[..., Any]], inputs: Tensor, targets: Tensor
    ) -> None:
        super().__init__(tape, plan, len(inputs))
        self._batched: dict[int, Tensor] = {id(inputs): inputs, id(targets): targets}
        self._batch_second: set[int] = set()
        self._device = inputs.device
        self._keep: list[Tensor] = []  # so that no id is given away
        self._inside_layer = False
        self.functions: set[object] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call ``func``, and look at what it made of batched tensors."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        self.functions.add(func)
        flat, structure = tree_flatten((args, kwargs))
        batched = [i for i, leaf in enumerate(flat) if self._follows(leaf)]
        calls = self.drawn.calls
        if not batched or name in ABOUT or self._inside_layer:
            out = super().__torch_function__(func, types, args, kwargs)
            if self.drawn.calls > calls and not batched and not self._inside_layer:
                raise Unplanned(f"{name} draws of no tensor of the batch: {MAY_MIX}")
            return out
        planned = func in self.plan or func is ATTENTION
        before = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in flat]
        states = generator_states(self._device)
        self._inside_layer = planned
        try:
            out = super().__torch_function__(func, types, args, kwargs)
        finally:
            self._inside_layer = False
        if name == "__get__" and not isinstance(out, Tensor):
            return out  # shape, dtype, device and their like
        outs = [leaf for leaf in tree_flatten(out)[0] if leaf is not None]
        if func is ATTENTION:
            self._batch_second.add(id(outs[0]))
            self._keep.append(outs[0])
            outs = outs[1:]
        if self._swaps(name, args, outs):
            return out
        if any(id(flat[i]) in self._batch_second for i in batched) and not planned:
            raise Unplanned(f"{name} of a tensor whose second dimension is the batch: {MAY_MIX}")
        for leaf in outs:
            if not isinstance(leaf, Tensor):
                raise Unplanned(f"{name} reads a number off the batch: {MAY_MIX}")
            if leaf.ndim < 1 or leaf.shape[0] != self.batch:
                raise Unplanned(f"{name} leaves the batch dimension: {MAY_MIX}")
            self._batched[id(leaf)] = leaf
        drawn = self.drawn.calls > calls or name in UNSET
        if not planned and not drawn:  # the layers that are planned for are known to keep examples apart
            self._check_rows(func, name, before, batched, structure, outs, states)
        return out

    def _follows(self, leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and (id(leaf) in self._batched or id(leaf) in self._batch_second)

    def _swaps(self, name: str, args: tuple[Any, ...], outs: list[Any]) -> bool:
        """A transpose of the first two dimensions, which torch's attention asks for: there, or back again."""
        if name != "transpose" or set(args[1:]) != {0, 1}:
            return False
        (out,) = outs
        self._keep.append(out)
        if id(args[0]) in self._batch_second:
            self._batched[id(out)] = out
        else:
            self._batch_second.add(id(out))
        return True

    def _check_rows(
        self,
        func: Any,
        name: str,
        before: list[Any],
        batched: list[int],
        structure: Any,
        outs: list[Tensor],
        states: tuple[Tensor, ...],
    ) -> None:
        """``func`` again, with rows other than row 1 replaced: row 1 of what it makes has to stay."""
        for index in batched:
            rows = before[index]
            if rows.ndim < 1 or rows.shape[0] != self.batch or not rows.is_floating_point():
                continue
            own = rows[1].clone()
            rows = before[index] = rows.flip(0) * -1.5 + 0.25
            rows[1] = own
        now = generator_states(self._device)
        rewind(self._device, states)
        with torch.no_grad(), torch._C.DisableTorchFunction():
            args, kwargs = tree_unflatten(before, structure)
            again = [leaf for leaf in tree_flatten(func(*args, **kwargs))[0] if leaf is not None]
        rewind(self._device, now)
        for first, second in zip(outs, again, strict=True):
            if not torch.allclose(first[1].detach(), second[1], rtol=1e-4, atol=1e-6, equal_nan=True):
                raise Unplanned(f"{name} feels other rows of the batch: {MAY_MIX}")
