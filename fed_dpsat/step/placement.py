"""Where a process computes: on its CPU, or on a card. The one place that knows how they differ.

============================================ ==========================================================
on the card                                  on the CPU, whatever the device
============================================ ==========================================================
the model, its loss and the server's tests   coins, noise and every other draw, those of dropout too
a batch, from when its rows were gathered    data sets, messages, files, aggregation, the ledger
parameters and state while a client trains   both before and after; scalars of a state (counts)
============================================ ==========================================================

So the same seed draws the same coins and the same noise on every device. Sums differ in their last bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fed_dpsat.errors import SettingError
from fed_dpsat.params import Params
from fed_dpsat.settings.config import RunConfig

CPU = torch.device("cpu")

BYTES_AT_ONCE = 256 << 20
"""Of a card's memory, for what a CPU does in pieces that its cache holds: each piece is a few kernels to start."""


def decided(config: RunConfig) -> RunConfig:
    """``config`` with ``device`` "auto" decided for this machine; raises ``SettingError`` as ``require`` does."""
    if config.device != "auto":
        require(config.device)
        return config
    if torch.cuda.is_available() and (config.gpus_per_worker or not config.workers):
        return dataclasses.replace(config, device="cuda")
    return dataclasses.replace(config, device="cpu", gpus_per_worker=0.0)


def require(device: str) -> None:
    """Raise ``SettingError`` unless torch sees the card that ``device`` names."""
    if device == "cpu":
        return
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if torch_device(device).index >= seen:
        raise SettingError(
            "device",
            device,
            f"there: torch {torch.__version__} sees {seen} cards on this machine",
            "start where there is one, with a torch built for CUDA, or set device=cpu",
        )


def torch_device(device: str) -> torch.device:
    """``device`` as torch names it; "cuda" is the first card that this process sees."""
    return torch.device("cuda:0" if device == "cuda" else device)


def described(device: str) -> str:
    """``device`` and, for a card, what it is."""
    return f"{device} ({torch.cuda.get_device_name(torch_device(device))})" if device != "cpu" else device


def is_card(device: torch.device) -> bool:
    """Whether ``device`` is another than the CPU."""
    return device.type != "cpu"


def device_of(where: nn.Module | Params) -> torch.device:
    """The device of a module's or of all parameters, which is one; the CPU if there are none."""
    tensors = where.parameters() if isinstance(where, nn.Module) else where.values()
    return next((p.device for p in tensors), CPU)


def moved(params: Params, device: torch.device) -> Params:
    """``params`` on ``device``; no copy of those that are there."""
    return {name: p.to(device) for name, p in params.items()}


def moved_state(state: Mapping[str, Any], names: Collection[str], device: torch.device) -> dict[str, Any]:
    """The tree ``state`` on ``device``, but for scalars that have no parameter's name: those are bookkeeping."""
    return {
        name: moved_state(kept, names, device)
        if isinstance(kept, dict)
        else (kept.to(device) if kept.ndim or name in names else kept)
        for name, kept in state.items()
    }


def module_on(module: nn.Module, device: torch.device) -> nn.Module:
    """``module``; or, on a card, what it moves to there."""
    return module.to(device) if is_card(device) else module


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """Products and convolutions of float32 on a card are float32, and cuDNN's algorithms repeat their bits.

    By default torch lets convolutions round their inputs to TF32, 10 bits. A norm from Gram matrices would then be
    another one than that of what is summed, and noise scaled to a bound that examples exceed.
    """
    if not is_card(device):
        yield
        return
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32, cudnn.deterministic, torch.get_float32_matmul_precision()
    cudnn.allow_tf32, cudnn.deterministic = False, True
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        cudnn.allow_tf32, cudnn.deterministic = before[:2]
        torch.set_float32_matmul_precision(before[2])


def seed(device: torch.device, value: int) -> None:
    """Set torch's generators of the CPU and of ``device``."""
    # not torch.manual_seed, which without a GPU queues a call for one, with its stack, at each client
    torch.default_generator.manual_seed(value)
    if is_card(device):
        card = torch.get_device_module(device)
        with card.device(device):
            card.manual_seed(value)


def generator_states(device: torch.device) -> tuple[Tensor, ...]:
    """Where torch's generators stand, of the CPU and of ``device``."""
    here = torch.get_rng_state()
    return (here, torch.get_device_module(device).get_rng_state(device)) if is_card(device) else (here,)


def rewind(device: torch.device, states: tuple[Tensor, ...]) -> None:
    """Set them back to what ``generator_states`` said."""
    torch.set_rng_state(states[0])
    if is_card(device):
        torch.get_device_module(device).set_rng_state(states[1], device)


def bytes_at_once(device: torch.device, in_cache: int) -> int:
    """How much to work on at a time: ``in_cache`` bytes on the CPU."""
    return BYTES_AT_ONCE if is_card(device) else in_cache


def finish(device: torch.device) -> None:
    """Wait until a card has done what it was asked, before a clock is read."""
    if is_card(device):
        torch.get_device_module(device).synchronize(device)
