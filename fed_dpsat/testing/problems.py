"""Training problems of the suites: losses with known gradients, and comparisons to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from fed_dpsat.params import Params, laid_end_to_end
from fed_dpsat.step.loop import LocalResult
from fed_dpsat.step.optimizers.base import PrivateOptimizer, State, StepInfo
from fed_dpsat.step.query import At, compact, first_point, spread

TrainLoop = Callable[..., LocalResult]
"""A training loop with the signature of ``train_locally``."""

Shapes = Mapping[str, tuple[int, ...]]


def prescribed(params: Params, inputs: Tensor, targets: Tensor) -> Tensor:
    """``inputs[B, D], targets[B] -> losses[B]``: the gradient of an example is its input."""
    return inputs @ laid_end_to_end(params)


class Quadratic:
    """``inputs[B, D], targets[B] -> losses[B]``: the gradient of an example is the parameters minus its input."""

    def __call__(self, params: Params, inputs: Tensor, targets: Tensor, /) -> Tensor:
        """The criterion of the outputs."""
        return self.criterion(self.outputs(params, inputs), targets)

    def outputs(self, params: Params, inputs: Tensor, /) -> Tensor:
        """``[B, D]``, parameters minus inputs."""
        return laid_end_to_end(params) - inputs

    def criterion(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Half the squared norm of the outputs."""
        return 0.5 * outputs.square().sum(1)


quadratic = Quadratic()


def size(shapes: Shapes) -> int:
    """Number of coordinates ``D`` of all tensors together."""
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def filled(shapes: Shapes, value: float = 0.0, dtype: torch.dtype = torch.float32) -> Params:
    """Tensors of ``shapes`` with one value."""
    return {name: torch.full(shape, value, dtype=dtype) for name, shape in shapes.items()}


def normal_like(params: Params, seed: int) -> Params:
    """Standard normal tensors with the shapes and types of ``params``."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=generator).to(p.dtype) for name, p in params.items()}


def copied(params: Params) -> Params:
    """Copies of the tensors."""
    return {name: p.detach().clone() for name, p in params.items()}


def difference(a: Params, b: Params) -> str:
    """The first difference of ``a`` and ``b`` as text; empty if names, shapes, types and bits agree."""
    if a.keys() != b.keys():
        return f"names {sorted(a)} and {sorted(b)}"
    for name, p in a.items():
        if kind(p) != kind(b[name]):
            return f"{name} is {kind(p)} and {kind(b[name])}"
        if p.detach().numpy().tobytes() != b[name].detach().numpy().tobytes():
            return f"{name} differs, by up to {float((p.detach() - b[name].detach()).abs().max()):.3g}"
    return ""


def kind(tensor: Tensor) -> str:
    """Type and shape, as ``float32[3, 2]``."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def step_info(index: int = 0, noise_std: float = 0.0, round: int = 1) -> StepInfo:
    """The ``StepInfo`` of the step ``index``."""
    return StepInfo(index=index, noise_std=torch.tensor(noise_std, dtype=torch.float64), round=round)


class Watching:
    """An optimizer that never moves and stores every private gradient."""

    def __init__(self) -> None:
        self.released: list[Params] = []

    def init(self, params: Params) -> State:
        """No state."""
        return {}

    def query_point(self, params: Params, state: State, info: StepInfo) -> Params:
        """The parameters themselves."""
        return params

    def update(self, params: Params, private_gradient: Params, state: State, info: StepInfo) -> tuple[Params, State]:
        """No step."""
        self.released.append(copied(private_gradient))
        return params, state


def walk(
    optimizer: PrivateOptimizer, params: Params, state: State, steps: range
) -> Iterator[tuple[Params, State, Params]]:
    """Parameters and state after each of ``steps``, and its made-up private gradient.

    The number of the step seeds torch and the gradient.
    """
    for step in steps:
        torch.manual_seed(step)
        info = step_info(step)
        gradient = made_up_gradient(optimizer.query_point(params, state, info), step)
        params, state = optimizer.update(params, gradient, state, info)
        yield params, state, gradient


def made_up_gradient(at: At, seed: int) -> Params:
    """A made-up private gradient at ``at``: standard normal in active coordinates, else 0."""
    return spread(at, compact(at, normal_like(first_point(at), seed)))
