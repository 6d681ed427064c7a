"""The sharpness of a minimum, measured on public examples.

Every function takes ``loss``, the mean loss as a function of parameters, so a test can check it on a quadratic.
Curvature is in nats per squared unit of parameter space, for the loss on the given examples. It depends on the
parametrisation of a model (Dinh et al. 2017), so compare models of one architecture only.

======================== ==========================================================================
case                     result
======================== ==========================================================================
zero gradient at ``w``   no ascent direction: the rise is 0
a filter of zeros        its random direction is 0, as for biases and scales
======================== ==========================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from fed_dpsat.data.dataset import Examples
from fed_dpsat.errors import SettingError
from fed_dpsat.params import Params, cut, global_norm, laid_end_to_end
from fed_dpsat.step.modes import in_mode

Loss = Callable[[Params], Tensor]
ASCENT_STEPS = 20


@dataclass(frozen=True, kw_only=True)
class Sharpness:
    """Sharpness of one model on ``examples`` public examples.

    ``trace`` is Hutchinson's estimate, ``trace_error`` its standard error. ``one_step`` and ``projected`` are the mean
    rise of the loss of ``m`` examples within ``rho``, after the single step of SAM and after projected gradient ascent;
    both are lower bounds on the maximum. ``along`` holds losses at ``distances`` from ``w`` along the gradient.
    """

    examples: int
    parameters: int
    loss: float
    gradient_norm: float
    top_eigenvalues: tuple[float, ...]
    trace: float
    trace_error: float
    rho: float
    m: int
    one_step: float
    projected: float
    distances: tuple[float, ...]
    along: tuple[float, ...]


def measure(
    module: nn.Module,
    params: Params,
    examples: Examples,
    *,
    rho: float = 0.05,
    m: int = 128,
    top: int = 1,
    probes: int = 32,
    seed: int = 0,
) -> Sharpness:
    """``Sharpness`` of ``module`` at ``params``, in float64."""
    for name, value, bound, good in (
        ("rho", rho, "above 0", 0 < rho < math.inf),
        ("m", m, f"in [1, {len(examples)}]", 1 <= m <= len(examples)),
        ("top", top, f"in [1, {size(params) - 1}]", 1 <= top < size(params)),
        ("probes", probes, "at least 2", probes >= 2),
    ):
        if not good:
            raise SettingError(name, value, bound, "see `fed-dpsat sharpness --help`")
    params = {name: p.double() for name, p in params.items()}
    whole = mean_loss(module, examples)
    parts = [mean_loss(module, examples, rows) for rows in torch.split(torch.arange(len(examples)), m)]
    weights = np.array([len(rows) for rows in torch.split(torch.arange(len(examples)), m)]) / len(examples)
    rises = np.array([[rise(part, params, rho, steps) for part in parts] for steps in (1, ASCENT_STEPS)]) @ weights
    trace, trace_error = hessian_trace(whole, params, probes=probes, seed=seed)
    distances = tuple(float(t) for t in np.linspace(-4 * rho, 4 * rho, 17))
    return Sharpness(
        examples=len(examples),
        parameters=size(params),
        loss=float(whole(params)),
        gradient_norm=float(global_norm(grad(whole)(params))),
        top_eigenvalues=top_eigenvalues(whole, params, top=top, seed=seed),
        trace=trace,
        trace_error=trace_error,
        rho=rho,
        m=m,
        one_step=float(rises[0]),
        projected=float(rises[1]),
        distances=distances,
        along=loss_along(whole, params, distances),
    )


def mean_loss(module: nn.Module, examples: Examples, rows: Tensor | None = None) -> Loss:
    """Mean cross-entropy in nats over ``rows`` of ``examples`` (default: all), in float64 and evaluation mode."""
    examples.of_classes("sharpness")
    images, targets = examples.batch(torch.arange(len(examples)) if rows is None else rows)
    inputs = images.double()  # type: ignore[union-attr]  # one array, as was just checked

    def loss(params: Params) -> Tensor:
        with in_mode(module, training=False):
            outputs = functional_call(module, params, (inputs,))
        return functional.cross_entropy(outputs, targets)

    return loss


def size(params: Params) -> int:
    """Number of coordinates."""
    return sum(p.numel() for p in params.values())


def hessian_product(loss: Loss, params: Params, direction: Params) -> Params:
    """The Hessian of ``loss`` at ``params`` times ``direction``: exact, by forward over reverse mode.

    Attention uses the math kernel of torch, because the faster kernels have neither a forward mode nor a second
    derivative. For an operation without a forward mode, reverse mode runs twice.
    """
    with sdpa_kernel(SDPBackend.MATH):
        try:
            product: Params = jvp(grad(loss), (params,), (direction,))[1]
        except NotImplementedError:
            product = grad(lambda p: _dot(grad(loss)(p), direction))(params)
    return product


def top_eigenvalues(loss: Loss, params: Params, *, top: int = 1, seed: int = 0) -> tuple[float, ...]:
    """The ``top`` algebraically largest eigenvalues of the Hessian, descending; ARPACK's Lanczos, relative 1e-6."""
    from scipy.sparse.linalg import LinearOperator, eigsh  # type: ignore[import-untyped]

    count = size(params)

    def product(v: NDArray[np.float64]) -> NDArray[np.float64]:
        return _flat(hessian_product(loss, params, _shaped(np.asarray(v).ravel(), params)))

    start = np.random.default_rng(seed).standard_normal(count)
    operator = LinearOperator((count, count), matvec=product, dtype=np.float64)
    values = eigsh(operator, k=top, which="LA", tol=1e-6, v0=start, return_eigenvectors=False)
    return tuple(float(value) for value in sorted(values, reverse=True))


def hessian_trace(loss: Loss, params: Params, *, probes: int, seed: int = 0) -> tuple[float, float]:
    """``(estimate, standard error)`` from ``probes`` products with vectors of random signs (Hutchinson 1989)."""
    generator, found = np.random.default_rng(seed), []
    for _ in range(probes):
        signs = generator.choice(np.array([-1.0, 1.0]), size(params))
        found.append(float(signs @ _flat(hessian_product(loss, params, _shaped(signs, params)))))
    return float(np.mean(found)), float(np.std(found, ddof=1) / math.sqrt(probes))


def rise(loss: Loss, params: Params, rho: float, steps: int) -> float:
    """The rise of ``loss`` within ``rho``: after one step of this length along the gradient, or by projected ascent.

    With ``steps`` above 1, it takes steps of ``2.5 rho / steps`` along the normalised gradient, projected onto the
    ball, and returns the largest rise.
    """
    at, low = params, float(loss(params))
    length = rho if steps == 1 else 2.5 * rho / steps
    best = 0.0 if steps > 1 else -math.inf
    for _ in range(steps):
        slope = grad(loss)(at)
        norm = float(global_norm(slope))
        if norm == 0:
            break
        at = {name: p + slope[name] * (length / norm) for name, p in at.items()}
        away = {name: p - params[name] for name, p in at.items()}
        shrink = min(1.0, rho / float(global_norm(away)))
        at = {name: params[name] + d * shrink for name, d in away.items()}
        best = max(best, float(loss(at)) - low)
    return best if best > -math.inf else 0.0


def loss_along(loss: Loss, params: Params, distances: Sequence[float]) -> tuple[float, ...]:
    """``loss`` at each distance from ``params`` along the gradient; constant for a zero gradient."""
    slope = grad(loss)(params)
    norm = float(global_norm(slope))
    unit = {name: g / norm if norm else g for name, g in slope.items()}
    return tuple(float(loss({name: p + t * unit[name] for name, p in params.items()})) for t in distances)


def filter_normalised(params: Params, seed: int) -> Params:
    """A Gaussian direction with the filter norms of ``params``; 0 for tensors of fewer than two dimensions.

    A filter is one row of a weight, the weights of one output (Li et al. 2018, arXiv 1712.09913, Section 4).
    """
    generator = torch.Generator().manual_seed(seed)
    direction = {}
    for name, p in params.items():
        drawn = torch.randn(p.shape, generator=generator).to(p)
        if p.ndim < 2:
            direction[name] = torch.zeros_like(p)
        else:
            norms = [t.flatten(1).norm(dim=1).view(-1, *[1] * (p.ndim - 1)) for t in (p, drawn)]
            direction[name] = drawn * norms[0] / norms[1].clamp(min=1e-12)
    return direction


def landscape(
    loss: Loss, params: Params, *, points: int = 21, reach: float = 1.0, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """``(steps[P], losses[P, P])`` on a plane through ``params`` with two filter-normalised directions."""
    one, other = (filter_normalised(params, seed=2 * seed + k) for k in (0, 1))
    steps = np.linspace(-reach, reach, points)
    losses = [
        [float(loss({name: p + a * one[name] + b * other[name] for name, p in params.items()})) for a in steps]
        for b in steps
    ]
    return steps, np.array(losses)


def draw_landscape(steps: NDArray[np.float64], losses: NDArray[np.float64], title: str, path: Path) -> None:
    """Draw the contours of a landscape into ``path``, in the format of its suffix."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 4), layout="constrained")
    axes = figure.subplots()
    drawn = axes.contourf(steps, steps, losses, levels=20, cmap="cividis")
    axes.contour(steps, steps, losses, levels=10, colors="white", linewidths=0.4)
    axes.plot(0, 0, marker="+", color="#D55E00")
    axes.set(xlabel="first random direction, filter-normalised", ylabel="second random direction", aspect="equal")
    axes.set_title(title, fontsize=9)
    figure.colorbar(drawn, label="mean loss (nats)")
    figure.savefig(path, dpi=160)


def _dot(a: Params, b: Params) -> Tensor:
    return torch.stack([(t * b[name]).sum() for name, t in a.items()]).sum()


def _flat(params: Params) -> NDArray[np.float64]:
    flat: NDArray[np.float64] = laid_end_to_end(params).detach().double().numpy()
    return flat


def _shaped(flat: NDArray[np.float64], params: Params) -> Params:
    return {name: part.to(params[name]) for name, part in cut(torch.from_numpy(flat), params).items()}
