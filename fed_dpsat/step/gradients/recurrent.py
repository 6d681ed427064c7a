"""Recurrent layers: backpropagation through time by hand, and the outer products that the weights' gradients sum.

A linear layer has made ``gates[B, T, G * H]``, the input's weight and bias, already. Here are the loops over time and
what the rest of the parameters add: the hidden weight W_hh (role ``weight``), its bias b_hh (``bias``), and the
projection W_hr of an LSTM (``projection``). Conventions are those of ``torch.nn``: the order of the gates, and GRU's
b_hn inside of the product with the reset gate (Cho et al. 2014, as cuDNN has it; LSTM: Sak et al. 2014).

Both passes are for ``no_grad``; all tensors are of one dtype; the batch is dimension 0, in any layout. What ``forward``
saves has the outputs and the first states among it; ``backward`` changes none of it.

========================= ==================================================================
no bias                   None, and no role ``bias``
no first states           zeros, as ``torch.nn`` has them: the caller makes them
no example, or no time    not here: a linear layer has no contributions for an empty batch
sequences of many lengths not here: steps that a mask would skip are made, and have gradients
========================= ==================================================================
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fed_dpsat.step.gradients.linear import Linear, Roles, choose
from fed_dpsat.step.placement import bytes_at_once

GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}
"""How many gates a cell has; the names are those of ``torch.nn.RNNBase.mode``."""

FEW_BYTES = 1_000_000
"""Of the gates, for which the factors of the backward pass are made at once."""

States = tuple[Tensor, ...]
Saved = tuple[Tensor, ...]

_tanh_backward = torch.ops.aten.tanh_backward.grad_input
_threshold_backward = torch.ops.aten.threshold_backward.grad_input


def forward(
    cell: str,
    gates: Tensor,
    states: States,
    weight: Tensor,
    bias: Tensor | None,
    projection: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, States, Saved]:
    """Outputs ``[B, T, H or P]``, the last states, and what ``backward`` needs.

    ``states`` are ``h[B, H or P]`` and, of an LSTM, ``c[B, H]``; ``reverse`` goes from the last time to the first.
    """
    shift = gates.new_zeros(len(weight)) if bias is None else bias
    if cell == "LSTM":
        return _lstm(gates, states, weight.t(), shift, projection, reverse)
    if cell == "GRU":
        return _gru(gates, states[0], weight.t(), shift, reverse)
    h, outputs, weight = states[0], _contiguous(gates), weight.t()
    for gate, out in _steps(reverse, gates, outputs):
        torch.add(gate, shift, out=out).addmm_(h, weight)
        h = out.relu_() if cell == "RNN_RELU" else out.tanh_()
    return outputs, (h.clone(),), (outputs, states[0])


def backward(
    cell: str,
    grad_outputs: Tensor | None,
    grad_states: tuple[Tensor | None, ...],
    saved: Saved,
    weight: Tensor,
    projection: Tensor | None = None,
    reverse: bool = False,
    *,
    roles: tuple[str, ...],
) -> tuple[Tensor, States, Roles]:
    """Gradients of ``gates`` and of the first states, and the contributions to the parameters in ``roles``.

    ``grad_outputs[B, T, H or P]`` and ``grad_states``, of the last states, are None where nothing depends on them.
    """
    outputs, first = saved[:2]
    before = _before(first, outputs, reverse)
    slopes = torch.zeros_like(outputs) if grad_outputs is None else torch.empty_like(outputs).copy_(grad_outputs)
    if grad_states[0] is not None:
        slopes[:, 0 if reverse else -1] += grad_states[0]
    if cell == "LSTM":
        gates, hidden, states = _lstm_backward(slopes, grad_states[1], saved, weight, projection, reverse)
    elif cell == "GRU":
        gates, hidden, states = _gru_backward(slopes, before, saved, weight, reverse)
    else:
        gates, hidden, states = _rnn_backward(cell, slopes, saved, weight, reverse)
    found = _contributions(before, hidden, tuple(role for role in roles if role != "projection"))
    if "projection" in roles:
        found["projection"] = _contributions(saved[-1], slopes, ("weight",))["weight"]
    return gates, states, found


def _lstm(
    gates: Tensor, states: States, weight: Tensor, bias: Tensor, projection: Tensor | None, reverse: bool
) -> tuple[Tensor, States, Saved]:
    h, c = states
    size = *gates.shape[:2], c.shape[1]
    active, cells, squashed = (_times_first(gates, width) for width in (gates.shape[2], size[2], size[2]))
    hidden = gates.new_empty(size)
    outputs = hidden if projection is None else gates.new_empty(*size[:2], len(projection))
    views = active, active[..., : 2 * size[2]], *active.chunk(4, 2)
    steps = _steps(reverse, gates, *views, cells, squashed, hidden, outputs)
    for gate, act, both, i, f, g, o, cell, squash, full, out in steps:
        torch.add(gate, bias, out=act).addmm_(h, weight)
        both.sigmoid_()
        torch.mul(f, c, out=cell).addcmul_(i, g.tanh_())
        torch.mul(o.sigmoid_(), torch.tanh(cell, out=squash), out=full)
        if projection is not None:
            torch.mm(full, projection.t(), out=out)
        h, c = out, cell
    return outputs, (h.clone(), c.clone()), (outputs, *states, active, cells, squashed, hidden)


def _lstm_backward(
    slopes: Tensor, last: Tensor | None, saved: Saved, weight: Tensor, projection: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor, States]:
    """``slopes`` become the gradients of the outputs, at each time with all that depends on them."""
    _, h, c, gates, *_ = saved
    dc = torch.zeros_like(c) if last is None else last.to(c, copy=True)
    found, first, spread = _contiguous(gates), torch.zeros_like(h), dc[:, None]
    each = _by_gate(found, 4)
    steps = _back(reverse, slopes, found, each[:, :, :3], each[:, :, 3], gates.chunk(4, 2)[1])
    by_time = zip(*steps, _lstm_factors(saved, reverse), strict=True)
    for (slope, grad, difg, do, f), earlier, (by_cell, by_hidden, through) in by_time:
        dh = slope if projection is None else slope @ projection
        dc.addcmul_(dh, through)
        torch.mul(spread, by_cell, out=difg)
        torch.mul(dh, by_hidden, out=do)
        (first if earlier is None else earlier).addmm_(grad, weight)
        dc.mul_(f)
    return found, found, (first, dc)


def _lstm_factors(saved: Saved, reverse: bool) -> Iterator[tuple[Tensor, ...]]:
    """From the last time: gradients of i, f, g by c, ``[B, 3, H]``; of o and of c by h, ``[B, H]`` each."""
    *_, c, gates, cells, squashed, hidden = saved
    one, before = c.new_ones(()), _before(c, cells, reverse)
    for gate, old, squash, full in _parts(not reverse, gates, before, squashed, hidden):
        i, _, g, o = gate.chunk(4, 2)
        factors = torch.addcmul(gate, gate, gate, value=-1)
        di, df, dg, do = factors.chunk(4, 2)
        di.mul_(g)
        df.mul_(old)
        torch.addcmul(one, g, g, value=-1, out=dg).mul_(i)
        do.mul_(squash)
        through = torch.addcmul(o, full, squash, value=-1)  # o (1 - tanh(c)^2)
        yield from _steps(not reverse, _by_gate(factors, 4)[:, :, :3], do, through)


def _gru(gates: Tensor, h: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> tuple[Tensor, States, Saved]:
    """Reset and update gates, and the hidden share of the new one, are made in place: one product for all three."""
    first, two = h, 2 * h.shape[1]
    inner, new = _times_first(gates, gates.shape[2]), _times_first(gates, h.shape[1])
    outputs = gates.new_empty(*gates.shape[:2], h.shape[1])
    inner[..., two:] = bias[two:]
    bias = bias[:two]
    views = gates[..., :two], gates[..., two:], inner, inner[..., :two], *inner.chunk(3, 2)
    for gate, own, part, both, r, z, share, n, out in _steps(reverse, *views, new, outputs):
        torch.add(gate, bias, out=both)
        part.addmm_(h, weight)
        both.sigmoid_()
        torch.addcmul(own, r, share, out=n).tanh_()
        h = torch.lerp(n, h, z, out=out)
    return outputs, (h.clone(),), (outputs, first, inner, new)


def _gru_backward(
    slopes: Tensor, before: Tensor, saved: Saved, weight: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, States]:
    """The new gate has two gradients: of what the input adds to it, and of what the hidden state does."""
    _, h, inner, _ = saved
    found, hidden, first = _contiguous(inner), _contiguous(inner), torch.zeros_like(h)
    views = slopes[:, :, None], hidden, _by_gate(hidden, 3), inner.chunk(3, 2)[1], found.chunk(3, 2)[2]
    by_time = zip(*_back(reverse, slopes, *views), _gru_factors(saved, before, reverse), strict=True)
    for (slope, spread, grad, each, z, dn), earlier, (factors, by_new) in by_time:
        torch.mul(spread, factors, out=each)
        torch.mul(slope, by_new, out=dn)
        (first if earlier is None else earlier).addcmul_(slope, z).addmm_(grad, weight)
    two = 2 * h.shape[1]
    found[..., :two] = hidden[..., :two]
    return found, hidden, (first,)


def _gru_factors(saved: Saved, before: Tensor, reverse: bool) -> Iterator[tuple[Tensor, ...]]:
    """From the last time: gradients by h of what h adds to the gates, ``[B, 3, H]``; of the new gate, ``[B, H]``."""
    _, h, inner, new = saved
    one = h.new_ones(())
    for part, n, old in _parts(not reverse, inner, new, before):
        r, z, share = part.chunk(3, 2)
        factors = torch.empty_like(part)
        dr, dz, ds = factors.chunk(3, 2)
        dn = torch.addcmul(one, n, n, value=-1)
        dn.addcmul_(dn, z, value=-1)
        torch.mul(dn, r, out=ds)
        torch.mul(ds, share, out=dr).addcmul_(dr, r, value=-1)
        torch.addcmul(z, z, z, value=-1, out=dz).mul_(old - n)
        yield from _steps(not reverse, _by_gate(factors, 3), dn)


def _rnn_backward(
    cell: str, slopes: Tensor, saved: Saved, weight: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, States]:
    outputs, h = saved
    first = torch.zeros_like(h)
    for (slope, out), earlier in zip(*_back(reverse, slopes, outputs), strict=True):
        if cell == "RNN_RELU":
            _threshold_backward(slope, out, 0, grad_input=slope)
        else:
            _tanh_backward(slope, out, grad_input=slope)
        (first if earlier is None else earlier).addmm_(slope, weight)
    return slopes, slopes, (first,)


def _contributions(inputs: Tensor, outputs: Tensor, roles: tuple[str, ...]) -> Roles:
    """As those of a linear layer whose positions are the times; its weight would matter to its input alone."""
    strategy = choose(inputs.shape[1], inputs.shape[2], outputs.shape[2])
    return Linear(strategy=strategy).backward(outputs, outputs, (inputs,), False, roles)[1]


def _times_first(like: Tensor, width: int) -> Tensor:
    """``[B, T, width]`` for what stays here: in memory one time after the other, as the loops go."""
    return like.new_empty(like.shape[1], like.shape[0], width).transpose(0, 1)


def _contiguous(like: Tensor) -> Tensor:
    """Empty, for what leaves here or is summed over the times."""
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _by_gate(sequence: Tensor, gates: int) -> Tensor:
    """``[B, T, G * H] -> [B, T, G, H]``."""
    return sequence.view(*sequence.shape[:2], gates, sequence.shape[2] // gates)


def _before(first: Tensor, states: Tensor, reverse: bool) -> Tensor:
    """``states[B, T, D]`` a step earlier, from ``first[B, D]``."""
    kept = (states[:, 1:], first[:, None]) if reverse else (first[:, None], states[:, :-1])
    return torch.cat(kept, 1)


def _steps(reverse: bool, *sequences: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """``[B, *]`` of each of ``sequences[B, T, *]``, step by step."""
    steps = list(zip(*(t.unbind(1) for t in sequences), strict=True))
    return iter(steps[::-1] if reverse else steps)


def _back(reverse: bool, *sequences: Tensor) -> tuple[list[tuple[Tensor, ...]], list[Tensor | None]]:
    """The steps from the last to the first, and what the first of the ``sequences`` has a step earlier."""
    steps = list(_steps(not reverse, *sequences))
    return steps, [*(step[0] for step in steps[1:]), None]


def _parts(reverse: bool, *sequences: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """``[B, few, D]`` of each of ``sequences[B, T, D]``: what is made of them stays in the cache until it is used."""
    first = sequences[0]
    step = max(1, first[:, 0].numel() * first.element_size())
    few = max(1, bytes_at_once(first.device, FEW_BYTES) // step)
    parts = list(zip(*(torch.split(t, few, 1) for t in sequences), strict=True))
    return iter(parts[::-1] if reverse else parts)
