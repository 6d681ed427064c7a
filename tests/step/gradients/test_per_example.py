import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from opacus import GradSampleModule
from torch import nn

from fed_dpsat.errors import SettingError
from fed_dpsat.models.resnet import resnet20_gn
from fed_dpsat.params import Params, global_norm, trainable, zeros_like
from fed_dpsat.step.clipping import FlatClipping
from fed_dpsat.step.gradients import planned
from fed_dpsat.step.gradients.per_example import ENGINES, ModelLoss, check_module, clipped_gradient_sum, cross_entropy
from fed_dpsat.step.unchecked import unchecked

UNCLIPPED = FlatClipping(clip_norm=1e30)  # not inf, which takes an ordinary pass
FLOATS = st.floats(-(2.0**40), 2.0**40, width=32)


def images(side, channels=3):
    return torch.randn(5, channels, side, side, dtype=torch.float64)


def tied():
    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    module[2].weight = module[0].weight
    return module


def head(width):
    return nn.Sequential(nn.Flatten(), nn.Linear(width, 4))


MODELS = {
    "linear": lambda: (nn.Linear(7, 4), torch.randn(5, 7, dtype=torch.float64)),
    "convolution": lambda: (nn.Sequential(nn.Conv2d(3, 6, 3), head(6 * 16)), images(6)),
    "stride": lambda: (nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1), head(6 * 9)), images(6)),
    "dilation": lambda: (nn.Sequential(nn.Conv2d(3, 6, 3, dilation=2), head(6 * 4)), images(6)),
    "groups": lambda: (nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), head(6 * 16)), images(6, channels=4)),
    "group norm": lambda: (nn.Sequential(nn.Conv2d(3, 6, 3), nn.GroupNorm(3, 6), head(6 * 16)), images(6)),
    "layer norm": lambda: (nn.Sequential(nn.LayerNorm(7), nn.Linear(7, 4)), torch.randn(5, 7).double()),
    "embedding": lambda: (nn.Sequential(nn.Embedding(9, 3), head(3 * 6)), torch.randint(9, (5, 6))),
    "residual": lambda: (resnet20_gn((3, 8, 8), 4), images(8)),
}
"""What Opacus has hooks for: a module and five inputs of it, four classes."""

ONLY_LOOP = {
    "tied": lambda: (tied(), torch.randn(5, 4, dtype=torch.float64)),
    "sequence": lambda: (nn.Sequential(nn.Linear(3, 2), nn.Tanh(), head(2 * 6)), torch.randn(5, 6, 3).double()),
}


def setting(name):
    """Module in float64, a batch of five, and a bound that clips some of its examples and not others."""
    torch.manual_seed(0)
    module, inputs = (MODELS | ONLY_LOOP)[name]()
    batch = inputs, torch.tensor([0, 1, 2, 3, 0])
    norms = sorted(float(global_norm(g)) for g in loop(module.double(), batch))
    assert norms[1] < norms[3]
    return module, batch, FlatClipping(clip_norm=norms[2])


def loop(module, batch):
    """One gradient per example, one backward pass each."""
    for x, y in zip(*batch, strict=True):
        loss = nn.functional.cross_entropy(module(x[None]), y[None])
        names, leaves = zip(*((n, p) for n, p in module.named_parameters() if p.requires_grad), strict=True)
        yield dict(zip(names, torch.autograd.grad(loss, leaves), strict=True))


def hooks(module, batch):
    """One gradient per example, from Opacus' hooks."""
    wrapped = GradSampleModule(copy.deepcopy(module), loss_reduction="sum")
    nn.functional.cross_entropy(wrapped(batch[0]), batch[1], reduction="sum").backward()
    named = dict(wrapped._module.named_parameters())
    for i in range(len(batch[1])):
        yield {name: p.grad_sample[i] for name, p in named.items()}


def clipped(gradients, clip_norm) -> Params:
    """Sum of ``g * min(1, C / |g|)``, written as in the paper."""
    total: Params = {}
    for gradient in gradients:
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradient.values()))
        for name, g in gradient.items():
            total[name] = total.get(name, 0) + g / max(1, norm / clip_norm)
    return total


def flat(params):
    return torch.cat([p.flatten() for p in params.values()])


@pytest.fixture(params=ENGINES)
def engine(request):
    return request.param


class Dot(nn.Module):
    """``a . x[:, :2] + b . x[:, 2:]`` at zero: the gradient of an example over both parameters is the example."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 1, bias=False), nn.Linear(1, 1, bias=False)
        for p in self.parameters():
            nn.init.zeros_(p)

    def forward(self, x):
        return self.a(x[:, :2]) + self.b(x[:, 2:])


def output(outputs, targets):
    """A criterion: the one output is the loss."""
    return outputs[:, 0]


def dot_sum(inputs, clipping, **settings):
    """Sum of the clipped ``inputs[B, 3]`` as a tensor ``[3]``, and how many were not finite."""
    module = Dot()
    total, nonfinite = clipped_gradient_sum(
        ModelLoss(module, criterion=output), trainable(module), no_targets(inputs), clipping, **settings
    )
    return flat(total), nonfinite


def no_targets(inputs):
    return inputs, torch.zeros(len(inputs))


def test_by_hand(engine):
    """Examples of norm 5 and 0.5 over both parameters, clipped at 1."""
    examples = torch.tensor([[3.0, 0.0, 4.0], [0.3, 0.0, 0.4]])
    total, nonfinite = dot_sum(examples, FlatClipping(clip_norm=1), engine=engine)
    torch.testing.assert_close(total, torch.tensor([0.9, 0.0, 1.2]))
    assert nonfinite == 0


@pytest.mark.parametrize("engine", ["auto", "vmap"])
def test_a_loss_may_be_any_function(engine, input_gradient):
    params, examples = {"a": torch.zeros(2), "b": torch.zeros(1)}, torch.tensor([[3.0, 0.0, 4.0], [0.3, 0.0, 0.4]])
    total, _ = clipped_gradient_sum(
        input_gradient, params, no_targets(examples), FlatClipping(clip_norm=1), engine=engine
    )
    torch.testing.assert_close(total, {"a": torch.tensor([0.9, 0.0]), "b": torch.tensor([1.2])})


@pytest.mark.parametrize("name", MODELS | ONLY_LOOP)
def test_a_loop_over_single_examples(name, engine):
    module, batch, clipping = setting(name)
    total, _ = clipped_gradient_sum(ModelLoss(module), trainable(module), batch, clipping, engine=engine)
    torch.testing.assert_close(total, clipped(loop(module, batch), clipping.clip_norm), rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("name", MODELS)
def test_the_hooks_of_opacus(name, engine):
    module, batch, clipping = setting(name)
    total, _ = clipped_gradient_sum(ModelLoss(module), trainable(module), batch, clipping, engine=engine)
    torch.testing.assert_close(total, clipped(hooks(module, batch), clipping.clip_norm), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("physical", [1, 2, 3, 4, 5, 100])
def test_physical_batches_change_nothing(engine, physical, dtype, tolerance):
    module, (inputs, targets), clipping = setting("group norm")
    loss, params, batch = ModelLoss(module.to(dtype)), trainable(module), (inputs.to(dtype), targets)
    whole, _ = clipped_gradient_sum(loss, params, batch, clipping, engine=engine)
    parts, _ = clipped_gradient_sum(loss, params, batch, clipping, engine=engine, physical_batch_size=physical)
    torch.testing.assert_close(parts, whole, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("physical", [1, 128])
@pytest.mark.parametrize("name", ["linear", "residual", "embedding"])
def test_the_empty_batch_is_zero(engine, name, physical, same_bits):
    module, (inputs, targets), clipping = setting(name)
    params, nobody = trainable(module), (inputs[:0], targets[:0])
    total, nonfinite = clipped_gradient_sum(
        ModelLoss(module), params, nobody, clipping, engine=engine, physical_batch_size=physical
    )
    assert same_bits(total, zeros_like(params))
    assert nonfinite == 0


@pytest.mark.parametrize("physical", [1, 2, 128])
@pytest.mark.parametrize("clip_norm", [1.0, math.inf])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_counts_and_adds_nothing(engine, bad, clip_norm, physical):
    examples = torch.tensor([[3.0, 0.0, 4.0], [0.0, bad, 0.0], [0.0, 0.3, 0.4], [1.0, 1.0, bad]])
    settings = {"clipping": FlatClipping(clip_norm=clip_norm), "engine": engine, "physical_batch_size": physical}
    total, nonfinite = dot_sum(examples, **settings)
    torch.testing.assert_close(total, dot_sum(examples[[0, 2]], **settings)[0])
    assert nonfinite == 2
    nothing, nonfinite = dot_sum(examples[[1, 3]], **settings)
    assert nothing.tolist() == [0, 0, 0]
    assert nonfinite == 2


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["linear", "group norm", "layer norm", "residual"])
def test_a_bad_example_does_not_spread_through_a_network(engine, name, bad):
    module, (inputs, targets), clipping = setting(name)
    inputs = inputs.clone()
    inputs[2].view(-1)[0] = bad
    loss, params, good = ModelLoss(module), trainable(module), [0, 1, 3, 4]
    total, nonfinite = clipped_gradient_sum(loss, params, (inputs, targets), clipping, engine=engine)
    expected, _ = clipped_gradient_sum(loss, params, (inputs[good], targets[good]), clipping, engine=engine)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)
    assert nonfinite == 1


def test_a_gradient_that_overflows_adds_nothing(engine):
    """d/dw exp(w x) is 2 exp(2) at x = 2 and more than float32 holds at x = 100."""
    loss = ModelLoss(nn.Linear(1, 1, bias=False), criterion=lambda outputs, targets: outputs[:, 0].exp())
    batch = no_targets(torch.tensor([[100.0], [2.0]]))
    total, nonfinite = clipped_gradient_sum(loss, {"weight": torch.ones(1, 1)}, batch, UNCLIPPED, engine=engine)
    torch.testing.assert_close(total["weight"].item(), 2 * math.exp(2))
    assert nonfinite == 1


@pytest.mark.parametrize("huge", [1e18, 1e20, 1e30, 3e38])
def test_a_norm_whose_square_overflows_is_clipped_or_counted(engine, huge):
    examples = torch.tensor([[0.0, huge, huge], [0.3, 0.0, 0.4]])
    total, nonfinite = dot_sum(examples, FlatClipping(clip_norm=1), engine=engine)
    assert float((total - examples[1]).norm()) == pytest.approx(0 if nonfinite else 1, abs=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
@given(example=st.lists(FLOATS, min_size=3, max_size=3), clip_norm=st.floats(1e-4, 1e4))
def test_no_example_adds_more_than_the_bound(engine, example, clip_norm):
    """Gradients from 0 to 1e16 times the bound, in two parameters."""
    total, _ = dot_sum(torch.tensor([example]), FlatClipping(clip_norm=clip_norm), engine=engine)
    norm = float(total.double().norm())
    assert norm <= clip_norm * (1 + 1e-6)
    assert norm == pytest.approx(min(math.hypot(*example), clip_norm), rel=1e-5, abs=1e-15)


@pytest.mark.parametrize("size", [10**4, 3 * 10**6])
def test_the_bound_holds_for_many_coordinates(engine, size):
    """A norm summed up in float32 comes out up to 0.4 % too small, and the clipped gradient too long."""
    module = nn.Linear(size, 1, bias=False)
    loss, params, clipping = ModelLoss(module, criterion=output), trainable(module), FlatClipping(clip_norm=1)
    for value in (0.1, 1 / 3, 0.7):
        example = no_targets(torch.full((1, size), value))
        total, _ = clipped_gradient_sum(loss, params, example, clipping, engine=engine)
        assert float(flat(total).double().norm()) <= 1 + 1e-6


class Difference(nn.Module):
    """Logits are ``layer`` at the first position minus ``layer`` at the last; positions come second."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        out = self.layer(x)
        out = out if out.ndim == 3 else out.flatten(2).transpose(1, 2)
        return out[:, 0] - out[:, -1]


@pytest.mark.parametrize(("offset", "contrast"), [(0, 1), (100, 0.1), (1000, 1), (1000, 0.1)])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Linear(64, 64, bias=False), (4, 64)), (nn.Conv2d(32, 32, 3, bias=False), (32, 4, 4))],
    ids=["linear", "convolution"],
)
def test_the_bound_holds_where_a_gradient_cancels(engine, layer, shape, offset, contrast):
    """Two almost equal positions: a norm that is a difference of large numbers may come out as zero."""
    torch.manual_seed(0)
    module, inputs = Difference(layer), offset + contrast * torch.randn(8, *shape)
    loss, params, clipping = ModelLoss(module), trainable(module), FlatClipping(clip_norm=1e-3)
    for x in inputs:
        total, _ = clipped_gradient_sum(loss, params, (x[None], torch.tensor([1])), clipping, engine=engine)
        assert float(flat(total).double().norm()) <= 1e-3 * (1 + 1e-6)


@pytest.mark.parametrize("engine", ["auto", "vmap"])
def test_every_example_has_its_own_dropout(engine):
    """64 equal examples keep a half of each input, doubled; with one mask for all it would be none or all."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 4))
    batch = torch.ones(64, 4), torch.zeros(64, dtype=torch.int64)
    total, _ = clipped_gradient_sum(ModelLoss(module), trainable(module), batch, UNCLIPPED, engine=engine)
    kept = total["1.weight"][0] / total["1.bias"][0]
    assert all(0.5 < k < 1.5 for k in kept.tolist())


def test_an_unknown_engine_lists_the_known_ones():
    with pytest.raises(SettingError, match=r"engine='gost' is not one of .*vmap.*; "):
        dot_sum(torch.ones(1, 3), UNCLIPPED, engine="gost")


@pytest.mark.parametrize("size", [0, -1])
def test_a_physical_batch_of_none_is_refused(size):
    with pytest.raises(SettingError, match=rf"physical_batch_size={size} is not at least 1; "):
        dot_sum(torch.ones(1, 3), UNCLIPPED, physical_batch_size=size)


@pytest.mark.parametrize("targets", [1, 2, 4, 128])
@pytest.mark.parametrize("examples", [3, 129])
def test_inputs_and_targets_of_different_lengths_are_refused(examples, targets, engine):
    """Even one target, which would broadcast: a loss summed over the batch would be each example's."""
    module = nn.Linear(3, 1)
    loss = ModelLoss(module, criterion=lambda outputs, y: outputs[:, 0] * y)
    batch = torch.ones(examples, 3), torch.ones(targets)
    with pytest.raises(ValueError, match=rf"{targets}"):
        clipped_gradient_sum(loss, trainable(module), batch, UNCLIPPED, engine=engine)


class Centred(nn.Module):
    """Takes the mean of the batch off every example."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        return self.head(x - x.mean(0))


def test_a_module_of_ones_own_that_mixes_examples_is_refused_or_mapped_over(engine):
    """Otherwise one example would move the gradients of all the others, each by up to twice the bound."""
    torch.manual_seed(0)
    module, inputs, targets = Centred(), torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    inputs[5] *= 100
    try:
        loss, params, clipping = ModelLoss(module), trainable(module), FlatClipping(clip_norm=0.1)
        whole, _ = clipped_gradient_sum(loss, params, (inputs, targets), clipping, engine=engine)
        without, _ = clipped_gradient_sum(loss, params, (inputs[:5], targets[:5]), clipping, engine=engine)
    except ValueError:
        return
    assert float((flat(whole) - flat(without)).norm()) <= 0.1 * (1 + 1e-6)


class OwnBatchNorm(nn.BatchNorm2d):
    pass


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm2d(6),
        nn.SyncBatchNorm(6),
        nn.BatchNorm2d(6, affine=False),
        OwnBatchNorm(6),
        nn.LazyBatchNorm2d(),
        nn.BatchNorm2d(6).requires_grad_(False),
    ],
    ids=["plain", "sync", "no parameters", "subclass", "lazy", "frozen"],
)
def test_batch_norm_is_refused_by_name(layer):
    module = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Sequential(layer, nn.ReLU()), head(6 * 16))
    with pytest.raises(ValueError, match=rf"mix examples: 1\.0 \({type(layer).__name__}\); use GroupNorm or LayerNorm"):
        ModelLoss(module)


@pytest.mark.parametrize("training", [True, False])
def test_checking_a_module_leaves_its_modes(training):
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).train(training)
    module[1].train(not training)
    check_module(module)
    assert [module.training, module[0].training, module[1].training] == [training, training, not training]


def test_losses_are_one_per_example():
    module, (inputs, targets), _ = setting("linear")
    losses = ModelLoss(module)(trainable(module), inputs, targets)
    expected = [nn.functional.cross_entropy(module(x[None]), y[None]) for x, y in zip(inputs, targets, strict=True)]
    torch.testing.assert_close(losses, torch.stack(expected))


def test_cross_entropy_by_hand():
    """Equal logits of two classes: log 2."""
    torch.testing.assert_close(cross_entropy(torch.zeros(3, 2), torch.tensor([0, 1, 1])), torch.full((3,), math.log(2)))


def test_another_criterion(engine):
    """Squared error of x w at w = 1: gradient 2 x (x - y)."""
    module = nn.Linear(1, 1, bias=False)
    loss = ModelLoss(module, criterion=lambda outputs, targets: (outputs - targets).square().sum(1))
    batch = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [0.0]])
    total, _ = clipped_gradient_sum(loss, {"weight": torch.ones(1, 1)}, batch, UNCLIPPED, engine=engine)
    assert total["weight"].item() == 2 + 8


class Asked(FlatClipping):
    """Notes for how many examples it is asked."""

    def factors(self, squared_norms):
        ASKED.append(len(next(iter(squared_norms.values()))))
        return super().factors(squared_norms)


ASKED = []


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), None])
def test_without_memory_for_a_batch_there_are_smaller_ones(error, monkeypatch, same_bits):
    """The rule is asked once for each example: what adaptive clipping counts has a sensitivity."""
    run = planned.run

    def short(tape, loss_fn, leaves, inputs, targets, *others):
        if len(targets) > 2:
            raise error or RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ...")
        return run(tape, loss_fn, leaves, inputs, targets, *others)

    module = nn.Linear(4, 3)
    arguments = ModelLoss(module), trainable(module), (torch.randn(7, 4), torch.arange(7) % 3)
    expected, _ = clipped_gradient_sum(*arguments, FlatClipping(clip_norm=0.1), physical_batch_size=2)
    monkeypatch.setattr(planned, "run", short)
    ASKED.clear()
    with unchecked():
        found, _ = clipped_gradient_sum(*arguments, Asked(clip_norm=0.1))
    assert ASKED == [2, 2, 2, 1]
    assert same_bits(found, expected)


def test_without_memory_for_one_example_it_is_said(monkeypatch):
    def none(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    module = nn.Linear(4, 3)
    monkeypatch.setattr(planned, "run", none)
    with pytest.raises(torch.OutOfMemoryError):
        clipped_gradient_sum(ModelLoss(module), trainable(module), (torch.randn(7, 4), torch.arange(7) % 3), UNCLIPPED)
