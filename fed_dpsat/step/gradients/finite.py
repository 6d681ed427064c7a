"""What is not finite is dropped before anything is multiplied: 0 * inf is NaN."""

from __future__ import annotations

import torch
from torch import Tensor

from fed_dpsat.params import Params
from fed_dpsat.step.clipping import ClippingRule
from fed_dpsat.step.clipping.bound import bounded_factors

LEAST, BLOCK = 64, 1024


def squared_norm_rows(rows: Tensor) -> Tensor:
    """``rows[B, ...] -> squared norms[B]`` in float64; float32 sums of a million squares are off by 1e-5."""
    if rows.ndim == 3 and rows.shape[2] > LEAST:
        return filter_squares(rows).sum(1)
    flat = rows.reshape(len(rows), -1)
    if flat.shape[1] <= BLOCK:
        return _squares(flat)
    whole = flat.shape[1] // BLOCK * BLOCK
    return _squares(flat[:, :whole].reshape(len(flat), -1, BLOCK)).sum(1) + _squares(flat[:, whole:])


def filter_squares(rows: Tensor) -> Tensor:
    """``rows[B, O, width] -> squared norms[B, O]`` in float64."""
    width = rows.shape[2]
    if width <= BLOCK:
        return _squares(rows)
    blocks = next(n for n in range(2, width + 1) if width % n == 0 and width // n <= BLOCK)
    return _squares(rows.reshape(*rows.shape[:2], blocks, -1)).sum(2)


def _squares(rows: Tensor) -> Tensor:
    dtype = torch.promote_types(rows.dtype, torch.float32)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()  # else torch adds one after the other, off by 1e-5
    norms: Tensor = torch.linalg.vector_norm(rows, dim=-1, dtype=dtype)
    return norms.double().square()


def clipped_names(params: Params) -> list[str]:
    """Names with coordinates: a rule that shares its bound among layers shares it among those. All, if none has any."""
    return [name for name, p in params.items() if p.numel()] or list(params)


def keep(rows: Tensor, finite: Tensor | None) -> Tensor:
    """``rows[B, ...]`` with zeros where ``finite[B]`` is False; ``None`` means that all are finite."""
    return rows if finite is None else rows.where(finite.view(-1, *[1] * (rows.ndim - 1)), 0)


def finite_factors(
    squared_norms: dict[str, Tensor], clipping: ClippingRule
) -> tuple[dict[str, Tensor], Tensor | None, int]:
    """Factors ``[B]`` per parameter, 0 for an example without a finite norm; which are finite; how many are not.

    Raises ``SettingError`` for factors that leave an example more than ``clipping.clip_norm``.
    """
    rows = torch.stack(list(squared_norms.values()))
    finite = rows.sum(0).isfinite()
    num_nonfinite = int((~finite).sum())
    if not num_nonfinite:
        return bounded_factors(clipping, squared_norms, rows), None, 0
    known = {name: n.where(finite, 0) for name, n in squared_norms.items()}
    factors = bounded_factors(clipping, known, rows.where(finite, 0))
    return {name: f.where(finite, 0) for name, f in factors.items()}, finite, num_nonfinite
