"""Whether every operation of a forward pass keeps the examples of a batch apart, one operation at a time.

``vmap`` cannot mix examples; one pass over a whole batch can, and may do so only for data that no probe makes up. So
while the probe runs, each operation on a tensor that came from the batch has to give tensors that start with the batch
again, none of whose rows feels another, and may not turn such a tensor into a Python number: then neither a branch nor
a threshold can depend on other examples, whatever the data. What cannot be followed counts as mixing: an operation
that returns nothing or writes into a tensor from elsewhere, a tensor of a class of its own, one that the batch is in
although no operation was seen (compiled code), a backward pass in Python.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from fed_dpsat.step.gradients.capture import ATTENTION, Capture, Planned, Tape
from fed_dpsat.step.gradients.contribution import MAY_MIX, Unplanned
from fed_dpsat.step.gradients.course import ABOUT
from fed_dpsat.step.gradients.drawing import Drawing, Pass

UNSET = frozenset({"new_empty", "empty_like"})
"""Tensors whose numbers say nothing yet."""


class Watch(Capture):
    """A ``Capture`` that follows what came from ``inputs`` and ``targets``; raises ``Unplanned``, naming what mixes.

    ``source`` is the leaf that floating ``inputs`` are a copy of: its place in a graph tells what was not seen.
    ``known`` are parameters and buffers; ``constants``, of another pass, the other tensors that no operation made, and
    None to collect them.
    """

    def __init__(
        self,
        tape: Tape,
        plan: dict[Callable[..., Any], Callable[..., Any]],
        inputs: Tensor,
        targets: Tensor,
        source: Tensor,
        known: Iterable[Tensor],
        constants: list[Tensor] | None = None,
    ) -> None:
        super().__init__(tape, plan, len(inputs))
        self._batched: dict[int, Tensor] = {id(inputs): inputs, id(targets): targets}
        self._batch_second: set[int] = set()
        self._elsewhere: set[int] = {id(t) for t in (*known, *(constants or ()))}
        self.constants: list[Tensor] = []
        self._collects = constants is None
        self._source, self._device = source, inputs.device
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
        calls = self.drawn.calls
        if self._inside_layer or name in ABOUT:
            return super().__torch_function__(func, types, args, kwargs)
        for leaf in flat:
            self._check_seen(name, leaf)
        batched = [i for i, leaf in enumerate(flat) if self._follows(leaf)]
        if not batched:
            out = super().__torch_function__(func, types, args, kwargs)
            if self.drawn.calls > calls:
                raise Unplanned(f"{name} draws of no tensor of the batch: {MAY_MIX}")
            self._made_elsewhere(out)
            return out
        planned = func in self.plan or func is ATTENTION
        if planned:
            self._check_arguments(func, name, args, kwargs)
        # the layers that are planned for are known to keep examples apart
        looked_at = func not in self.plan and name not in UNSET
        before = [_own(leaf) for leaf in flat] if looked_at else []
        versions = [leaf._version if isinstance(leaf, Tensor) else 0 for leaf in flat]
        self._inside_layer = planned
        try:
            out = super().__torch_function__(func, types, args, kwargs)
        finally:
            self._inside_layer = False
        if name == "__get__" and not isinstance(out, Tensor):
            if isinstance(out, torch.autograd.graph.Node):
                raise Unplanned(f"a module takes hold of its backward pass (grad_fn): {MAY_MIX}")
            return out  # shape, dtype, device and their like
        for leaf, version in zip(flat, versions, strict=True):
            if isinstance(leaf, Tensor) and leaf._version != version and not self._follows(leaf):
                raise Unplanned(f"{name} writes the batch into another tensor: {MAY_MIX}")
        if out is None:
            raise Unplanned(f"{name} returns nothing: {MAY_MIX}")
        outs = [leaf for leaf in tree_flatten(out)[0] if leaf is not None]
        if self._swaps(name, args, outs):
            return out
        if any(id(flat[i]) in self._batch_second for i in batched) and not planned:
            raise Unplanned(f"{name} of a tensor whose second dimension is the batch: {MAY_MIX}")
        for number, leaf in enumerate(outs):
            self._follow(name, leaf, dimension=1 if func is ATTENTION and not number else 0)
        if looked_at:
            self._check_rows(func, name, before, [flat[i] for i in batched], batched, structure, outs, calls)
        return out

    def saw(self, losses: Tensor) -> bool:
        """Whether ``losses`` came of the batch by operations that were looked at, or have nothing of it."""
        return id(losses) in self._batched or not losses.requires_grad

    def _follows(self, leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and (id(leaf) in self._batched or id(leaf) in self._batch_second)

    def _dimension(self, leaf: Tensor) -> int:
        """Where the batch is in a tensor that is followed."""
        return 1 if id(leaf) in self._batch_second else 0

    def _follow(self, name: str, leaf: Any, dimension: int) -> None:
        if not isinstance(leaf, Tensor):
            raise Unplanned(f"{name} reads a number off the batch: {MAY_MIX}")
        if leaf.ndim <= dimension or leaf.shape[dimension] != self.batch:
            raise Unplanned(f"{name} leaves the batch dimension: {MAY_MIX}")
        self._keep.append(leaf)
        if dimension:
            self._batch_second.add(id(leaf))
        else:
            self._batched[id(leaf)] = leaf

    def _check_seen(self, name: str, leaf: Any) -> None:
        """No tensor of an unknown class, and none that the batch is in unseen."""
        if not isinstance(leaf, Tensor) or self._follows(leaf) or id(leaf) in self._elsewhere:
            return
        if type(leaf) not in (Tensor, nn.Parameter):
            raise Unplanned(f"{name} of a {type(leaf).__name__}, a tensor of a class of its own: {MAY_MIX}")
        if any(_is_of(node, self._source) or _forward_of(node) is Planned for node in _nodes(leaf)):
            raise Unplanned(f"{name} of a tensor that was made of the batch out of sight: {MAY_MIX}")
        if leaf.grad_fn is None and not self._collects:
            raise Unplanned(f"{name} of a tensor that is new in each pass, made out of sight: {MAY_MIX}")
        self.constants.append(leaf)
        self._made_elsewhere(leaf)

    def _made_elsewhere(self, out: Any) -> None:
        for leaf in tree_flatten(out)[0]:
            if isinstance(leaf, Tensor):
                self._keep.append(leaf)
                self._elsewhere.add(id(leaf))

    def _check_arguments(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The batch is the input of a layer, not its weight; in torch's attention it is the second dimension."""
        if func is ATTENTION:
            three = [*args[:3], *(kwargs[key] for key in ("query", "key", "value") if key in kwargs)]
            if not all(id(leaf) in self._batch_second for leaf in three):
                raise Unplanned(f"attention over the batch dimension: {MAY_MIX}")
            return
        inputs = args[0] if args else kwargs.get("input")
        others = tree_flatten((args[1:], {key: value for key, value in kwargs.items() if key != "input"}))[0]
        if id(inputs) in self._batch_second:
            raise Unplanned(f"{name} of a tensor whose second dimension is the batch: {MAY_MIX}")
        if any(self._follows(leaf) for leaf in others):
            raise Unplanned(f"{name} with weights that depend on the data: {MAY_MIX}")

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
        followed: list[Tensor],
        batched: list[int],
        structure: Any,
        outs: list[Tensor],
        calls: int,
    ) -> None:
        """``func`` again, with all rows but one replaced: that row of what it makes has to stay; so for each row.

        It draws again what its ``calls``-th call drew.
        """
        for row in range(self.batch):
            changed = list(before)
            for index, leaf in zip(batched, followed, strict=True):
                changed[index] = _others_changed(before[index], row, self._dimension(leaf))
            drawn = Pass(self.drawn.draws)
            drawn.calls = calls
            with torch.no_grad(), Drawing(drawn):
                args, kwargs = tree_unflatten([_own(leaf) for leaf in changed], structure)
                again = [leaf for leaf in tree_flatten(func(*args, **kwargs))[0] if leaf is not None]
            for first, second in zip(outs, again, strict=True):
                kept, found = (t.detach().select(self._dimension(first), row) for t in (first, second))
                if not torch.allclose(kept, found, rtol=1e-4, atol=1e-6, equal_nan=True):
                    raise Unplanned(f"{name} feels other rows of the batch: {MAY_MIX}")


def check_backward(losses: Tensor) -> None:
    """Raise ``Unplanned`` for a backward pass in Python, which may do anything with the gradients of a batch."""
    for node in _nodes(losses):
        function = _forward_of(node)
        if function not in (None, Planned):
            raise Unplanned(f"{getattr(function, '__name__', function)} has a backward pass of its own: {MAY_MIX}")


def _others_changed(rows: Tensor, row: int, dimension: int) -> Tensor:
    """``rows`` with all but ``row`` replaced: by other numbers, or by those of other rows where these are whole."""
    changed = rows.flip(dimension)
    if rows.is_floating_point() or rows.is_complex():
        changed = changed * -1.5 + 0.25
    elif rows.dtype == torch.bool:
        changed = ~rows
    changed.select(dimension, row).copy_(rows.select(dimension, row))
    return changed


def _own(leaf: Any) -> Any:
    """In memory of its own: ``func`` may write into it."""
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _nodes(tensor: Tensor) -> Iterator[Any]:
    """Each node of the graph behind ``tensor`` once."""
    waiting: list[Any] = [tensor.grad_fn]
    seen: set[Any] = {None, *waiting}
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        yield node
        for behind, _ in node.next_functions:
            if behind not in seen:
                seen.add(behind)
                waiting.append(behind)


def _forward_of(node: Any) -> Any:
    """The class of an ``autograd.Function``; None for a node of torch's own."""
    return getattr(type(node), "_forward_cls", None)


def _is_of(node: Any, leaf: Tensor) -> bool:
    return getattr(node, "variable", None) is leaf
