"""No example moves a clipped sum by more than the bound, whatever a module does; what keeps examples apart is right."""

import copy
import math
import random
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from fed_dpsat.errors import InputError, ModelError, SettingError
from fed_dpsat.params import global_norm, subtract, trainable
from fed_dpsat.step.clipping import FlatClipping
from fed_dpsat.step.draws import KEY_BYTES, Draws
from fed_dpsat.step.gradients import loop
from fed_dpsat.step.gradients.per_example import ModelLoss, clipped_gradient_sum, cross_entropy

BOUND = 0.1


class Model(nn.Module):
    """A linear layer, what mixes, and a linear layer."""

    def __init__(self, body):
        super().__init__()
        self.first, self.body, self.last = nn.Linear(4, 4), body, nn.Linear(4, 3)

    def forward(self, x):
        return self.last(self.body(self.first(x)))


def total_square(outputs, targets):
    return (outputs.flatten(1) - 0.1).square().sum(1)


def examples():
    """Six in float64, the fourth of them a large one."""
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x[3] *= 100
    return x, torch.arange(6) % 3


def moved(make, criterion=lambda: cross_entropy, *, drop, physical=128, steps=1, engine="auto", batch=None):
    """By how many bounds the sums of a few steps move, at most, without one example."""
    inputs, targets = batch or examples()
    sums = []
    for ids in (np.arange(len(inputs)), np.delete(np.arange(len(inputs)), drop)):
        torch.manual_seed(0)
        module = make().double()
        loss, found = ModelLoss(module, criterion()), []
        for _ in range(steps):
            try:
                total, _ = clipped_gradient_sum(
                    loss,
                    trainable(module),
                    (inputs[ids], targets[ids]),
                    FlatClipping(clip_norm=BOUND),
                    engine=engine,
                    physical_batch_size=physical,
                    draws=Draws(key=bytes(KEY_BYTES), ids=ids),
                )
            except ModelError:
                break  # refused, and so it stays
            found.append(total)
        sums.append(found)
    return max((float(global_norm(subtract(a, b))) for a, b in zip(*sums, strict=False)), default=0.0) / BOUND


def check_bounded(make, criterion=lambda: cross_entropy, plans=((3, 128, 1), (0, 2, 1)), **more):
    """In each engine; a module may be refused."""
    for engine, drop, physical, steps in [*(("auto", *plan) for plan in plans), ("vmap", *plans[0])]:
        found = moved(make, criterion, drop=drop, physical=physical, steps=steps, engine=engine, **more)
        assert found <= 1 + 1e-6, (engine, drop, physical)


# --- what mixes, and keeps nothing ---------------------------------------------------------------------------------


@torch.jit.script
def scripted_mean(x: Tensor) -> Tensor:
    return x - x.mean(0)


@torch.jit.script
def scripted_flip(x: Tensor) -> Tensor:
    return x + x.flip(0) * (x.abs() > 50.0).to(x.dtype)


def scripted_without_graph(x):
    with torch.no_grad():
        flipped = scripted_flip(x)
    return x + flipped - x.detach()


class Leaks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad / grad.norm() + grad.flip(0)


class LeaksInSteps(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad - grad.mean(0) + grad / grad.norm()


class LeaksMapped(LeaksInSteps):
    generate_vmap_rule = True


class LeaksByItsOwnRule(LeaksInSteps):
    @staticmethod
    def vmap(info, in_dims, x):
        return LeaksInSteps.apply(x - x.mean(0, keepdim=True)), in_dims[0]


class Own(torch.Tensor):
    pass


@torch.library.custom_op("fed_dpsat_apart::minus_mean", mutates_args=())
def minus_mean(x: Tensor) -> Tensor:
    return x - x.mean(0, keepdim=True)


@minus_mean.register_fake
def _(x):
    return torch.empty_like(x)


minus_mean.register_autograd(lambda ctx, grad: grad - grad.mean(0, keepdim=True))


@minus_mean.register_vmap
def _(info, in_dims, x):
    return x - x.mean(in_dims[0], keepdim=True), in_dims[0]


@torch.jit.script
def scripted_operation(x: Tensor) -> Tensor:
    return torch.ops.fed_dpsat_apart.minus_mean(x)


def assigned(x):
    x = x.clone()
    x[1:] += x[:-1]
    return x


def assigned_to_last(x):
    x = x.clone()
    x[-1] = x[0]
    return x


def into_a_constant(x):
    total = torch.zeros(1, 4, dtype=x.dtype)
    total += x.detach().sum(0)
    return x - total


def out_of(x):
    total = torch.zeros_like(x)
    torch.mul(x.detach(), 2, out=total)
    return x - total.mean(0)


def out_into_zeros(x):
    total = torch.zeros(len(x), 4, dtype=x.dtype)
    torch.mul(x.detach(), 2, out=total)
    return x - total.sum(0)


def with_numpy(x):
    numbers = x.detach().numpy()
    numbers[1:] += numbers[:-1]
    return x


def with_dlpack(x):
    return x - torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(x.detach())).mean(0)


def hooked(x):
    if x.requires_grad:
        x.register_hook(lambda grad: grad / grad.norm() + grad.flip(0))
    return x


def hooked_node(x):
    if x.grad_fn is not None:
        x.grad_fn.register_prehook(lambda grads: (grads[0] / grads[0].norm(),))
    return x


def hooked_after_node(x):
    if x.grad_fn is not None:
        x.grad_fn.register_hook(lambda got, given: tuple(g if g is None else g / g.norm() for g in got))
    return x


def hooked_together(x):
    if x.requires_grad:
        y = x.tanh()
        torch.autograd.graph.register_multi_grad_hook([x, y], lambda grads: grads[0].mul_(3))
    return x


def packed(x):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t - t.mean(0), lambda t: t):
        return x.tanh() * x


def checkpointed(x, reentrant):
    return torch.utils.checkpoint.checkpoint(lambda h: h - h.mean(0) + h.tanh(), x, use_reentrant=reentrant)


def in_a_thread(x):
    found = []
    thread = threading.Thread(target=lambda: found.append(x - x.mean(0)))
    thread.start()
    thread.join()
    return found[0]


def in_a_pool(x):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: x.tanh() - x.mean(0)).result()


def mixed_up(x):
    share = torch.distributions.Beta(1.0, 1.0).sample().to(x)
    return share * x + (1 - share) * x[torch.randperm(len(x))]


def mixed_up_by_python(x):
    return x + x.roll(1, 0) if random.random() < 0.5 else x


def mixed_up_by_numpy(x):
    return np.random.rand() * x + x.mean(0)


def by_gradient(x):
    with torch.enable_grad():
        z = x.detach().requires_grad_()
        (found,) = torch.autograd.grad((z * z.sum(0)).sum().tanh(), z)
    return x + found


def nested(x):
    return torch.func.vmap(lambda row: row - x.mean(0))(x)


def nested_gradient(x):
    return torch.func.grad(lambda z: (z * x.mean(0)).sum().tanh())(x) + x


def of_two_layers():
    layers = nn.Linear(4, 4), nn.Linear(4, 4)
    return lambda x: layers[len(x) % 2].to(x)(x)


TABLE = torch.randn(300, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

STATELESS = {
    "mean": lambda x: x - x.mean(0, keepdim=True),
    "mean of all": lambda x: x - x.mean(),
    "normalised by deviation": lambda x: (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt(),
    "batch norm by hand": lambda x: functional.batch_norm(x, None, None, training=True) if len(x) > 1 else x,
    "functional instance norm over the batch": lambda x: functional.layer_norm(x.t(), (len(x),)).t(),
    "largest of the batch": lambda x: x / x.abs().max(),
    "branch on the batch": lambda x: x if x.abs().max() < 50 else -3 * x,
    "branch on any": lambda x: -x if (x.abs() > 50).any() else x,
    "threshold of the batch": lambda x: torch.where(x > x.mean(0) + 50, -x, x),
    "large values swapped": lambda x: torch.where(x.abs() > 50, x.flip(0), x),
    "number read off": lambda x: x * (1.0 if x.sum().item() < 1e2 else 2.0),
    "numbers read off": lambda x: x * max(map(max, x.tolist())),
    "an int read off": lambda x: x * int(x.abs().max()),
    "sorted": lambda x: x.sort(0).values,
    "argsorted": lambda x: x[x.sum(1).argsort()],
    "median": lambda x: x - x.median(0).values,
    "quantile": lambda x: x - x.quantile(0.5, dim=0),
    "mode": lambda x: x - x.round().mode(0).values,
    "unique": lambda x: x * len(x.round().unique()),
    "nonzero": lambda x: x * (1 + len((x > 50).nonzero())),
    "chosen by a mask": lambda x: x + x[x.abs().sum(1) < 50].sum(0),
    "bincount": lambda x: x * (x.abs() > 50).long().flatten().bincount(minlength=2)[1],
    "histogram": lambda x: x + torch.histc(x.detach(), 4),
    "summed up": lambda x: x.cumsum(0),
    "running maximum": lambda x: x.cummax(0).values,
    "softmax over the batch": lambda x: x.softmax(0),
    "unit length over the batch": lambda x: functional.normalize(x, dim=0),
    "all pairs": lambda x: (x @ x.T) @ x,
    "all pairs, without a graph": lambda x: x + (x @ x.detach().T).triu(1) @ x,
    "distances": lambda x: x + torch.cdist(x, x).sum(1, keepdim=True),
    "einsum": lambda x: torch.einsum("ik,jk,jl->il", x, x, x),
    "covariance": lambda x: x @ torch.cov(x.T) if len(x) > 1 else x,
    "rolled": lambda x: x.roll(1, 0),
    "flipped": lambda x: x.flip(0),
    "neighbour": lambda x: torch.cat([x[1:], x[:1]]),
    "neighbour, stacked": lambda x: torch.stack([*x[1:], x[0]]),
    "everyone reads row 1": lambda x: x[torch.zeros(len(x), dtype=torch.long)],
    "everyone reads the last row": lambda x: x[-1:].expand_as(x),
    "gathered": lambda x: x.gather(0, torch.zeros(len(x), 4, dtype=torch.long)),
    "scattered": lambda x: torch.zeros_like(x).scatter_add(0, torch.zeros(len(x), 4, dtype=torch.long), x),
    "put together": lambda x: torch.zeros(1, 4).to(x).index_add(0, torch.zeros(len(x), dtype=torch.long), x) + x,
    "reshaped across": lambda x: x.reshape(4, len(x)).cumsum(1).reshape(len(x), 4),
    "strided across": lambda x: torch.as_strided(x.contiguous(), (len(x), 4), (0, 1)),
    "padded and convolved": lambda x: functional.avg_pool1d(x.T[None], 3, 1, 1)[0].T,
    "interpolated": lambda x: functional.interpolate(x.T[None], 2 * len(x))[0, :, ::2].T,
    "unfolded": lambda x: functional.pad(x, (0, 0, 1, 1)).unfold(0, 3, 1).sum(-1),
    "attention over the batch": lambda x: functional.scaled_dot_product_attention(x, x, x),
    "a layer whose weight is the batch": lambda x: x + functional.linear(x, x)[:, :1],
    "its row's number": lambda x: x * torch.arange(1, len(x) + 1)[:, None],
    "positions of the batch": lambda x: x + TABLE[: len(x)],
    "looked up by place": lambda x: x + functional.embedding(torch.arange(len(x)), TABLE),
    "a triangle": lambda x: x * torch.ones(len(x), 4).tril(),
    "a unit matrix": lambda x: x + torch.eye(len(x), 4),
    "the size": lambda x: x * len(x),
    "mean of many": lambda x: x - x.mean(0) if len(x) > 4 else x,
    "odd": lambda x: x * (len(x) % 2 * 2 - 1),
    "step by the size": lambda x: x.roll(len(x) // 4, 0),
    "scripted mean": scripted_mean,
    "scripted flip of large values": scripted_flip,
    "scripted, without a graph": scripted_without_graph,
    "backward": Leaks.apply,
    "backward, in steps": LeaksInSteps.apply,
    "backward, with a rule that torch makes": LeaksMapped.apply,
    "a rule of its own": LeaksByItsOwnRule.apply,
    "tensor of a class of its own": lambda x: (x.as_subclass(Own) - x.mean(0)).as_subclass(Tensor),
    "an operation of its own": minus_mean,
    "assigned": assigned,
    "assigned to the last": assigned_to_last,
    "into a constant": into_a_constant,
    "out=": out_of,
    "out= into zeros": out_into_zeros,
    "numpy": with_numpy,
    "dlpack": with_dlpack,
    "hook on a tensor": hooked,
    "hook before a node": hooked_node,
    "hook after a node": hooked_after_node,
    "hook on several": hooked_together,
    "hooks on what is saved": packed,
    "checkpoint": lambda x: checkpointed(x, False),
    "checkpoint, reentrant": lambda x: checkpointed(x, True),
    "thread": in_a_thread,
    "pool of threads": in_a_pool,
    "fork": lambda x: torch.jit.wait(torch.jit.fork(lambda h: h - h.mean(0), x)),
    "mixup": mixed_up,
    "mixup by Python's chance": mixed_up_by_python,
    "mixup by numpy's chance": mixed_up_by_numpy,
    "dropped for all": lambda x: functional.dropout(torch.ones(4), 0.5) * x + x.mean(0),
    "a gradient within": by_gradient,
    "a map within": nested,
    "a gradient of torch.func within": nested_gradient,
    "a product with respect to the mean": lambda x: torch.func.jvp(torch.tanh, (x,), (x.mean(0).expand_as(x),))[1],
    "without a graph": lambda x: x - x.detach().mean(0),
    "scripted operation of its own": scripted_operation,
}
FAULTS = {
    "checkpoint, reentrant": "a valid module raises RuntimeError: the loop asks with autograd.grad",
    "thread": "what is no RuntimeError is not taken to the loop",
    "scripted operation of its own": "register_vmap of a custom operation within a script mixes; no call shows it",
}


def known(cases, faults):
    """``cases`` to be tested, those with a known fault marked."""
    marks = {case: [pytest.mark.xfail(strict=True, reason=why)] for case, why in faults.items()}
    return [pytest.param(case, marks=marks.get(case, ())) for case in cases]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", known(STATELESS, FAULTS))
def test_nobody_moves_a_sum_beyond_the_bound(case):
    check_bounded(lambda: Model(STATELESS[case]))


# --- what keeps something -------------------------------------------------------------------------------------------


class Bank(nn.Module):
    """Less the mean of what it saw before, once that is enough."""

    def __init__(self, warm, most=None):
        super().__init__()
        self.first, self.seen, self.warm = nn.Linear(4, 4), deque(maxlen=most), warm

    def forward(self, x):
        h = self.first(x)
        out = h - torch.stack([one.mean(0) for one in self.seen]).mean(0) if len(self.seen) >= self.warm else h
        self.seen.append(h.detach())
        return out


class Largest(nn.Module):
    """Divided by the largest value so far; ``keep`` says where that is."""

    def __init__(self, keep):
        super().__init__()
        self.first, self.keep = nn.Linear(4, 4), keep
        self.register_buffer("top", torch.ones(()))

    def forward(self, x):
        h = self.first(x)
        return h / self.keep(self, h.detach().abs().max() / 8)


def assigned_buffer(module, value):
    module.top = torch.maximum(module.top, value)
    return module.top


def written_buffer(module, value):
    return module.top.copy_(torch.maximum(module.top, value))


def in_a_closure():
    kept = [1.0]

    def keep(module, value):
        kept[0] = max(kept[0], float(value))
        return kept[0]

    return keep


def in_a_tensor_of_a_closure():
    kept = torch.ones(())
    return lambda module, value: kept.copy_(torch.maximum(kept, value))


def in_a_list_of_tensors():
    kept = [torch.ones(())]

    def keep(module, value):
        kept.append(torch.maximum(kept[-1], value))
        return kept[-1]

    return keep


def in_a_class():
    class Holder:
        top = 1.0

    def keep(module, value):
        Holder.top = max(Holder.top, value.item())
        return Holder.top

    return keep


class LargestLoss(nn.Module):
    """A criterion in units of the largest loss so far."""

    def __init__(self):
        super().__init__()
        self.register_buffer("top", torch.full((), 8.0, dtype=torch.float64))

    def forward(self, outputs, targets):
        losses = total_square(outputs, targets)
        with torch.no_grad():
            self.top.copy_(torch.maximum(self.top, losses.max()))
        return losses / self.top


class Counter(nn.Module):
    """Another sign from some call on."""

    def __init__(self, last):
        super().__init__()
        self.first, self.calls, self.last = nn.Linear(4, 4), 0, last

    def forward(self, x):
        self.calls += 1
        return self.first(x) * (1 if self.calls <= self.last else -1)


class CounterInABuffer(Counter):
    def __init__(self, last):
        super().__init__(last)
        self.register_buffer("number", torch.zeros(()))

    def forward(self, x):
        self.number += 1
        return self.first(x) * torch.where(self.number <= self.last, 1.0, -1.0)


def memory_of_gradients(mapped):
    class Remembers(torch.autograd.Function):
        generate_vmap_rule = mapped
        top = torch.ones((), dtype=torch.float64)

        @staticmethod
        def forward(x):
            return x.clone()

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, grad):
            Remembers.top = torch.maximum(Remembers.top, grad.detach().abs().max())
            return grad / Remembers.top

    return Model(Remembers.apply)


def unmarked(copied):
    """Less a hundred times what it saw three calls before, by a function that no call shows."""
    kept = []

    def body(h):
        kept.append(copied(h.detach()))
        return h - 100 * kept[-3] if len(kept) > 4 and len(kept[-3]) == len(h) else h

    return Model(body)


@torch.jit.script
def scripted_copy(x: Tensor) -> Tensor:
    return x * 1.0


def hook_with_a_memory():
    kept = [torch.ones((), dtype=torch.float64)]

    def hook(grad):
        kept[0] = torch.maximum(kept[0], grad.abs().max() * 10)
        return grad / kept[0]

    def body(h):
        if h.requires_grad:
            h.register_hook(hook)
        return h

    return Model(body)


MEMORIES = {
    **{f"bank after {warm}": (lambda warm=warm: Bank(warm), None) for warm in (1, 2, 3, 4, 5, 7)},
    "deque of two after 2": (lambda: Bank(2, 2), None),
    "buffer, assigned": (lambda: Largest(assigned_buffer), None),
    "buffer, written": (lambda: Largest(written_buffer), None),
    "closure": (lambda: Largest(in_a_closure()), None),
    "tensor of a closure": (lambda: Largest(in_a_tensor_of_a_closure()), None),
    "list of tensors": (lambda: Largest(in_a_list_of_tensors()), None),
    "class": (lambda: Largest(in_a_class()), None),
    "criterion": (lambda: nn.Linear(4, 4), LargestLoss),
    **{f"counter to {last}": (lambda last=last: Counter(last), None) for last in (2, 3, 5)},
    "counter in a buffer": (lambda: CounterInABuffer(3), None),
    "backward": (lambda: memory_of_gradients(False), None),
    "backward with a rule that torch makes": (lambda: memory_of_gradients(True), None),
    "by a script": (lambda: unmarked(scripted_copy), None),
    "by a map": (lambda: unmarked(lambda x: torch.func.vmap(torch.clone)(x)), None),
    "by an operation": (lambda: unmarked(torch.clone), None),
    "hook": (hook_with_a_memory, None),
}
OUTSIDE = "a pass per example copies the module, not what is kept outside of it"
CHECKED = "check_repeats leaves tensors of the first example, unmarked, in the module"
STATE = "what a module counts goes from chunk to chunk, and chunks shift without an example"
BEHIND = "a backward pass is not watched for tensors of another"
KEPT = {
    "bank after 2": CHECKED,
    "deque of two after 2": CHECKED,
    "buffer, assigned": "a dead tensor stays in the buffer, and RuntimeError is raised",
    "closure": OUTSIDE,
    "tensor of a closure": OUTSIDE,
    "class": OUTSIDE,
    "criterion": OUTSIDE,
    "counter to 3": STATE,
    "counter to 5": STATE,
    "counter in a buffer": STATE,
    "backward": BEHIND,
    "backward with a rule that torch makes": BEHIND,
    "by a script": "what a script makes is not marked",
    "by a map": "what torch.func.vmap makes is not marked",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", known(MEMORIES, KEPT))
def test_nothing_that_is_kept_moves_a_sum_beyond_the_bound(case):
    make, criterion = MEMORIES[case]
    plans = (3, 128, 2), (0, 128, 2), (0, 2, 2), (1, 1, 1)
    check_bounded(make, criterion or (lambda: total_square), plans=plans)
