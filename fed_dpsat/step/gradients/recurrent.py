"""Recurrent layers: backpropagation through time by hand, and the outer products that the weights' gradients sum.

A linear layer has made ``gates[B, T, G * H]``, the input's weight and bias, already. Here are the loops over time and
what the rest of the parameters add: the hidden weight W_hh (role ``weight``), its bias b_hh (``bias``), and the
projection W_hr of an LSTM (``projection``). Conventions are those of ``torch.nn``: the order of the gates, and GRU's
b_hn inside of the product with the reset gate (Cho et al. 2014, as cuDNN has it; LSTM: Sak et al. 2014).

Both passes are for ``no_grad``; all tensors are of one dtype; the batch is dimension 0, in any layout.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fed_dpsat.step.gradients.linear import Linear, Roles, choose

GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}
"""How many gates a cell has; the names are those of ``torch.nn.RNNBase.mode``."""

States = tuple[Tensor, ...]
Saved = tuple[Tensor, ...]

_sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input
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
    if cell == "LSTM":
        return _lstm(gates, states, weight, bias, projection, reverse)
    (h,) = states
    if cell == "GRU":
        return _gru(gates, h, weight, bias, reverse)
    outputs = _plus(gates, bias)
    for (out,) in _steps(reverse, outputs):
        out.addmm_(h, weight.t())
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
    gates: Tensor, states: States, weight: Tensor, bias: Tensor | None, projection: Tensor | None, reverse: bool
) -> tuple[Tensor, States, Saved]:
    h, c = states
    width = c.shape[1]
    gates = _plus(gates, bias)
    cells, squashed, hidden = (gates.new_empty(*gates.shape[:2], width) for _ in range(3))
    outputs = hidden if projection is None else gates.new_empty(*gates.shape[:2], len(projection))
    for gate, cell, squash, full, out in _steps(reverse, gates, cells, squashed, hidden, outputs):
        gate.addmm_(h, weight.t())
        gate[:, : 2 * width].sigmoid_()
        gate[:, 3 * width :].sigmoid_()
        i, f, g, o = gate.chunk(4, 1)
        torch.mul(f, c, out=cell).addcmul_(i, g.tanh_())
        torch.mul(o, torch.tanh(cell, out=squash), out=full)
        if projection is not None:
            torch.mm(full, projection.t(), out=out)
        h, c = out, cell
    return outputs, (h.clone(), c.clone()), (outputs, *states, gates, cells, squashed, hidden)


def _lstm_backward(
    slopes: Tensor, last: Tensor | None, saved: Saved, weight: Tensor, projection: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor, States]:
    """``slopes`` become the gradients of the outputs, at each time with all that depends on them."""
    _, h, c, gates, cells, squashed, hidden = saved
    dc = torch.zeros_like(c) if last is None else last.to(c, copy=True)
    found, first, spare = torch.empty_like(gates), torch.zeros_like(h), torch.empty_like(c)
    before = _before(c, cells, reverse)
    steps = _back(reverse, slopes, found, gates, before, squashed, hidden)
    for (slope, grad, gate, old, squash, full), earlier in steps:
        i, f, g, o = gate.chunk(4, 1)
        di, df, dg, do = grad.chunk(4, 1)
        dh = slope if projection is None else slope @ projection
        _sigmoid_backward(torch.mul(dh, squash, out=spare), o, grad_input=do)
        dc.addcmul_(dh, torch.addcmul(o, full, squash, value=-1, out=spare))  # o (1 - tanh(c)^2)
        _sigmoid_backward(torch.mul(dc, g, out=spare), i, grad_input=di)
        _sigmoid_backward(torch.mul(dc, old, out=spare), f, grad_input=df)
        _tanh_backward(torch.mul(dc, i, out=spare), g, grad_input=dg)
        (first if earlier is None else earlier).addmm_(grad, weight)
        dc.mul_(f)
    return found, found, (first, dc)


def _gru(gates: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool) -> tuple[Tensor, States, Saved]:
    """Reset and update gates, and the hidden share of the new one, are made in place: one product for all three."""
    first, width = h, h.shape[1]
    inner = torch.zeros_like(gates, memory_format=torch.contiguous_format)
    if bias is not None:
        inner += bias
    inner[..., : 2 * width] += gates[..., : 2 * width]
    new, outputs = (gates.new_empty(*gates.shape[:2], width) for _ in range(2))
    for gate, part, n, out in _steps(reverse, gates, inner, new, outputs):
        part.addmm_(h, weight.t())
        part[:, : 2 * width].sigmoid_()
        r, z, share = part.chunk(3, 1)
        torch.addcmul(gate[:, 2 * width :], r, share, out=n).tanh_()
        h = torch.lerp(n, h, z, out=out)
    return outputs, (h.clone(),), (outputs, first, inner, new)


def _gru_backward(
    slopes: Tensor, before: Tensor, saved: Saved, weight: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, States]:
    """The new gate has two gradients: of what the input adds to it, and of what the hidden state does."""
    _, h, inner, new = saved
    width = h.shape[1]
    found, hidden = torch.empty_like(inner), torch.empty_like(inner)
    first, spare = torch.zeros_like(h), torch.empty_like(h)
    steps = _back(reverse, slopes, found, hidden, inner, new, before)
    for (slope, grad, own, part, n, old), earlier in steps:
        r, z, share = part.chunk(3, 1)
        dr, dz, dn = grad.chunk(3, 1)
        _sigmoid_backward(torch.sub(old, n, out=spare).mul_(slope), z, grad_input=dz)
        _tanh_backward(torch.addcmul(slope, slope, z, value=-1, out=spare), n, grad_input=dn)
        _sigmoid_backward(torch.mul(dn, share, out=spare), r, grad_input=dr)
        own[:, : 2 * width].copy_(grad[:, : 2 * width])
        torch.mul(dn, r, out=own[:, 2 * width :])
        (first if earlier is None else earlier).addcmul_(slope, z).addmm_(own, weight)
    return found, hidden, (first,)


def _rnn_backward(
    cell: str, slopes: Tensor, saved: Saved, weight: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, States]:
    outputs, h = saved
    first = torch.zeros_like(h)
    for (slope, out), earlier in _back(reverse, slopes, outputs):
        if cell == "RNN_RELU":
            _threshold_backward(slope, out, 0, grad_input=slope)
        else:
            _tanh_backward(slope, out, grad_input=slope)
        (first if earlier is None else earlier).addmm_(slope, weight)
    return slopes, slopes, (first,)


def _contributions(inputs: Tensor, outputs: Tensor, roles: tuple[str, ...]) -> Roles:
    """As those of a linear layer whose positions are the times."""
    strategy = choose(inputs.shape[1], inputs.shape[2], outputs.shape[2])
    return Linear(strategy=strategy).backward(outputs, outputs, (inputs,), False, roles)[1]


def _plus(gates: Tensor, bias: Tensor | None) -> Tensor:
    """A contiguous copy of ``gates[B, T, D]``, plus ``bias[D]``."""
    if bias is None:
        return gates.clone(memory_format=torch.contiguous_format)
    return torch.add(gates, bias, out=torch.empty_like(gates, memory_format=torch.contiguous_format))


def _before(first: Tensor, states: Tensor, reverse: bool) -> Tensor:
    """``states[B, T, D]`` a step earlier, from ``first[B, D]``."""
    kept = (states[:, 1:], first[:, None]) if reverse else (first[:, None], states[:, :-1])
    return torch.cat(kept, 1)


def _steps(reverse: bool, *sequences: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """``[B, D]`` of each of ``sequences[B, T, D]``, step by step."""
    steps = list(zip(*(t.unbind(1) for t in sequences), strict=True))
    return iter(steps[::-1] if reverse else steps)


def _back(reverse: bool, *sequences: Tensor) -> Iterator[tuple[tuple[Tensor, ...], Tensor | None]]:
    """The steps from the last to the first, and what the first of the ``sequences`` has a step earlier."""
    steps = list(_steps(not reverse, *sequences))
    return zip(steps, [*(step[0] for step in steps[1:]), None], strict=True)
