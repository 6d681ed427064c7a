"""A card that is none: its tensors lie in the CPU's memory, say that they do not, and mix with no others.

Real kernels run, so results can be compared, and each operation is held to what CUDA would say of its arguments: a
tensor with dimensions that is elsewhere, a format or a mixture of types that its normalisation layers do not take. Its
random numbers come from a generator of its own. It is torch's "PrivateUse1" device, registered when this
is imported: torch counts devices at the first backward pass of a process. With a second one it starts a thread then,
and a fork of the process cannot train any more, so these tests have one to themselves (tests/test_placement_apart.py).
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from fed_dpsat.step import query

NAME = "pretend"
aten = torch.ops.aten

CROSSING = {aten.copy_.default, aten._to_copy.default}
"""What moves numbers from one device to another."""

TAKE_INDICES = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
"""What takes indices that are on the CPU, as on CUDA."""

OF_PLANES = {aten.native_group_norm.default, aten.native_group_norm_backward.default}
"""What takes no channels last, as on CUDA."""


class Elsewhere(torch.Tensor):
    """A tensor of the pretended card; ``raw`` is what it holds."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=torch.device(NAME, 0),
        )
        made.raw = raw
        return made

    @property
    def data(self):
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, new):
        torch.Tensor.data.__set__(self, new)
        self.raw = new.raw

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} of the pretended card outside of it")


query.PLAIN = (*query.PLAIN, Elsewhere)  # in the process of these tests, a tensor like any other


class Card(TorchDispatchMode):
    """Answers every operation while it is entered; counts those that it did."""

    def __init__(self) -> None:
        super().__init__()
        self.state = torch.Generator().manual_seed(7).get_state()
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
        device = kwargs.get("device")
        wanted = any(isinstance(t, Elsewhere) for t in tensors)
        self._check(func, tensors)
        if device is not None:
            wanted = torch.device(device).type == NAME
            kwargs["device"] = torch.device("cpu")
        if torch.Tag.inplace_view in func.tags and wanted:  # squeeze_ and its kind: the shape of both
            func(args[0].raw, *args[1:], **kwargs)
            with torch._C._DisableTorchDispatch():
                return func(*args, **kwargs)
        raws = {id(t.raw): t for t in tensors if isinstance(t, Elsewhere)}
        args, kwargs = tree_map(lambda t: t.raw if isinstance(t, Elsewhere) else t, (args, kwargs))
        with self._draws() if wanted and torch.Tag.nondeterministic_seeded in func.tags else nullcontext():
            out = func(*args, **kwargs)
        self.operations += wanted

        def wrapped(t):
            if not isinstance(t, torch.Tensor):
                return t
            if not wanted:  # also where what is moved to the CPU is there, as an inference tensor is
                return t
            return raws[id(t)] if id(t) in raws else Elsewhere(t)

        return tree_map(wrapped, out)

    def _check(self, func, tensors):
        there = [t for t in tensors if isinstance(t, Elsewhere)]
        here = [t for t in tensors if not isinstance(t, Elsewhere)]
        if there and here and func not in CROSSING:
            scalars = all(t.ndim == 0 for t in here) and torch.Tag.pointwise in func.tags
            indices = func in TAKE_INDICES and isinstance(tensors[0], Elsewhere) and isinstance(tensors[-1], Elsewhere)
            if not scalars and not indices:
                raise RuntimeError(f"{func}: tensors of two devices, {[list(t.shape) for t in here]} on the CPU")
        if func in OF_PLANES and not all(t.raw.is_contiguous() for t in there):
            raise RuntimeError(f"{func}: X is not contiguous")
        if there and "_norm" in func._schema.name and len({t.dtype for t in there}) > 1:
            raise RuntimeError(f"{func}: {[t.dtype for t in there]} are not one type")

    @contextmanager
    def _draws(self):
        here = torch.get_rng_state()
        torch.set_rng_state(self.state)
        try:
            yield
        finally:
            self.state = torch.get_rng_state()
            torch.set_rng_state(here)


class Module(backend_registration._DummyBackendModule):
    """What torch asks a device for; the card that is entered keeps the generator."""

    card, entered = Card(), False

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]

    def manual_seed(self, seed):
        self.card.state = torch.Generator().manual_seed(seed + 1).get_state()  # other numbers than the CPU's

    manual_seed_all = manual_seed

    def get_rng_state(self, device):
        return self.card.state

    def set_rng_state(self, state, device):
        self.card.state = state

    def device(self, device):
        return nullcontext()

    def synchronize(self, device):
        pass


class Hook(backend_registration._DummyPrivateUse1Hook):
    """Hides the card from torch.accelerator in other tests."""

    def is_available(self):
        return MODULE.entered


MODULE = Module()
backend_registration._setup_privateuseone_for_python_backend(rename=NAME, backend_module=MODULE, hook=Hook())
AUTOCAST = torch.library.Library("_", "IMPL")
AUTOCAST.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")


@pytest.fixture
def card():
    """The pretended card, entered."""
    MODULE.card, MODULE.entered = Card(), True
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # or torch.tensor(..., device=) asks the device behind the mode's back
    try:
        with MODULE.card:
            yield MODULE.card
    finally:
        torch._C._set_only_lift_cpu_tensors(before)
        MODULE.entered = False


@pytest.fixture
def pretended(card):
    """Its name."""
    return torch.device(NAME, 0)


NO_CARD = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no card on this machine")


@pytest.fixture(params=[NAME, pytest.param("cuda", marks=NO_CARD)])
def there(request):
    """A device that is not the CPU: the pretended card, and a real one where there is one."""
    return torch.device("cuda:0") if request.param == "cuda" else request.getfixturevalue("pretended")
