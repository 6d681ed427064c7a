"""Sharpness of quadratics, whose spectrum, rises and landscape a reader can compute."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import grad
from torch.nn import functional
from typer.testing import CliRunner

from fed_dpsat.cli import app
from fed_dpsat.data.digits import digits
from fed_dpsat.errors import SettingError
from fed_dpsat.lab.sharpness import (
    draw_landscape,
    filter_normalised,
    hessian_product,
    hessian_trace,
    landscape,
    loss_along,
    mean_loss,
    measure,
    rise,
    top_eigenvalues,
)

SPECTRUM = torch.tensor([5.0, 3.0, 1.0, 0.5, -2.0, 0.0], dtype=torch.float64)
ROTATION = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
HESSIAN = ROTATION @ torch.diag(SPECTRUM) @ ROTATION.T
ORIGIN = {"a": torch.zeros(2, 2, dtype=torch.float64), "b": torch.zeros(2, dtype=torch.float64)}


def flat(params):
    return torch.cat([p.flatten() for p in params.values()])


def quadratic(params):
    w = flat(params)
    return 0.5 * w @ HESSIAN @ w + 1.0


def bowl(params):
    """Half the squared distance from a point, with curvature 4."""
    return 2 * (flat(params) - 1).square().sum()


def test_the_largest_eigenvalues_are_the_algebraic_ones():
    assert top_eigenvalues(quadratic, ORIGIN, top=3) == pytest.approx((5, 3, 1), abs=1e-6)


def test_a_product_is_that_with_the_hessian():
    direction = {"a": torch.arange(4.0, dtype=torch.float64).view(2, 2), "b": torch.ones(2, dtype=torch.float64)}
    assert torch.allclose(flat(hessian_product(quadratic, ORIGIN, direction)), HESSIAN @ flat(direction))


def test_the_trace_is_within_its_error_and_exact_for_a_diagonal():
    estimate, error = hessian_trace(quadratic, ORIGIN, probes=100)
    assert abs(estimate - float(SPECTRUM.sum())) < 4 * error
    assert 0 < error < 1.0
    assert hessian_trace(bowl, ORIGIN, probes=2) == pytest.approx((24, 0))


def test_rises_of_a_bowl():
    """At distance r from the bottom, going rho further: 2 ((r + rho)^2 - r^2)."""
    r, rho = math.sqrt(6), 0.1
    assert rise(bowl, ORIGIN, rho, 1) == pytest.approx(2 * ((r + rho) ** 2 - r**2))
    assert rise(bowl, ORIGIN, rho, 20) == pytest.approx(2 * ((r + rho) ** 2 - r**2))


def test_projected_ascent_finds_what_one_step_misses():
    """A slope along the flat axis, and much curvature across: the top of the ball is off the gradient."""

    def loss(params):
        x, y = params["w"]
        return x + 50 * (y + 0.001) ** 2

    at = {"w": torch.zeros(2, dtype=torch.float64)}
    assert rise(loss, at, 0.5, 20) > 5 * rise(loss, at, 0.5, 1) > 0


def test_no_gradient_no_rise():
    assert rise(quadratic, ORIGIN, 0.1, 1) == rise(quadratic, ORIGIN, 0.1, 20) == 0
    assert loss_along(quadratic, ORIGIN, (-1.0, 1.0)) == (1, 1)


def test_the_loss_along_the_gradient():
    assert loss_along(bowl, ORIGIN, (-math.sqrt(6), 0.0, math.sqrt(6))) == pytest.approx((0, 12, 48))


def test_filters_keep_their_norms_and_biases_stay():
    params = {"w": torch.randn(3, 2, 2), "b": torch.ones(3), "dead": torch.zeros(2, 2)}
    direction = filter_normalised(params, seed=1)
    assert torch.allclose(direction["w"].flatten(1).norm(dim=1), params["w"].flatten(1).norm(dim=1))
    assert not direction["b"].any()
    assert not direction["dead"].any()
    assert not torch.equal(direction["w"], filter_normalised(params, seed=2)["w"])


def test_a_landscape_has_the_model_in_its_middle(tmp_path):
    params = {"a": torch.ones(2, 2, dtype=torch.float64), "b": torch.ones(2, dtype=torch.float64)}
    steps, losses = landscape(bowl, params, points=5)
    assert losses.shape == (5, 5)
    assert losses[2, 2] == 0 == losses.min()
    one, other = (filter_normalised(params, seed) for seed in (0, 1))
    there = float(bowl({n: p + steps[4] * one[n] + steps[1] * other[n] for n, p in params.items()}))
    assert losses[1, 4] == pytest.approx(there)
    draw_landscape(steps, losses, "a bowl", tmp_path / "bowl.svg")
    assert "a bowl" in (tmp_path / "bowl.svg").read_text() or (tmp_path / "bowl.svg").stat().st_size > 1000


def test_the_hessian_of_softmax_regression():
    """One example x of class 0 at w = 0: the Hessian is (diag(p) - p p^T) kron x x^T, p uniform over 10 classes."""
    examples, module = digits().test, nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False))
    x = examples.batch(torch.tensor([0]))[0].double().flatten()
    params = {"1.weight": torch.zeros(10, 64, dtype=torch.float64)}
    loss = mean_loss(module, examples, torch.tensor([0]))
    assert top_eigenvalues(loss, params)[0] == pytest.approx(0.1 * float(x @ x), rel=1e-5)
    trace, error = hessian_trace(loss, params, probes=200)
    assert abs(trace - 0.9 * float(x @ x)) < 4 * error


class Attention(nn.Module):
    """Each row of an image is a token; ``layer`` is between two linear maps."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(8, 10)

    def forward(self, x):
        tokens = x.squeeze(1)
        return self.head(self.layer(tokens).mean(1))


class Scaled(nn.Module):
    def forward(self, x):
        heads = x[:, None]
        return functional.scaled_dot_product_attention(heads, heads.square(), heads).squeeze(1)


class Heads(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0]


class Cube(torch.autograd.Function):
    """Without a forward mode."""

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        return 3 * ctx.saved_tensors[0] ** 2 * grad


LAYERS = {
    "multihead": lambda: Heads(8, 2, batch_first=True),
    "transformer": lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
    "scaled dot product": lambda: nn.Sequential(nn.Linear(8, 8), Scaled()),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_product_through_attention_is_the_change_of_the_gradient(name):
    """Central differences of the gradient in float64: 1e-6 apart from the exact product of a Hessian of size 1."""
    torch.manual_seed(0)
    module = Attention(LAYERS[name]())
    loss = mean_loss(module, digits().test, torch.arange(20))
    params = {n: p.detach().double() for n, p in module.named_parameters()}
    direction = {n: torch.randn_like(p) for n, p in params.items()}
    far = 1e-5
    ahead, behind = (grad(loss)({n: p + s * direction[n] for n, p in params.items()}) for s in (far, -far))
    expected = {n: (ahead[n] - behind[n]) / (2 * far) for n in params}
    product = hessian_product(loss, params, direction)
    assert float(flat(expected).norm()) > 0.1
    assert float((flat(product) - flat(expected)).norm()) < 1e-6


def test_what_has_no_forward_mode_is_differentiated_in_reverse_twice():
    """The sum of cubes has the Hessian diag(6 w)."""
    at = {"w": torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64)}
    product = hessian_product(lambda p: Cube.apply(p["w"]).sum(), at, {"w": torch.ones(3, dtype=torch.float64)})
    assert product["w"].tolist() == [6, 12, -18]


@pytest.mark.parametrize(("name", "value"), [("rho", 0.0), ("m", 0), ("top", 650), ("probes", 1)])
def test_settings_out_of_bounds(name, value):
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    params = {n: p.detach() for n, p in module.named_parameters()}
    with pytest.raises(SettingError, match=name):
        measure(module, params, digits().test, **{name: value})


def test_the_command_measures_the_model_of_a_run_on_its_public_test_split(tmp_path):
    run = tmp_path / "run"
    fast = ["--set", "num_rounds=2", "--set", "noise_multiplier=2.0", "--set", "num_clients=2"]
    assert CliRunner().invoke(app, ["run", "--out", str(run), *fast]).exit_code == 0
    figure = tmp_path / "landscape.png"
    result = CliRunner().invoke(
        app, ["sharpness", str(run), "--json", "--probes", "4", "--landscape", str(figure), "--points", "3"]
    )
    found = json.loads(result.stdout)
    assert found == json.loads((run / "sharpness.json").read_text())
    summary = json.loads((run / "summary.json").read_text())
    assert found["loss"] == pytest.approx(summary["test_loss"], rel=1e-5)
    assert (found["examples"], found["parameters"], found["split"]) == (360, 650, "test")
    assert found["projected"] >= found["one_step"] > 0
    assert np.isclose(found["along"][8], found["loss"])
    assert figure.exists()
    words = CliRunner().invoke(app, ["sharpness", str(run), "--probes", "4", "--examples", "50"]).output
    assert "50 examples of the public test split" in " ".join(words.split())
