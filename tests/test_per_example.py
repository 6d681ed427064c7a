import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from opacus import GradSampleModule
from torch import nn

from fed_dpsat.clipping import FlatClipping
from fed_dpsat.errors import SettingError
from fed_dpsat.models.resnet import resnet20_gn
from fed_dpsat.params import Params, global_norm, trainable, zeros_like
from fed_dpsat.per_example import ENGINES, ModelLoss, check_module, clipped_gradient_sum, cross_entropy

UNCLIPPED = FlatClipping(clip_norm=math.inf)
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


@pytest.fixture
def two_params():
    """Two parameters of two and one coordinates; ``input_gradient`` takes examples of three."""
    return {"a": torch.zeros(2), "b": torch.zeros(1)}


def no_targets(inputs):
    return inputs, torch.zeros(len(inputs))


def test_by_hand(engine, input_gradient, two_params):
    """Examples of norm 5 and 0.5 over both parameters, clipped at 1."""
    batch = no_targets(torch.tensor([[3.0, 0.0, 4.0], [0.3, 0.0, 0.4]]))
    total, nonfinite = clipped_gradient_sum(input_gradient, two_params, batch, FlatClipping(clip_norm=1), engine=engine)
    torch.testing.assert_close(total, {"a": torch.tensor([0.9, 0.0]), "b": torch.tensor([1.2])})
    assert nonfinite == 0


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
def test_what_is_not_finite_counts_and_adds_nothing(engine, bad, clip_norm, physical, input_gradient, two_params):
    inputs = torch.tensor([[3.0, 0.0, 4.0], [0.0, bad, 0.0], [0.0, 0.3, 0.4], [1.0, 1.0, bad]])
    clipping = FlatClipping(clip_norm=clip_norm)

    def sum_of(rows):
        return clipped_gradient_sum(
            input_gradient, two_params, no_targets(rows), clipping, engine=engine, physical_batch_size=physical
        )

    total, nonfinite = sum_of(inputs)
    torch.testing.assert_close(total, sum_of(inputs[[0, 2]])[0])
    assert nonfinite == 2
    nothing, nonfinite = sum_of(inputs[[1, 3]])
    assert flat(nothing).tolist() == [0, 0, 0]
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

    def exponential(params, inputs, targets):
        return torch.exp(inputs[:, 0] * params["w"])

    batch = no_targets(torch.tensor([[100.0], [2.0]]))
    total, nonfinite = clipped_gradient_sum(exponential, {"w": torch.ones(1)}, batch, UNCLIPPED, engine=engine)
    torch.testing.assert_close(total["w"], torch.tensor([2 * math.exp(2)]))
    assert nonfinite == 1


@pytest.mark.parametrize("huge", [1e18, 1e20, 1e30, 3e38])
def test_a_norm_whose_square_overflows_is_clipped_or_counted(engine, huge, input_gradient, two_params):
    batch = no_targets(torch.tensor([[0.0, huge, huge], [0.3, 0.0, 0.4]]))
    total, nonfinite = clipped_gradient_sum(input_gradient, two_params, batch, FlatClipping(clip_norm=1), engine=engine)
    added = flat(total) - batch[0][1]
    assert float(added.norm()) == pytest.approx(0 if nonfinite else 1, abs=1e-6)


@given(example=st.lists(FLOATS, min_size=3, max_size=3), clip_norm=st.floats(1e-4, 1e4))
@pytest.mark.parametrize("engine", ENGINES)
def test_no_example_adds_more_than_the_bound(engine, example, clip_norm):
    """Gradients from 0 to 1e16 times the bound, in two parameters."""
    inputs = torch.tensor([example])

    def loss(params, x, y):
        return x @ torch.cat([params["a"], params["b"]])

    params = {"a": torch.zeros(2), "b": torch.zeros(1)}
    total, _ = clipped_gradient_sum(loss, params, no_targets(inputs), FlatClipping(clip_norm=clip_norm), engine=engine)
    norm = float(flat(total).double().norm())
    assert norm <= clip_norm * (1 + 1e-6)
    assert norm == pytest.approx(min(float(inputs.double().norm()), clip_norm), rel=1e-5, abs=1e-15)


@pytest.mark.parametrize("size", [10**4, 3 * 10**6])
def test_the_bound_holds_for_many_coordinates(engine, size):
    """A norm summed up in float32 comes out up to 0.4 % too small, and the clipped gradient too long."""

    def loss(params, x, y):
        return x @ params["w"]

    for value in (0.1, 1 / 3, 0.7):
        total, _ = clipped_gradient_sum(
            loss,
            {"w": torch.zeros(size)},
            no_targets(torch.full((1, size), value)),
            FlatClipping(clip_norm=1),
            engine=engine,
        )
        assert float(total["w"].double().norm()) <= 1 + 1e-6


@pytest.mark.parametrize("name", ["linear", "residual"])
def test_leaving_one_example_out_changes_the_sum_by_at_most_the_bound(engine, name):
    module, (inputs, targets), _ = setting(name)
    loss, params, clipping = ModelLoss(module), trainable(module), FlatClipping(clip_norm=1e-3)
    whole, _ = clipped_gradient_sum(loss, params, (inputs, targets), clipping, engine=engine)
    for i in range(len(targets)):
        rest = [j for j in range(len(targets)) if j != i]
        without, _ = clipped_gradient_sum(loss, params, (inputs[rest], targets[rest]), clipping, engine=engine)
        assert float((flat(whole) - flat(without)).norm()) == pytest.approx(1e-3, rel=1e-6)


def test_a_zero_gradient_stays_zero(engine, input_gradient, two_params):
    total, nonfinite = clipped_gradient_sum(
        input_gradient, two_params, no_targets(torch.zeros(3, 3)), FlatClipping(clip_norm=1e-6), engine=engine
    )
    assert flat(total).tolist() == [0, 0, 0]
    assert nonfinite == 0


def test_a_frozen_parameter_is_not_in_the_sum(engine):
    module, batch, clipping = setting("linear")
    module.weight.requires_grad_(False)
    total, _ = clipped_gradient_sum(ModelLoss(module), trainable(module), batch, clipping, engine=engine)
    assert list(total) == ["bias"]
    torch.testing.assert_close(total, clipped(loop(module, batch), clipping.clip_norm))


def test_gradients_are_taken_at_params_not_at_the_weights_of_the_module(engine):
    module, batch, clipping = setting("linear")
    elsewhere = {name: p + 1 for name, p in trainable(module).items()}
    total, _ = clipped_gradient_sum(ModelLoss(module), elsewhere, batch, clipping, engine=engine)
    moved = copy.deepcopy(module)
    moved.load_state_dict(elsewhere)
    torch.testing.assert_close(total, clipped(loop(moved, batch), clipping.clip_norm))


def test_nothing_is_changed_in_place(engine, same_bits):
    module, batch, clipping = setting("residual")
    params, weights = trainable(module), trainable(module)
    inputs = batch[0].clone()
    clipped_gradient_sum(ModelLoss(module), params, batch, clipping, engine=engine)
    assert same_bits(params, weights)
    assert same_bits(trainable(module), weights)
    assert torch.equal(inputs, batch[0])


def test_a_parameter_that_is_one_number(engine):
    def scaled(params, inputs, targets):
        return params["scale"] * inputs[:, 0]

    batch = no_targets(torch.tensor([[3.0], [0.25]]))
    params = {"scale": torch.tensor(1.0)}
    total, _ = clipped_gradient_sum(scaled, params, batch, FlatClipping(clip_norm=1), engine=engine)
    torch.testing.assert_close(total, {"scale": torch.tensor(1.25)})


def test_every_example_has_its_own_dropout(engine):
    """Equal examples, a shared mask: the bias gradient of the sum would be 64 times that of one."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 4))
    batch = torch.ones(64, 4), torch.zeros(64, dtype=torch.int64)
    total, _ = clipped_gradient_sum(ModelLoss(module), trainable(module), batch, UNCLIPPED, engine=engine)
    kept = total["1.weight"][0] / total["1.bias"][0]
    assert len(set(kept.tolist())) > 1


def test_an_unknown_engine_lists_the_known_ones(input_gradient, two_params):
    with pytest.raises(SettingError, match=r"engine='gost' is not one of .*vmap.*; "):
        clipped_gradient_sum(input_gradient, two_params, no_targets(torch.ones(1, 3)), UNCLIPPED, engine="gost")


@pytest.mark.parametrize("size", [0, -1])
def test_a_physical_batch_of_none_is_refused(size, input_gradient, two_params):
    with pytest.raises(SettingError, match=rf"physical_batch_size={size} is not at least 1; "):
        clipped_gradient_sum(
            input_gradient, two_params, no_targets(torch.ones(1, 3)), UNCLIPPED, physical_batch_size=size
        )


@pytest.mark.parametrize("examples", [3, 129])
def test_inputs_without_targets_are_refused(examples, engine):
    params = {"w": torch.zeros(3)}
    batch = torch.ones(examples, 3), torch.ones(examples - 1)

    def loss(params, x, y):
        return x @ params["w"] * y

    with pytest.raises(ValueError, match=r"shorter|size"):
        clipped_gradient_sum(loss, params, batch, UNCLIPPED, engine=engine)


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
