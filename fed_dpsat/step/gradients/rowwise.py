"""Functions of the whole batch that keep its rows apart, for which ``vmap`` has no rule on a CPU or a slow one.

================================ ===========================================================================
function                         one call of torch's own kernel for all examples
================================ ===========================================================================
``scaled_dot_product_attention`` examples are more of its leading dimensions; with dropout it is written out
``cross_entropy``                 of classes, without weights for them
pools, ``pad`` and ``cat`` of     the channels of an image stay side by side in memory, if they were
images
================================ ===========================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fed_dpsat.step.gradients.level import Level


def _attention(
    level: Level,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """``query[..., L, E]`` and so on, of each example."""
    given = [query, key, value] if attn_mask is None else [query, key, value, attn_mask]
    if dropout_p > 0 or not any(map(level.wraps, given)) or query.ndim < 2:
        return NotImplemented
    leading = max(t.ndim for t in given) - 2
    with level.below():
        q, k, v, *mask = (_folded(level.whole(t), leading) for t in given)
        sizes = [t.shape[0] for t in (q, k, v, *mask)]
        if len(set(sizes)) > 1:
            return NotImplemented
        out = functional.scaled_dot_product_attention(
            q, k, v, mask[0] if mask else None, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )
        heads = out.shape[-3:-2] if leading else ()
        shape = torch.broadcast_shapes(*(t.shape[:-3] for t in (query, key, value)))  # type: ignore[no-untyped-call]
        return level.wrap(out.reshape(level.batch, *shape, *heads, *out.shape[-2:]))


def _folded(whole: Tensor, leading: int) -> Tensor:
    """``[B, *dims, H, L, E]`` as ``[B * dims, H, L, E]``; fewer than ``leading`` dimensions count as ones."""
    missing = leading - (whole.ndim - 3)
    whole = whole.reshape(len(whole), *[1] * missing, *whole.shape[1:])
    return whole if leading < 2 else whole.reshape(-1, *whole.shape[-3:])


def _cross_entropy(
    level: Level,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: None = None,
    ignore_index: int = -100,
    reduce: None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """``input[N, K, *], target[N, *]`` of each example."""
    if weight is not None or size_average is not None or reduce is not None or not level.wraps(input):
        return NotImplemented
    if input.ndim < 2 or target.ndim != input.ndim - 1 or target.is_floating_point() or reduction not in REDUCTIONS:
        return NotImplemented
    with level.below():
        classes = level.whole(target)
        found = functional.cross_entropy(
            level.whole(input).flatten(0, 1),
            classes.flatten(0, 1),
            reduction="none",
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
        ).view_as(classes)
        if reduction != "none":
            found = found.flatten(1).sum(1)
        if reduction == "mean":
            found = found / (classes != ignore_index).flatten(1).sum(1)
        return level.wrap(found)


REDUCTIONS = ("none", "sum", "mean")


def _of_images(func: Callable[..., Tensor]) -> Callable[..., Any]:
    """``func(x[N, C, H, W], ...)``, image by image; an example is one."""

    def answer(level: Level, input: Tensor, *others: Any, **more: Any) -> Any:
        if not level.wraps(input) or input.ndim != 4 or len(input) != 1:
            return NotImplemented
        with level.below():
            out = func(level.whole(input).squeeze(1), *others, **more)
            return level.wrap(out.unsqueeze(1)) if isinstance(out, Tensor) else NotImplemented

    return answer


def _pad(level: Level, input: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Any:
    """Of an image, at its sides and channels: eight numbers would pad the batch."""
    if len(pad) > 6:
        return NotImplemented
    return _of_images(functional.pad)(level, input, pad, mode, value)


def _cat(level: Level, tensors: Sequence[Tensor], dim: int = 0) -> Any:
    """Of images along their channels or sides."""
    if dim not in (1, 2, 3, -1, -2, -3) or not all(t.ndim == 4 and len(t) == 1 for t in tensors):
        return NotImplemented
    with level.below():
        return level.wrap(torch.cat([level.whole(t).squeeze(1) for t in tensors], dim).unsqueeze(1))


ROWWISE: dict[Callable[..., Any], Callable[..., Any]] = {
    functional.scaled_dot_product_attention: _attention,
    functional.cross_entropy: _cross_entropy,
    torch.cat: _cat,
    functional.pad: _pad,
    **{
        func: _of_images(func)
        for func in (
            *(functional.max_pool2d, torch.max_pool2d, functional.avg_pool2d),
            *(functional.adaptive_avg_pool2d, functional.adaptive_max_pool2d),
        )
    },
}
