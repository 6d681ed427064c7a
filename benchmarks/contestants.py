"""The contestants of the step benchmark: functions without arguments that execute one step and store nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fed_dpsat import plugins
from fed_dpsat.params import trainable
from fed_dpsat.step import generators
from fed_dpsat.step.clipping import FlatClipping
from fed_dpsat.step.draws import Draws, fresh_key
from fed_dpsat.step.gradients import drawing, level
from fed_dpsat.step.gradients.per_example import ModelLoss, clipped_gradient_sum
from fed_dpsat.step.mechanism import GaussianMechanism
from fed_dpsat.step.optimizers import DPSAT, DPSGD
from fed_dpsat.step.placement import CPU, finish
from fed_dpsat.testing.problems import step_info

Step = Callable[[], object]
CLIP_NORM = 1.0
OPACUS_MODES = ("hooks", "ew", "functorch", "ghost")
SHAPE, CLASSES = (3, 32, 32), 10


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


def build(model: str, device: torch.device = CPU) -> nn.Module:
    """A model by its short name, or one of ``OWN``."""
    torch.manual_seed(0)
    module = OWN[model]() if model in OWN else plugins.load("model", model)(SHAPE, CLASSES)
    made: nn.Module = module.to(device)
    return made


def batch(size: int, device: torch.device = CPU) -> tuple[Tensor, Tensor]:
    """Random images and labels."""
    torch.manual_seed(1)
    return torch.randn(size, *SHAPE).to(device), torch.randint(CLASSES, (size,)).to(device)


def contestants(
    against: list[str], model: str, size: int, physical: int, device: torch.device = CPU
) -> dict[str, Step]:
    """Steps by name, each until ``device`` is done; ``nonprivate``, ``opacus`` and ``bfloat16`` give several."""
    steps: dict[str, Step] = {}
    for name in against:
        if name == "nonprivate":
            steps["nonprivate contiguous"] = _nonprivate(model, size, device, torch.contiguous_format)
            steps["nonprivate channels-last"] = _nonprivate(model, size, device, torch.channels_last)
        elif name == "opacus":
            steps |= {f"opacus {mode}": _opacus(model, size, device, mode) for mode in OPACUS_MODES}
        elif name == "bfloat16":
            steps |= {f"nonprivate {name}": _nonprivate(model, size, device, torch.channels_last, narrow=True)}
            steps |= {f"planned {name}": _engine("planned", model, size, physical, device, precision=name)}
        elif name == "torch-kernels":
            steps["planned torch-kernels"] = _engine("planned", model, size, physical, device, kernels="torch")
        elif name == "torch-draws":
            steps["planned torch-draws"] = _drawn_by_torch(_engine("planned", model, size, physical, device))
        elif name in ("dp-sgd", "dp-sat"):
            steps[name] = _optimizer_step(name, model, size, physical, device)
        else:
            steps[name] = _engine(name, model, size, physical, device)
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


def _nonprivate(
    model: str, size: int, device: torch.device, memory_format: torch.memory_format, narrow: bool = False
) -> Step:
    module = build(model, device).to(memory_format=memory_format)
    inputs, targets = batch(size, device)
    inputs = inputs.contiguous(memory_format=memory_format)
    params = list(module.parameters())

    def step() -> object:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=narrow):
            outputs = module(inputs)
        return torch.autograd.grad(functional.cross_entropy(outputs.float(), targets), params)

    return step


def _engine(
    engine: str,
    model: str,
    size: int,
    physical: int,
    device: torch.device,
    precision: str = "float32",
    kernels: str = "auto",
) -> Step:
    module, data = build(model, device), batch(size, device)
    loss, params, clipping = (
        ModelLoss(module, precision=precision, kernels=kernels),
        trainable(module),
        FlatClipping(clip_norm=CLIP_NORM),
    )

    def step() -> object:
        draws = Draws(key=fresh_key(), ids=np.arange(size))
        return clipped_gradient_sum(
            loss, params, data, clipping, engine=engine, physical_batch_size=physical, draws=draws
        )

    return step


def _optimizer_step(name: str, model: str, size: int, physical: int, device: torch.device) -> Step:
    """A whole private step, including noise and update."""
    module, data = build(model, device), batch(size, device)
    loss, params, clipping = ModelLoss(module), trainable(module), FlatClipping(clip_norm=CLIP_NORM)
    base = DPSGD(lr=0.1, momentum=0.9)
    optimizer = DPSAT(base=base, rho=0.03) if name == "dp-sat" else base
    mechanism = GaussianMechanism(noise_multiplier=1.0, clip_norm=CLIP_NORM, expected_batch_size=size)
    generator, memory = np.random.default_rng(0), {"params": params, "state": optimizer.init(params)}

    def step() -> None:
        params, state = memory["params"], memory["state"]
        at = optimizer.query_point(params, state, step_info())
        total, _ = clipped_gradient_sum(loss, at, data, clipping, physical_batch_size=physical)
        params, state = optimizer.update(params, mechanism.privatize(total, generator), state, step_info())
        memory.update(params=params, state=state)

    return step


def _opacus(model: str, size: int, device: torch.device, mode: str) -> Step:
    """Backward pass and clipped sum as ``PrivacyEngine.make_private`` sets them up, without noise and update."""
    from opacus import PrivacyEngine

    warnings.filterwarnings("ignore")
    module, data = build(model, device), batch(size, device)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), batch_size=size)
    made = PrivacyEngine().make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        criterion=nn.CrossEntropyLoss(),
        data_loader=loader,
        noise_multiplier=1.0,
        max_grad_norm=CLIP_NORM,
        poisson_sampling=False,
        grad_sample_mode=mode,
    )
    wrapped, optimizer = made[0], made[1]
    criterion = made[2] if mode == "ghost" else nn.CrossEntropyLoss()
    inputs, targets = data

    def step() -> None:
        optimizer.zero_grad()
        criterion(wrapped(inputs), targets).backward()
        if mode != "ghost":
            optimizer.clip_and_accumulate()
        for p in optimizer.params:
            p.summed_grad = None

    return step
