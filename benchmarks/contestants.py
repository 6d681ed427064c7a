"""The contestants of the step benchmark: functions without arguments that execute one step and store nothing."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.networks import CLASSES, NETWORKS, OfTokens, Problem, images, named
from fed_dpsat.params import trainable
from fed_dpsat.step import generators
from fed_dpsat.step.clipping import FlatClipping
from fed_dpsat.step.draws import Draws, fresh_key
from fed_dpsat.step.gradients import drawing, level
from fed_dpsat.step.gradients.per_example import ModelLoss, clipped_gradient_sum
from fed_dpsat.step.mechanism import GaussianMechanism
from fed_dpsat.step.optimizers import DPSAT, DPSGD
from fed_dpsat.step.optimizers.base import PrivateOptimizer
from fed_dpsat.step.optimizers.zeroth_order import ZerothOrder
from fed_dpsat.step.placement import CPU, finish
from fed_dpsat.testing.problems import step_info

Step = Callable[[], object]
CLIP_NORM = 1.0
OPACUS_MODES = ("hooks", "ew", "functorch", "ghost")


def wide_linear_cnn() -> nn.Module:
    """The small CNN with a wide linear layer: two 3x3 ReLU convolutions, 16 and 32 channels, Linear(2048, 256)."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2048, 256),
        nn.ReLU(),
        nn.Linear(256, CLASSES),
    )


def dropout_mlp() -> nn.Module:
    """Two hidden layers of 256 and 128, dropout 0.5 after each."""
    hidden = [nn.Linear(3072, 256), nn.ReLU(), nn.Dropout(0.5), nn.Linear(256, 128), nn.ReLU(), nn.Dropout(0.5)]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(128, CLASSES))


def dropout_cnn() -> nn.Module:
    """Two 3x3 ReLU convolutions, 32 and 64 channels, dropout 0.25 of the pooled images, 0.5 of Linear(12544, 128)."""
    images = [nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25)]
    return nn.Sequential(
        *images, nn.Flatten(), nn.Linear(12544, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, CLASSES)
    )


class DropoutTransformer(nn.Module):
    """One encoder layer, 4 heads and dropout 0.1, on 16 tokens of 192."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(192, 4, 256, dropout=0.1, batch_first=True)
        self.head = nn.Linear(192, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """``x[B, 3, 32, 32] -> logits[B, 10]``."""
        logits: Tensor = self.head(self.encoder(x.reshape(x.shape[0], 16, 192)).mean(1))
        return logits


OWN: dict[str, Callable[[], nn.Module]] = {
    "wide-linear-cnn": wide_linear_cnn,
    "dropout-mlp": dropout_mlp,
    "dropout-cnn": dropout_cnn,
    "dropout-transformer": DropoutTransformer,
}
"""Models of these benchmarks alone."""


def problem(model: str, size: int, length: int = 64, device: torch.device = CPU) -> Problem:
    """One of ``NETWORKS`` or ``OWN``, or any other name of settings, on ``device``.

    Raises ``ImportError`` or ``ModelError`` where its library is not installed.
    """
    torch.manual_seed(0)
    if model in NETWORKS:
        made = NETWORKS[model](size, length)
    else:
        made = images(OWN[model]() if model in OWN else named(model), size)
    module = made.module.to(device).train()
    return Problem(module, made.criterion, made.inputs.to(device), made.targets.to(device))


def contestants(against: list[str], made: Problem, physical: int, device: torch.device = CPU) -> dict[str, Step]:
    """Steps by name, each until ``device`` is done; ``nonprivate``, ``opacus`` and ``bfloat16`` give several.

    Each has a copy of the network. A step of Opacus raises what Opacus says of a network that it does not take.
    """
    steps: dict[str, Step] = {}
    layout = torch.channels_last if made.is_of_images else torch.contiguous_format
    for name in against:
        if name == "nonprivate":
            steps["nonprivate contiguous"] = _nonprivate(made, torch.contiguous_format)
            if made.is_of_images:
                steps["nonprivate channels-last"] = _nonprivate(made, torch.channels_last)
        elif name == "opacus":
            steps |= {f"opacus {mode}": _opacus(made, mode) for mode in OPACUS_MODES}
        elif name == "bfloat16":
            steps |= {f"nonprivate {name}": _nonprivate(made, layout, narrow=True)}
            steps |= {f"planned {name}": _engine("planned", made, physical, precision=name)}
        elif name == "torch-kernels":
            steps["planned torch-kernels"] = _engine("planned", made, physical, kernels="torch")
        elif name == "torch-draws":
            steps["planned torch-draws"] = _drawn_by_torch(_engine("planned", made, physical))
        elif name == "inference":
            steps[name] = _inference(made)
        elif name in ("dp-sgd", "dp-sat", "zeroth-order"):
            steps[name] = _optimizer_step(name, made, physical)
        else:
            steps[name] = _engine(name, made, physical)
    return {name: _finished(step, device) for name, step in steps.items()}


def _drawn_by_torch(step: Step) -> Step:
    """``step`` with the generator of torch for the whole batch, which has no guarantee."""

    def whole() -> object:
        with (
            mock.patch.object(drawing.Pass, "answer", lambda self, func, args, kwargs: func(*args, **kwargs)),
            mock.patch.object(level, "RANDOMNESS", "different"),
            mock.patch.object(generators.Mark, "moved", return_value=False),
        ):
            return step()

    return whole


def _finished(step: Step, device: torch.device) -> Step:
    def whole() -> None:
        step()
        finish(device)

    return whole


def _nonprivate(made: Problem, memory_format: torch.memory_format, narrow: bool = False) -> Step:
    module = copy.deepcopy(made.module).to(memory_format=memory_format)
    inputs = made.inputs.contiguous(memory_format=memory_format)
    params = [p for p in module.parameters() if p.requires_grad]

    def step() -> object:
        with torch.autocast(inputs.device.type, dtype=torch.bfloat16, enabled=narrow):
            outputs = module(inputs)
        return torch.autograd.grad(made.criterion(outputs.float(), made.targets).mean(), params, allow_unused=True)

    return step


def _inference(made: Problem) -> Step:
    """A forward pass that nothing is learned from, with its losses."""
    module = copy.deepcopy(made.module)

    def step() -> object:
        with torch.inference_mode():
            return made.criterion(module(made.inputs), made.targets)

    return step


def _engine(engine: str, made: Problem, physical: int, precision: str = "float32", kernels: str = "auto") -> Step:
    module, data = copy.deepcopy(made.module), (made.inputs, made.targets)
    loss = ModelLoss(module, made.criterion, precision=precision, kernels=kernels)
    params, clipping = trainable(module), FlatClipping(clip_norm=CLIP_NORM)

    def step() -> object:
        draws = Draws(key=fresh_key(), ids=np.arange(len(data[0])))
        return clipped_gradient_sum(
            loss, params, data, clipping, engine=engine, physical_batch_size=physical, draws=draws
        )

    return step


def _optimizer_step(name: str, made: Problem, physical: int) -> Step:
    """A whole private step, including noise and update."""
    module, data = copy.deepcopy(made.module), (made.inputs, made.targets)
    loss, params, clipping = ModelLoss(module, made.criterion), trainable(module), FlatClipping(clip_norm=CLIP_NORM)
    optimizer: PrivateOptimizer = DPSGD(lr=0.1, momentum=0.9)
    if name == "dp-sat":
        optimizer = DPSAT(base=optimizer, rho=0.03)
    elif name == "zeroth-order":
        optimizer = ZerothOrder(base=DPSGD(lr=1e-4), seed=0, steps_per_round=1)
    mechanism = GaussianMechanism(noise_multiplier=1.0, clip_norm=CLIP_NORM, expected_batch_size=len(data[0]))
    generator, memory = np.random.default_rng(0), {"params": params, "state": optimizer.init(params)}

    def step() -> None:
        params, state = memory["params"], memory["state"]
        at = optimizer.query_point(params, state, step_info())
        total, _ = clipped_gradient_sum(loss, at, data, clipping, physical_batch_size=physical)
        params, state = optimizer.update(params, mechanism.privatize(total, generator), state, step_info())
        memory.update(params=params, state=state)

    return step


class _Loss(nn.Module):
    """Losses as Opacus' ghost clipping asks for them: by ``reduction``, which it sets."""

    reduction = "mean"

    def __init__(self, made: Problem) -> None:
        super().__init__()
        self._criterion = made.criterion

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        losses = self._criterion(outputs, targets)
        return losses if self.reduction == "none" else losses.mean()


def _opacus(made: Problem, mode: str) -> Step:
    """Backward pass and clipped sum as ``PrivacyEngine.make_private`` sets them up, without noise and update.

    Layers that Opacus has another of are replaced as it advises (``ModuleValidator.fix``). A network of transformers is
    given the position numbers of each example.
    """
    try:
        return _opacus_step(made, mode)
    except Exception as error:  # whatever Opacus says of a layer
        reason = error

    def refused() -> object:
        raise reason

    return refused


def _opacus_step(made: Problem, mode: str) -> Step:
    from opacus import PrivacyEngine
    from opacus.validators import ModuleValidator

    warnings.filterwarnings("ignore")
    module, inputs, targets = copy.deepcopy(made.module), made.inputs, made.targets
    if isinstance(module, OfTokens):
        module.spelled_out = True
    if not ModuleValidator.is_valid(module):
        module = ModuleValidator.fix(module).train()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, targets), batch_size=len(inputs))
    prepared = PrivacyEngine().make_private(
        module=module,
        optimizer=torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1),
        criterion=_Loss(made),
        data_loader=loader,
        noise_multiplier=1.0,
        max_grad_norm=CLIP_NORM,
        poisson_sampling=False,
        grad_sample_mode=mode,
    )
    wrapped, optimizer = prepared[0], prepared[1]
    criterion = prepared[2] if mode == "ghost" else _Loss(made)

    def step() -> None:
        optimizer.zero_grad()
        criterion(wrapped(inputs), targets).backward()
        if mode != "ghost":
            optimizer.clip_and_accumulate()
        for p in optimizer.params:
            p.summed_grad = None

    return step
