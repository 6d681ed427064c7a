"""What a pass may not do, however it computes: carry something of one example, or of an earlier pass, into another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import custom_function_call
from torch.overrides import TorchFunctionMode

from fed_dpsat.step.gradients.contribution import Unplanned
from fed_dpsat.step.gradients.level import is_transformed

MARK = "_fed_dpsat_pass"

BACKWARD = frozenset(
    {"register_hook", "register_post_accumulate_grad_hook", "retain_grad", "backward", "grad", "requires_grad_"}
)
"""Functions that take hold of a backward pass, which computes on whole batches."""

OF_ALL = frozenset({"_is_all_true", "_is_any_true"})
"""Functions that ``vmap`` lets read the whole batch."""

OF_TORCH = frozenset({"aten", "prims"})


class InPass(TorchFunctionMode):
    """Sees each call of one pass; a subclass answers it in ``call``.

    Raises ``Unplanned`` for a tensor that another pass made, so that nothing goes from pass to pass in a tensor.
    ``raised`` is the last call that raised an error: if a module catches it, it hears of the example that led to it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._mark = object()
        self.raised = ""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Check the arguments, answer the call, and mark what it made."""
        kwargs = kwargs or {}
        given = tensors((*args, *kwargs.values())) if kwargs else tensors(args)
        for t in given:
            self.check_own(t, func)
        try:
            out = self.call(func, args, kwargs, given)
        except Exception:
            self.raised = name_of(func)
            raise
        return self.made(out, given)

    def check_own(self, t: Tensor, func: Callable[..., Any]) -> None:
        """Raise ``Unplanned`` for a tensor of another pass, and for one of examples that no call of this pass made."""
        mark = t.__dict__.get(MARK)
        if mark is not self._mark and (mark is not None or is_transformed(t)):
            raise Unplanned(f"{name_of(func)} of a tensor that another pass made, or code that shows no calls")

    def call(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], given: Sequence[Tensor]
    ) -> Any:
        """The answer to ``func`` of the arguments, whose tensors are ``given``, with this mode off."""
        return func(*args, **kwargs)

    def is_own(self, t: Tensor) -> bool:
        """Whether ``t``, which a call made, may be a function of the examples."""
        return True

    def made(self, out: Any, given: Sequence[Tensor] = ()) -> Any:
        """``out``, whose tensors are marked as this pass's; not those that were ``given``."""
        for t in (out,) if isinstance(out, Tensor) else tensors((out,)):
            if self.is_own(t) and not any(t is one for one in given):
                t.__dict__[MARK] = self._mark
        return out


def check_backward(func: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Raise ``Unplanned`` for a call after which a backward pass over a batch may run code of the module's own."""
    name = name_of(func)
    if name.partition(".")[0] in OF_ALL:
        raise Unplanned(f"{name}, which reads the whole batch")
    if name in BACKWARD:
        raise Unplanned(f"{name}, which reaches into the backward pass")
    if func is custom_function_call:
        raise Unplanned(f"{args[0].__name__}, an autograd.Function")
    if isinstance(func, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        space = str(func).partition(".")[0].partition("::")[0]
        if space not in OF_TORCH:
            raise Unplanned(f"{name}, an operation that is not torch's own")


def name_of(func: Callable[..., Any]) -> str:
    """To be shown."""
    return getattr(func, "__name__", str(func))


def writes(name: str) -> bool:
    """Whether the method ``name`` writes into its first argument."""
    inplace = name.endswith("_") and not name.endswith("__")
    return inplace or name == "__setitem__" or (name.startswith("__i") and name not in ("__int__", "__index__"))


def tensors(values: Iterable[Any]) -> list[Tensor]:
    """All tensors in ``values`` and in the lists, tuples and dictionaries among them."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += tensors(value)
        elif isinstance(value, dict):
            found += tensors(value.values())
    return found


def looked_into(function: Any) -> Callable[..., Any]:
    """``function`` without its question whether someone overrides it: we do, and want its inner calls."""
    asked = {name: lambda *_: False for name in function.__globals__ if name.startswith("has_torch_function")}
    namespace = {**function.__globals__, **asked}
    inner = type(function)(function.__code__, namespace, function.__name__, function.__defaults__, function.__closure__)
    inner.__kwdefaults__ = function.__kwdefaults__
    unchecked: Callable[..., Any] = inner
    return unchecked


BACKWARDS = {function: looked_into(function) for function in (torch.autograd.grad, torch.autograd.backward)}
