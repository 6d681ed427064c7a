"""Calls of a model that draw random numbers, answered with those of each example (``fed_dpsat.step.draws``).

================================================== ==================================================
a call                                             is answered
================================================== ==================================================
dropout of any kind, ``bernoulli``, ``rand_like``, in one pass over the batch: row i has the draws of
``randn_like``, ``uniform_``, ``normal_``,         example i; so has example i under ``vmap``, and
``exponential_``, ``rrelu``, attention's dropout   alone
``rand``, ``randn``, ``gumbel_softmax``            under ``vmap``
a generator of the call's own; any other draw      not: the pass is thrown away, and each example has
from torch, ``random`` or ``numpy.random``         one of its own, with all generators seeded (``loop``)
================================================== ==================================================

A pass counts its calls; in one step an example's ``n``-th call draws the same wherever the gradient is taken. So its
loss is one fixed function of the parameters, also for an optimizer that asks at several points.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fed_dpsat.step import draws as words_of
from fed_dpsat.step.draws import Draws
from fed_dpsat.step.generators import Mark
from fed_dpsat.step.gradients.contribution import Unplanned
from fed_dpsat.step.gradients.level import Level
from fed_dpsat.step.gradients.passes import looked_into
from fed_dpsat.step.placement import is_card

Answer = Any
"""A tensor; ``NotImplemented`` for a call that draws nothing, or nothing that is known here: torch answers it."""


class Undrawn(Unplanned):
    """A pass draws in a way that cannot be answered example by example; the message says which."""


class Pass:
    """One forward pass within ``level``: whose draws, and how many calls there were."""

    def __init__(self, draws: Draws, level: Level) -> None:
        self.draws, self.level, self.calls = draws, level, 0

    def begin(self) -> None:
        """What comes draws again what came first."""
        self.calls = 0

    def words(self, shape: tuple[int, ...], device: torch.device, each: int = 1) -> Tensor:
        """int32 ``[*shape, each]``, of each example: of the pass's next call."""
        return self.own(torch.from_numpy(self._next(math.prod(shape) * each)), (*shape, each), device)

    def thinning(self, shape: tuple[int, ...], p: float, device: torch.device) -> Tensor:
        """float32 ``[*shape]``, of each example: what a dropout multiplies by."""
        return self.own(torch.from_numpy(words_of.thinning(self._next(math.prod(shape)), p)), shape, device)

    def _next(self, count: int) -> NDArray[np.int32]:
        call, self.calls = self.calls, self.calls + 1
        return self.draws.words(call, count)

    def own(self, rows: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """``rows[B, count]`` as one tensor of ``shape`` for each example."""
        return self.level.wrap(rows.to(device).reshape(len(self.draws), *shape))

    def answer(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """``func`` of the arguments, with the draws of the examples if it draws; raises ``Undrawn``."""
        if kwargs.get("generator") is not None:
            raise Undrawn(f"{getattr(func, '__name__', func)} with a generator of its own")
        if func in ANSWERS:
            made = ANSWERS[func](self, *args, **kwargs)
            if made is not NotImplemented:
                return made
        if (name := getattr(func, "__name__", "")) in RANDOM:  # also where a model seeds it and sets all back
            raise Undrawn(f"{name}, whose random numbers one pass cannot tell apart")
        return func(*args, **kwargs)


def check_drawn(mark: Mark) -> None:
    """Raise ``Undrawn``, and set the generators back, if a pass since ``mark`` drew from them."""
    if mark.moved():
        raise Undrawn("it draws random numbers in a way that one pass cannot tell apart")


def _own(generator: object) -> None:
    if generator is not None:
        raise Undrawn("random numbers of a generator of the model's own")


def _dropout(drawn: Pass, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Answer:
    return _thinned(drawn, input, tuple(input.shape), p, training, inplace)


def _feature_dropout(
    drawn: Pass, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Answer:
    return NotImplemented if input.ndim < 2 else _thinned(drawn, input, _per_feature(input, 2), p, training, inplace)


def _dropout1d(drawn: Pass, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Answer:
    return _unbatched(drawn, input, 1, p, training, inplace)


def _dropout3d(drawn: Pass, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Answer:
    return _unbatched(drawn, input, 3, p, training, inplace)


def _unbatched(drawn: Pass, input: Tensor, spatial: int, p: float, training: bool, inplace: bool) -> Answer:
    """Torch takes an input of one dimension less for one without a batch, whose first is that of the channels."""
    if input.ndim not in (spatial + 1, spatial + 2):
        return NotImplemented
    return _thinned(drawn, input, _per_feature(input, input.ndim - spatial), p, training, inplace)


def _per_feature(input: Tensor, led: int) -> tuple[int, ...]:
    return (*input.shape[:led], *[1] * (input.ndim - led))


def _thinned(drawn: Pass, input: Tensor, shape: tuple[int, ...], p: float, training: bool, inplace: bool) -> Answer:
    if not training or not 0 < p <= 1 or not input.is_floating_point():
        return NotImplemented
    if input.dtype == torch.float32 and not is_card(input.device):
        mask = drawn.thinning(shape, p, input.device)
    else:
        mask = words_of.kept(drawn.words(shape, input.device)[..., 0], p).to(input.dtype)
        if p < 1:
            mask = mask.mul_(1 / (1 - p))
    return input.mul_(mask) if inplace else input * mask


ALPHA = 1.7580993408473766
"""-SELU at minus infinity (Klambauer et al. 2017)."""


def _alpha_dropout(drawn: Pass, input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False) -> Answer:
    return _alpha(drawn, input, tuple(input.shape), p, training, inplace)


def _feature_alpha(drawn: Pass, input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False) -> Answer:
    return _alpha(drawn, input, _per_feature(input, 2), p, training, inplace)


def _alpha(drawn: Pass, input: Tensor, shape: tuple[int, ...], p: float, training: bool, inplace: bool) -> Answer:
    if not training or not 0 < p < 1 or not input.is_floating_point():
        return NotImplemented  # at p 1 zeros, without a draw
    mask = words_of.kept(drawn.words(shape, input.device)[..., 0], p).to(input.dtype)
    scale = 1 / math.sqrt((ALPHA**2 * p + 1) * (1 - p))
    shift = (mask - 1) * (ALPHA * scale) + ALPHA * scale * p
    return input.mul_(mask * scale).add_(shift) if inplace else input * (mask * scale) + shift


def _bernoulli(
    drawn: Pass, input: Tensor, p: float | None = None, *, generator: object = None, out: Tensor | None = None
) -> Answer:
    _own(generator)
    if out is not None:
        return NotImplemented
    words = drawn.words(tuple(input.shape), input.device)[..., 0]
    return (words_of.ones(words, input) if p is None else words_of.kept(words, 1 - p)).to(input.dtype)


def _bernoulli_(drawn: Pass, input: Tensor, p: float | Tensor = 0.5, *, generator: object = None) -> Answer:
    _own(generator)
    words = drawn.words(tuple(input.shape), input.device)[..., 0]
    return input.copy_(words_of.ones(words, p) if isinstance(p, Tensor) else words_of.kept(words, 1 - p))


def _uniforms(drawn: Pass, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return words_of.uniforms(drawn.words(shape, device, words_of.words_each(dtype)), dtype)


def _normals(drawn: Pass, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return words_of.normals(drawn.words(shape, device, 2), dtype)


Numbers = Callable[[Pass, tuple[int, ...], torch.dtype, torch.device], Tensor]


def _like(numbers: Numbers) -> Callable[..., Answer]:
    def answer(
        drawn: Pass,
        input: Tensor,
        *,
        dtype: torch.dtype | None = None,
        device: object = None,
        memory_format: object = None,
        **others: object,
    ) -> Answer:
        _own(others.pop("generator", None))
        dtype = dtype or input.dtype
        if any(others.values()) or dtype not in words_of.BITS:
            return NotImplemented
        where = input.device if device is None else torch.device(device)  # type: ignore[call-overload]
        return numbers(drawn, tuple(input.shape), dtype, where)

    return answer


def _of_size(numbers: Numbers) -> Callable[..., Answer]:
    def answer(
        drawn: Pass,
        *size: Any,
        dtype: torch.dtype | None = None,
        device: object = None,
        **others: Any,
    ) -> Answer:
        _own(others.pop("generator", None))
        size = others.pop("size", size)
        shape = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else tuple(size)
        dtype = dtype or torch.get_default_dtype()
        if any(others.values()) or dtype not in words_of.BITS:
            return NotImplemented
        where = torch.device(device) if device is not None else torch.get_default_device()  # type: ignore[call-overload]
        return numbers(drawn, shape, dtype, where)

    return answer


def _empty(drawn: Pass, *size: Any, dtype: Any = None, device: Any = None, **others: Any) -> Answer:
    """Room of each example's own, since it is made to be written to (torchvision's ``stochastic_depth``)."""
    size = others.pop("size", size)
    shape = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else tuple(size)
    if any(others.values()) or device == "meta":
        return NotImplemented
    with drawn.level.below():
        whole = torch.empty((len(drawn.draws), *shape), dtype=dtype, device=device)
    return drawn.level.wrap(whole)


def _uniform_(drawn: Pass, input: Tensor, *bounds: float, generator: object = None, **named: float) -> Answer:
    _own(generator)
    low, high = {"from": 0.0, "to": 1.0, **dict(zip(("from", "to"), bounds, strict=False)), **named}.values()
    if input.dtype not in words_of.BITS:
        return NotImplemented
    made = _uniforms(drawn, tuple(input.shape), input.dtype, input.device)
    return input.copy_(made * (high - low) + low)


def _normal_(drawn: Pass, input: Tensor, mean: float = 0.0, std: float = 1.0, *, generator: object = None) -> Answer:
    _own(generator)
    if input.dtype not in words_of.BITS:
        return NotImplemented
    return input.copy_(_normals(drawn, tuple(input.shape), input.dtype, input.device) * std + mean)


def _normal(
    drawn: Pass,
    mean: Tensor | float,
    std: Tensor | float = 1.0,
    *size: Any,
    generator: object = None,
    out: Tensor | None = None,
    **others: Any,
) -> Answer:
    _own(generator)
    tensors = [t for t in (mean, std) if isinstance(t, Tensor)]
    if out is not None or size or others or not tensors or tensors[0].dtype not in words_of.BITS:
        return NotImplemented
    shape = torch.broadcast_shapes(*(t.shape for t in tensors))  # type: ignore[no-untyped-call]
    return _normals(drawn, tuple(shape), tensors[0].dtype, tensors[0].device) * std + mean


def _exponential_(drawn: Pass, input: Tensor, lambd: float = 1.0, *, generator: object = None) -> Answer:
    _own(generator)
    if input.dtype not in words_of.BITS:
        return NotImplemented
    wide = torch.promote_types(input.dtype, torch.float32)
    made = _uniforms(drawn, tuple(input.shape), torch.float64, input.device).neg().log1p().neg().to(wide)
    return input.copy_(made.clamp(min=torch.finfo(wide).tiny) / lambd)


def _rrelu(
    drawn: Pass,
    input: Tensor,
    lower: float = 1.0 / 8,
    upper: float = 1.0 / 3,
    training: bool = False,
    inplace: bool = False,
) -> Answer:
    if not training or input.dtype not in words_of.BITS:
        return NotImplemented
    slope = _uniforms(drawn, tuple(input.shape), input.dtype, input.device) * (upper - lower) + lower
    slope = torch.where(input > 0, 1, slope)
    return input.mul_(slope) if inplace else input * slope


def _attention_product(
    drawn: Pass,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Answer:
    """As torch's own documentation writes it out, with a dropout of ours."""
    if not 0 < dropout_p <= 1:
        return NotImplemented
    if enable_gqa:
        key, value = (t.repeat_interleave(query.size(-3) // t.size(-3), -3) for t in (key, value))
    weights = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.size(-1)) if scale is None else scale)
    masked = attn_mask is not None
    if is_causal:
        attn_mask = torch.ones(weights.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        weights = weights.masked_fill(attn_mask.logical_not(), -math.inf)
    elif attn_mask is not None:
        weights = weights + attn_mask
    if masked:  # who may look at nobody sees zeros
        nobody = weights.isneginf().all(-1, keepdim=True)
        weights = weights.masked_fill(nobody, 0).softmax(-1).masked_fill(nobody, 0)
    else:
        weights = weights.softmax(-1)
    thinned = _dropout(drawn, weights, dropout_p)
    return thinned if thinned is NotImplemented else thinned @ value


LOOKED_INTO = {
    function: looked_into(function) for function in (functional.multi_head_attention_forward, functional.gumbel_softmax)
}
"""What torch writes in Python around layers and draws, to be called call by call."""

RANDOM = frozenset(
    {"rand", "randn", "rand_like", "randn_like", "randint", "randint_like", "randperm", "normal", "bernoulli"}
    | {"multinomial", "poisson", "binomial", "native_dropout", "_standard_gamma", "_sample_dirichlet"}
    | {"bernoulli_", "uniform_", "normal_", "exponential_", "cauchy_", "geometric_", "log_normal_", "random_"}
    | {f"fractional_max_pool{n}d{more}" for n in (2, 3) for more in ("", "_with_indices")}
)
"""Functions that draw whatever they are given."""

ANSWERS: dict[Callable[..., Any], Callable[..., Answer]] = {
    functional.dropout: _dropout,
    torch.dropout: _dropout,
    functional.dropout1d: _dropout1d,
    functional.dropout2d: _feature_dropout,
    functional.dropout3d: _dropout3d,
    torch.feature_dropout: _feature_dropout,
    functional.alpha_dropout: _alpha_dropout,
    functional.feature_alpha_dropout: _feature_alpha,
    torch.bernoulli: _bernoulli,
    Tensor.bernoulli: _bernoulli,
    Tensor.bernoulli_: _bernoulli_,
    Tensor.uniform_: _uniform_,
    Tensor.normal_: _normal_,
    Tensor.exponential_: _exponential_,
    torch.rand_like: _like(_uniforms),
    torch.randn_like: _like(_normals),
    torch.normal: _normal,
    torch.empty: _empty,
    torch.rand: _of_size(_uniforms),
    torch.randn: _of_size(_normals),
    functional.rrelu: _rrelu,
    functional.scaled_dot_product_attention: _attention_product,
}
