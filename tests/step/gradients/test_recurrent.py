"""Recurrent layers against those of torch.nn in float64, one example at a time."""

import math

import pytest
import torch
from torch import nn

from fed_dpsat.step.gradients import recurrent
from fed_dpsat.step.gradients.contribution import Rows
from fed_dpsat.step.gradients.linear import choose
from fed_dpsat.step.gradients.product import Product

INPUTS, HIDDEN, PROJECTED = 3, 6, 3
CELLS = {
    "LSTM": lambda **settings: nn.LSTM(INPUTS, HIDDEN, **settings),
    "LSTM, projected": lambda **settings: nn.LSTM(INPUTS, HIDDEN, proj_size=PROJECTED, **settings),
    "GRU": lambda **settings: nn.GRU(INPUTS, HIDDEN, **settings),
    "RNN_TANH": lambda **settings: nn.RNN(INPUTS, HIDDEN, **settings),
    "RNN_RELU": lambda **settings: nn.RNN(INPUTS, HIDDEN, nonlinearity="relu", **settings),
}
every_cell = pytest.mark.parametrize("name", CELLS)
each_direction = pytest.mark.parametrize("reverse", [False, True])


class Case:
    """A layer of torch.nn in float64, an input, first states, and the gradients of all that comes out."""

    def __init__(self, name, batch=3, times=5, reverse=False, bias=True, zeros=False):
        self.module = CELLS[name](batch_first=True, bias=bias, bidirectional=reverse).double()
        self.cell, self.reverse = self.module.mode, reverse
        parts = dict(self.module.named_parameters())
        part = {key: parts.get(f"{key}_l0{'_reverse' * reverse}") for key in ("weight_ih", "bias_ih", "weight_hh")}
        self.weight, self.projection = part["weight_hh"], parts.get(f"weight_hr_l0{'_reverse' * reverse}")
        self.bias = parts.get(f"bias_hh_l0{'_reverse' * reverse}")
        self.params = {"weight": self.weight, "bias": self.bias, "projection": self.projection}
        self.params = {role: p for role, p in self.params.items() if p is not None}
        self.x = torch.randn(batch, times, INPUTS, dtype=torch.float64)
        self.gates = nn.functional.linear(self.x, part["weight_ih"], part["bias_ih"]).detach()
        self.width = self.module.proj_size or HIDDEN
        sizes = (self.width, HIDDEN) if self.cell == "LSTM" else (self.width,)
        self.states = tuple(torch.zeros(batch, size) if zeros else torch.randn(batch, size) for size in sizes)
        self.states = tuple(state.double() for state in self.states)
        self.grad_outputs = torch.randn(batch, times, self.width, dtype=torch.float64)
        self.grad_states = tuple(torch.randn_like(state) for state in self.states)
        self.input_bias = part["bias_ih"]

    def torch_forward(self, x, states):
        """The outputs and last states of the one direction."""
        both = tuple(torch.stack([s] * 2) if self.reverse else s[None] for s in states)
        out, last = self.module(x, both if self.cell == "LSTM" else both[0])
        last = last if self.cell == "LSTM" else (last,)
        return out[..., -self.width :], tuple(state[-1] for state in last)

    def forward(self):
        with torch.no_grad():
            return recurrent.forward(
                self.cell, self.gates, self.states, self.weight, self.bias, self.projection, self.reverse
            )

    def backward(self, grad_outputs, grad_states, saved, roles=None):
        with torch.no_grad():
            return recurrent.backward(
                self.cell,
                grad_outputs,
                grad_states,
                saved,
                self.weight,
                self.projection,
                self.reverse,
                roles=tuple(self.params) if roles is None else roles,
            )

    def one_by_one(self, grad_outputs, grad_states):
        """Gradients of the states, the parameters, and the sum over time of the gates': rows ``[B, ...]`` of each."""
        rows = []
        for i in range(len(self.x)):
            states = [state[i : i + 1].clone().requires_grad_() for state in self.states]
            out, last = self.torch_forward(self.x[i : i + 1], states)
            pairs = zip((out, *last), (grad_outputs, *grad_states), strict=True)
            loss = sum((a * g[i]).sum() for a, g in pairs if g is not None)
            gates = [] if self.input_bias is None else [self.input_bias]
            found = torch.autograd.grad(loss, [*states, *self.params.values(), *gates], materialize_grads=True)
            rows.append([*(g[0] for g in found[: len(states)]), *found[len(states) :]])
        return [torch.stack(each) for each in zip(*rows, strict=True)]

    def check(self, grad_outputs, grad_states):
        """Both passes; returns the contributions and their expected rows."""
        outputs, last, saved = self.forward()
        expected, expected_last = self.torch_forward(self.x, self.states)
        torch.testing.assert_close(outputs, expected)
        torch.testing.assert_close(last, expected_last)
        grad_gates, grad_first, found = self.backward(grad_outputs, grad_states, saved)
        wanted = self.one_by_one(grad_outputs, grad_states)
        got = [*grad_first, *(held.rows() for held in found.values())]
        if self.input_bias is not None:
            got.append(grad_gates.sum(1))
        torch.testing.assert_close(got, wanted)
        return found, dict(zip(self.params, wanted[len(self.states) :], strict=False))


@every_cell
@each_direction
@pytest.mark.parametrize(("batch", "times"), [(3, 2), (1, 2), (3, 1), (1, 1), (3, 30)])
def test_both_passes(name, reverse, batch, times):
    """Contributions are ``Rows`` where the times are many, and answer as their rows do."""
    case = Case(name, batch, times, reverse)
    found, rows = case.check(case.grad_outputs, case.grad_states)
    strategy = choose(times, case.weight.shape[1], case.weight.shape[0])
    assert isinstance(found["weight"], Rows if strategy == "rows" else Product)
    assert strategy == {1: "product", 30: "rows"}.get(times, strategy)
    factors, finite = torch.rand(batch, dtype=torch.float64), torch.arange(batch) != 1
    for role, held in found.items():
        torch.testing.assert_close(held.squared_norms(), rows[role].flatten(1).square().sum(1))
        torch.testing.assert_close(held.weighted_sum(factors, None), torch.tensordot(factors, rows[role], 1))
        torch.testing.assert_close(held.weighted_sum(factors, finite), torch.tensordot(factors * finite, rows[role], 1))


@every_cell
@each_direction
def test_gradients_of_the_gates(name, reverse):
    """Each one, not just their sum over time: the input is the gates, behind a weight that is the identity."""
    case = Case(name, reverse=reverse)
    _, _, saved = case.forward()
    grad_gates, _, _ = case.backward(case.grad_outputs, case.grad_states, saved, ())
    width = case.gates.shape[2]
    settings = {"batch_first": True, "bidirectional": reverse, "dtype": torch.float64}
    if case.cell.startswith("RNN"):
        settings["nonlinearity"] = case.cell[4:].lower()
    if case.projection is not None:
        settings["proj_size"] = PROJECTED
    own = getattr(nn, case.cell[:3] if case.cell != "LSTM" else "LSTM")(width, HIDDEN, **settings)
    end = "_l0_reverse" if reverse else "_l0"
    values = {"weight_ih": torch.eye(width), "bias_ih": torch.zeros(width), "weight_hh": case.weight}
    values |= {"bias_hh": case.bias} | ({} if case.projection is None else {"weight_hr": case.projection})
    own.load_state_dict({f"{key}{end}": value for key, value in values.items()}, strict=False)
    case.module, gates = own, case.gates.clone().requires_grad_()
    out, last = case.torch_forward(gates, case.states)
    (expected,) = torch.autograd.grad((out, *last), gates, (case.grad_outputs, *case.grad_states))
    torch.testing.assert_close(grad_gates, expected)


@every_cell
@each_direction
def test_without_a_bias_and_from_zero(name, reverse):
    case = Case(name, reverse=reverse, bias=False, zeros=True)
    found, _ = case.check(case.grad_outputs, case.grad_states)
    assert "bias" not in found


@every_cell
@each_direction
def test_what_no_loss_depends_on_has_no_gradient_to_give(name, reverse):
    """Through the outputs alone, each last state alone, and nothing."""
    case = Case(name, reverse=reverse)
    nothing = (None,) * len(case.states)
    case.check(case.grad_outputs, nothing)
    for i, grad in enumerate(case.grad_states):
        case.check(None, (*nothing[:i], grad, *nothing[i + 1 :]))
    *_, saved = case.forward()
    gates, first, found = case.backward(None, nothing, saved)
    assert not gates.any()
    assert not any(grad.any() for grad in first)
    assert not any(held.rows().any() for held in found.values())


@every_cell
@each_direction
@pytest.mark.parametrize("times_at_once", [1, 2])
def test_a_few_times_at_once(name, reverse, times_at_once, monkeypatch):
    """Five times are made in parts; the last part has one."""
    case = Case(name, reverse=reverse)
    step = case.gates[:, 0].numel() * case.gates.element_size()
    monkeypatch.setattr(recurrent, "FEW_BYTES", step * times_at_once)
    case.check(case.grad_outputs, case.grad_states)


@every_cell
def test_the_arguments_stay_as_they_are(name):
    """Also one example at one time, where the layouts of all tensors are alike."""
    for batch, times in [(3, 5), (1, 1)]:
        case = Case(name, batch, times)
        *_, saved = case.forward()
        case.backward(case.grad_outputs, case.grad_states, saved)
        held = [case.gates, *case.states, *case.params.values(), case.grad_outputs, *case.grad_states, *saved]
        before = [t.clone() for t in held]
        first = case.forward()
        second = case.backward(case.grad_outputs, case.grad_states, saved)
        assert all(torch.equal(a, b) for a, b in zip(held, before, strict=True))
        torch.testing.assert_close(case.forward(), first, rtol=0, atol=0)
        torch.testing.assert_close(
            case.backward(case.grad_outputs, case.grad_states, saved)[:2], second[:2], rtol=0, atol=0
        )


@every_cell
def test_times_first(name):
    """The other layout of what comes in."""
    case = Case(name)
    expected = case.forward()
    gradients = case.backward(case.grad_outputs, case.grad_states, expected[2])
    case.gates, case.grad_outputs = (
        t.transpose(0, 1).contiguous().transpose(0, 1) for t in (case.gates, case.grad_outputs)
    )
    found = case.forward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(case.backward(case.grad_outputs, case.grad_states, found[2])[:2], gradients[:2])


@every_cell
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_example_that_is_not_finite_stays_alone(name, value):
    case = Case(name)
    *_, saved = case.forward()
    _, _, found = case.backward(case.grad_outputs, case.grad_states, saved)
    grad = case.grad_outputs.clone()
    grad[1] = value
    _, _, spoilt = case.backward(grad, case.grad_states, saved)
    finite, factors = torch.tensor([True, False, True]), torch.rand(3, dtype=torch.float64)
    for role, held in found.items():
        norms = spoilt[role].squared_norms()
        assert not norms[1].isfinite()
        torch.testing.assert_close(norms[finite], held.squared_norms()[finite])
        torch.testing.assert_close(spoilt[role].weighted_sum(factors, finite), held.weighted_sum(factors, finite))


@every_cell
def test_contributions_of_a_narrow_layer_are_wide(name):
    case = Case(name)
    with torch.no_grad():
        case.module.bfloat16()
        case.gates, case.grad_outputs = case.gates.bfloat16(), case.grad_outputs.bfloat16()
        case.states = tuple(state.bfloat16() for state in case.states)
        *_, saved = case.forward()
        gates, _, found = case.backward(case.grad_outputs, (None,) * len(case.states), saved)
    assert gates.dtype == torch.bfloat16
    assert {held.rows().dtype for held in found.values()} == {torch.float32}
