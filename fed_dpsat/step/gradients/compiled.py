"""The kernels of ``kernels_source``, compiled for this processor when they are first wanted.

They are an extra: without a C compiler, or where what it made does not agree with torch, ``refusal`` says why, and
layers take torch's functions; steps were up to 1.6 times as long. The library lies in the user's cache, named after
its source and what the processor can do, so it is compiled once. Examples are shared out among torch's threads; each
has the same bits on any number of them.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import math
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path

import torch
from torch import Tensor

from fed_dpsat.errors import SettingError
from fed_dpsat.step.gradients.kernels_source import SOURCE
from fed_dpsat.step.threads import intra_op_threads

log = logging.getLogger("fed_dpsat")

CACHE = Path("~/.cache/fed_dpsat/kernels")
FLAGS = ("-O3", "-shared", "-fPIC", "-fno-strict-aliasing", "-fno-math-errno", "-fno-trapping-math")
VECTORS = {"AVX512": ("-mavx512f", "-mfma"), "AVX2": ("-mavx2", "-mfma")}
COMPILE_SECONDS = 120

Size = ctypes.c_ssize_t
POINTER = ctypes.c_void_p
SIGNATURES = {
    "conv_weights": [POINTER] * 7 + [Size, POINTER],
    "norm_forward": [POINTER] * 7 + [Size] * 4 + [ctypes.c_double],
    "norm_backward": [POINTER] * 9 + [Size] * 4,
    "position_sums": [POINTER] * 3 + [Size] * 3,
}

KERNELS = ("auto", "compiled", "torch")
"""The choices of the setting ``kernels``."""


@functools.cache
def refusal() -> str:
    """Why there are no compiled kernels here, or nothing."""
    try:
        _library()
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        return str(error)
    with intra_op_threads(1):  # on busy cores, threads wait for one another 100 times as long as they compute
        return _disagreement()


def decided(kernels: str) -> str:
    """What ``kernels`` are here, "auto" decided; raises ``SettingError`` for "compiled" where nothing compiles."""
    if kernels == "auto" and refusal():
        _say_once(refusal())
        return "torch"
    if kernels == "compiled" and refusal():
        raise SettingError(
            "kernels", kernels, f"possible here: {refusal()}", "install a C compiler, or set kernels=torch"
        )
    return "compiled" if kernels == "auto" else kernels


def suit(x: Tensor) -> bool:
    """Whether ``x`` is something that the kernels compute with: narrow numbers are widened for them."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)


@functools.cache
def _library() -> ctypes.CDLL:
    library = built(SOURCE)
    for name, types in SIGNATURES.items():
        getattr(library, name).argtypes, getattr(library, name).restype = types, None
    return library


def built(source: str) -> ctypes.CDLL:
    """The library of ``source``, compiled for this processor if the cache does not have it.

    Raises ``RuntimeError``, ``OSError`` or ``SubprocessError`` with the reason if the compiler makes none.
    """
    flags = FLAGS + VECTORS.get(torch.backends.cpu.get_cpu_capability(), ())
    digest = blake2b((source + repr(flags)).encode(), digest_size=8).hexdigest()
    folder, name = CACHE.expanduser(), f"kernels-{platform.machine()}-{digest}.so"
    if (folder / name).exists():
        return ctypes.CDLL(str(folder / name))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        beside = tempfile.TemporaryDirectory(dir=folder)
    except OSError:  # for this process alone
        beside = tempfile.TemporaryDirectory()
        folder = Path(beside.name)
    with beside:
        made = Path(beside.name) / "made.so"
        _compile(made, source, flags)
        made.replace(folder / name)  # whole or not at all, whoever else compiles
        return ctypes.CDLL(str(folder / name))


def _compile(made: Path, text: str, flags: tuple[str, ...]) -> None:
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        raise RuntimeError("no C compiler (cc, gcc, clang, or what CC names)")
    source = made.with_name("kernels.c")
    source.write_text(text)
    command = [*shlex.split(compiler), *flags, str(source), "-o", str(made), "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "error" in line] or ["no message"]
        raise RuntimeError(f"{compiler} failed: {said[0]}")


def conv_weights(
    x: Tensor,
    grad: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    *,
    depthwise: bool = False,
    filters: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per-example weight gradients of a convolution, ``[B, *kernel, C, O]``, and by filter ``[B, O]`` their squares,
    and with ``filters[*kernel, C, O]`` sums and products with those. ``depthwise``, C is 1; else it has no groups.

    ``x[B, C, H, W]`` and ``grad[B, O, L, K]`` are float32 without gaps, channels last.
    """
    batch, out = len(x), grad.shape[1]
    sides = (*x.shape[2:], x.shape[1], *grad.shape[2:], out, *kernel, *stride, *padding, *dilation, depthwise)
    geometry = (Size * len(sides))(*sides)
    rows = x.new_empty(batch, *kernel, 1 if depthwise else x.shape[1], out)
    squares, sums, along = (x.new_empty(batch, out, dtype=torch.float64) for _ in range(3))

    def some(part: slice) -> None:
        tensors = x[part], grad[part], rows[part], filters, squares[part], sums[part], along[part]
        _library().conv_weights(*map(_pointer, tensors), len(tensors[0]), geometry)

    _share_out(batch, some)
    return rows, squares, sums, along


def norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``torch.native_group_norm`` of float32 ``x[B, C, *]``, channels last: output, ``mean[B, G]``, ``rstd[B, G]``."""
    (batch, channels), positions = x.shape[:2], math.prod(x.shape[2:])
    out, mean, rstd = torch.empty_like(x), x.new_empty(batch, groups), x.new_empty(batch, groups)
    scale, shift = (None if t is None else t.contiguous() for t in (weight, bias))

    def some(part: slice) -> None:
        tensors = x[part], scale, shift, out[part], mean[part], rstd[part], _room(3 * channels)
        _library().norm_forward(*map(_pointer, tensors), len(tensors[0]), positions, channels, groups, eps)

    _share_out(batch, some)
    return out, mean, rstd


def norm_backward(
    x: Tensor, grad: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, groups: int, need_input: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """The gradient of ``x``, if needed, and each example's of weight and bias, ``[B, C]``; as ``norm_forward``."""
    (batch, channels), positions = x.shape[:2], math.prod(x.shape[2:])
    found = torch.empty_like(x) if need_input else None
    weights, biases = x.new_empty(batch, channels), x.new_empty(batch, channels)
    scale = None if weight is None else weight.contiguous()

    def some(part: slice) -> None:
        inner = None if found is None else found[part]
        tensors = x[part], grad[part], scale, mean[part], rstd[part], inner, weights[part], biases[part]
        room = _room(4 * channels)
        _library().norm_backward(*map(_pointer, (*tensors, room)), len(tensors[0]), positions, channels, groups)

    _share_out(batch, some)
    return found, weights, biases


def position_sums(x: Tensor) -> Tensor:
    """``x[B, C, *] -> [B, C]``, of float32, channels last."""
    (batch, channels), positions = x.shape[:2], math.prod(x.shape[2:])
    sums = x.new_empty(batch, channels)

    def some(part: slice) -> None:
        tensors = x[part], sums[part], _room(channels)
        _library().position_sums(*map(_pointer, tensors), len(tensors[0]), positions, channels)

    _share_out(batch, some)
    return sums


def _disagreement() -> str:
    """Which kernel differs from torch, or nothing: compilers err too, and what is clipped has to be what is summed."""
    generator = torch.Generator().manual_seed(0)

    def image(*shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=generator).contiguous(memory_format=torch.channels_last)

    for channels, out, depthwise in ((3, 17, False), (24, 121, False), (29, 121, False), (70, 70, True)):
        x, grad = image(channels, 41, 8), image(out, 20, 5)
        moves = (2, 2), (1, 2), (2, 1)
        rows, squares, _, _ = conv_weights(x, grad, (3, 3), *moves, depthwise=depthwise)
        shape, groups = (out, channels, 3, 3), 1
        if depthwise:
            shape, groups = (out, 1, 3, 3), channels
        for i in range(2):
            one = grad[i : i + 1].double(), x[i : i + 1].double(), torch.zeros(shape, dtype=torch.float64)
            wanted = (False, True, False)
            alone = torch.ops.aten.convolution_backward(*one, None, *moves, False, (0, 0), groups, wanted)[1]
            if not _near(rows[i].permute(3, 2, 0, 1), alone) or not _near(squares[i], alone.flatten(1).square().sum(1)):
                return "compiled weights of convolutions are not those of torch"
    x, grad, size = image(70, 9, 8), image(70, 9, 8), (2, 70, 72, 10)
    weight, bias = torch.randn(2, 70, generator=generator).unbind()
    made, wide = norm_forward(x, weight, bias, 10, 0.1), (x.double(), weight.double(), bias.double())
    expected = torch.native_group_norm(wide[0].contiguous(), *wide[1:], *size, 0.1)
    found = norm_backward(x, grad, weight, *made[1:], 10, True)
    slopes = torch.ops.aten.native_group_norm_backward(
        grad.double().contiguous(), wide[0].contiguous(), *expected[1:], wide[1], *size, [True, True, True]
    )
    pairs = [*zip(made, expected, strict=True), (found[0], slopes[0]), (position_sums(x), x.flatten(2).sum(2))]
    pairs += [(rows.sum(0), slope) for rows, slope in zip(found[1:], slopes[1:], strict=True)]
    if not all(_near(ours, theirs) for ours, theirs in pairs):
        return "compiled norm layers are not those of torch"
    return ""


def _near(ours: Tensor | None, theirs: Tensor) -> bool:
    assert ours is not None
    return bool((ours - theirs).norm() <= 1e-5 * theirs.norm())


def _pointer(t: Tensor | None) -> int | None:
    if t is not None and (t.device.type != "cpu" or t.dtype not in (torch.float32, torch.float64)):
        raise TypeError(f"{t.dtype} on {t.device} for a kernel that reads float32 on a CPU")
    return None if t is None else t.data_ptr()


def _room(doubles: int) -> Tensor:
    return torch.empty(doubles, dtype=torch.float64)


def _share_out(batch: int, some: Callable[[slice], None]) -> None:
    """``some`` examples in each of torch's threads; a call of the library lets others run."""
    threads = min(torch.get_num_threads(), batch)
    if threads <= 1:
        some(slice(0, batch))
        return
    ends = [batch * i // threads for i in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(some, map(slice, ends[:-1], ends[1:])))


@functools.cache
def _say_once(reason: str) -> None:
    log.warning("no compiled kernels, so steps with convolutions may take up to 1.6 times as long: %s", reason)
