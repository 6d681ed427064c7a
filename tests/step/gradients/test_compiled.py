"""Kernels of our own against torch in float64, what a wrong one is told by, and what happens where nothing compiles."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fed_dpsat.client.build import Experiment
from fed_dpsat.errors import SettingError
from fed_dpsat.params import global_norm, trainable
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.step.clipping import FlatClipping
from fed_dpsat.step.gradients import compiled, conv
from fed_dpsat.step.gradients.formats import laid_out
from fed_dpsat.step.gradients.geometry import Geometry
from fed_dpsat.step.gradients.per_example import ModelLoss, clipped_gradient_sum
from fed_dpsat.step.threads import intra_op_threads

here = pytest.mark.skipif(bool(compiled.refusal()), reason=f"no compiled kernels here: {compiled.refusal()}")

SEEDS = st.integers(0, 2**31 - 1)
SIDES = st.integers(1, 9)


def images(seed, *shape):
    return laid_out(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), True)


def near(ours, theirs):
    assert float((ours - theirs).norm()) <= 2e-6 * float(theirs.norm()) + 1e-12


@here
@settings(max_examples=200)
@given(
    seed=SEEDS,
    batch=st.integers(1, 3),
    channels=st.sampled_from([1, 2, 3, 5, 8, 13, 16, 24, 31, 48]),
    out=st.sampled_from([1, 3, 4, 7, 8, 16, 21, 32, 43, 64, 97]),
    sides=st.tuples(SIDES, SIDES),
    kernel=st.tuples(*[st.integers(1, 5)] * 2),
    stride=st.tuples(*[st.integers(1, 3)] * 2),
    padding=st.tuples(*[st.integers(0, 3)] * 2),
    dilation=st.tuples(*[st.integers(1, 2)] * 2),
    depthwise=st.booleans(),
)
def test_weights_of_convolutions(seed, batch, channels, out, sides, kernel, stride, padding, dilation, depthwise):
    channels = out if depthwise else channels
    geometry = Geometry(
        shape=(out, 1 if depthwise else channels, *kernel),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=out if depthwise else 1,
    )
    positions = geometry.positions(sides)
    if min(positions) < 1:
        return
    x, grad = images(seed, batch, channels, *sides), images(seed + 1, batch, out, *positions)
    weight = torch.randn(geometry.shape, generator=torch.Generator().manual_seed(seed))
    held = conv.STRATEGIES["compiled"](
        conv.Convolution(geometry=geometry, strategy="", derived=True), x, grad, weight, None
    )
    single = conv.Convolution(geometry=geometry, strategy="single")
    wide = x.contiguous().double(), grad.contiguous().double(), weight.double()
    expected = conv.STRATEGIES["single"](single, *wide, None).rows()
    near(held.rows(), expected)
    for found, wanted in zip(
        (held.norms, *held.filters),
        (
            expected.flatten(1).square().sum(1),
            expected.flatten(2).square().sum(2),
            expected.flatten(2).sum(2),
            (expected * weight).flatten(2).sum(2),
        ),
        strict=True,
    ):
        assert (
            float((found - wanted).abs().max())
            <= 1e-5
            * float(expected.flatten(1).norm(dim=1).max())
            * max(1.0, float(wanted.abs().max()) ** 0.5, float(weight.norm()))
            + 1e-12
        )


@here
@settings(max_examples=100)
@given(
    seed=SEEDS,
    batch=st.integers(1, 3),
    groups=st.sampled_from([1, 2, 3, 4]),
    width=st.sampled_from([1, 3, 4, 8, 16, 23]),
    sides=st.lists(st.integers(1, 12), min_size=2, max_size=3),
    offset=st.sampled_from([0.0, 100.0]),
    affine=st.booleans(),
    need_input=st.booleans(),
)
def test_norm_layers(seed, batch, groups, width, sides, offset, affine, need_input):
    """Also far from zero, where a mean of squares less the square of the mean would have few digits left."""
    channels = groups * width
    if width * math.prod(sides) < 4:
        return
    x, grad = images(seed, batch, channels, *sides) + offset, images(seed + 1, batch, channels, *sides)
    x = laid_out(x, True)
    weight, bias = images(seed + 2, 2, channels).unbind() if affine else (None, None)
    out, mean, rstd = compiled.norm_forward(x, weight, bias, groups, 1e-5)
    slope, weights, biases = compiled.norm_backward(x, grad, weight, mean, rstd, groups, need_input)
    leaves = [
        t.double().contiguous().requires_grad_() for t in (x, torch.ones(batch, channels), torch.zeros(batch, channels))
    ]
    at, scales, shifts = leaves
    shape = batch, channels, *[1] * len(sides)
    normal = nn.functional.group_norm(at, groups, None, None, 1e-5)
    wide_weight = torch.ones(channels).double() if weight is None else weight.double()
    affined = normal * (wide_weight * scales).view(shape) + shifts.view(shape)
    expected = torch.autograd.grad(affined, leaves, grad.double())
    shift = 0 if bias is None else bias.double().view(1, channels, *[1] * len(sides))
    tolerance = 1e-5 if offset else 2e-6
    pairs = [(out, affined + shift), (weights * wide_weight, expected[1]), (biases, expected[2])]
    for ours, theirs in [*pairs, *([(slope, expected[0])] if need_input else [])]:
        size = float(theirs.norm()) + float(grad.norm() if theirs is not pairs[0][1] else 0)
        assert float((ours - theirs).norm()) <= tolerance * size
    assert (slope is None) == (not need_input)


@here
@pytest.mark.parametrize("positions", [(1, 1), (7, 9), (40, 40)])
def test_sums_over_positions(positions):
    x = images(0, 3, 37, *positions)
    near(compiled.position_sums(x), x.double().flatten(2).sum(2))


@here
def test_an_example_has_the_same_bits_whatever_the_others_and_the_threads():
    x, grad = images(0, 5, 20, 9, 8), images(1, 5, 21, 9, 8)
    settings = (3, 3), (1, 1), (1, 1), (1, 1)
    both = [compiled.conv_weights(x, grad, *settings), compiled.norm_forward(x, None, None, 4, 1e-5)]
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            again = [compiled.conv_weights(x, grad, *settings)[:2], compiled.norm_forward(x, None, None, 4, 1e-5)]
        finally:
            torch.set_num_threads(before)
        assert all(
            torch.equal(a, b) for one, more in zip(both, again, strict=True) for a, b in zip(one, more, strict=False)
        )
    x[0] = math.nan
    alone = compiled.conv_weights(x, grad, *settings)[0]
    assert torch.equal(alone[1:], both[0][0][1:])
    assert bool(alone[0].isnan().any())
    assert torch.equal(compiled.norm_forward(x, None, None, 4, 1e-5)[0][1:], both[1][0][1:])


@here
@pytest.mark.parametrize("magnitude", [1e-4, 1.0, 1e5])
def test_what_is_clipped_is_what_is_summed(magnitude):
    """One example at a time, its bound at a ten thousandth of its norm."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 20, 3, padding=1), nn.GroupNorm(4, 20), nn.ReLU(), nn.Conv2d(20, 20, 3, groups=20), nn.Flatten()
    )
    loss = ModelLoss(module, lambda outputs, targets: magnitude * outputs.square().sum(1), kernels="compiled")
    params, x = trainable(module), torch.randn(1, 3, 12, 12)
    for engine_bound in (1e9, 1.0):
        whole, _ = clipped_gradient_sum(
            loss, params, (x, torch.zeros(1)), FlatClipping(clip_norm=1e12), engine="planned"
        )
        bound = float(global_norm({n: g.double() for n, g in whole.items()})) / 1e4 * min(engine_bound, 1.0)
        total, _ = clipped_gradient_sum(
            loss, params, (x, torch.zeros(1)), FlatClipping(clip_norm=bound), engine="planned"
        )
        norm = float(global_norm({n: g.double() for n, g in total.items()}))
        assert bound * (1 - 1e-5) < norm <= bound * (1 + 1e-6)


MUTATIONS = {
    "a tap too few": ("for (size j = 0; j < s->wide; j++)", "for (size j = 1; j < s->wide; j++)"),
    "an edge too few": ("add(x, g, rows, s, &b, top, last, right, i, j, 1)", "(void)right"),
    "beyond the border": ("*from * step + shift < 0", "*from * step + shift < -1"),
    "one block only": ("acc + c * b->row + o * LANES_OF(V)) += sum", "acc + c * b->row + o * LANES_OF(V)) = sum"),
    "a square too small": (
        "square[k] += (double)row[k] * row[k];\n",
        "square[k] += (double)row[k] * row[k] * (i > 0);\n",
    ),
    "pairs": ("acc + o * LANES_OF(V)) += sum[o]", "acc + o * LANES_OF(V)) += 2 * sum[o]"),
    "the mean": ("mean[b * groups + i] = sum / count", "mean[b * groups + i] = sum / (count + 1)"),
    "the deviation": ("sqrt(sum / count + eps)", "sqrt(sum / count)"),
    "the scale's gradient": ("weights[b * channels + c] = scale[c] * r", "weights[b * channels + c] = scale[c]"),
    "the input's gradient": ("- of_away * middle[c]", "+ of_away * middle[c]"),
    "the sums": ("sums[b * channels + c] = room[c]", "sums[b * channels + c] = room[0]"),
}


@pytest.fixture
def another_source(tmp_path, monkeypatch):
    """Compile other text than ``kernels_source``, with nothing remembered; puts all back."""

    def use(text):
        monkeypatch.setattr(compiled, "SOURCE", text)
        monkeypatch.setattr(compiled, "CACHE", tmp_path / "cache")
        forget()

    def forget():
        compiled._library.cache_clear()
        compiled.refusal.cache_clear()

    yield use
    monkeypatch.undo()
    forget()


@pytest.mark.by_default("one block only", "the sums", "beyond the border")
@here
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_kernel_is_not_used(name, another_source):
    before, after = MUTATIONS[name]
    assert before in compiled.SOURCE
    another_source(compiled.SOURCE.replace(before, after))
    assert "not those of torch" in compiled.refusal()
    assert compiled.decided("auto") == "torch"


@here
def test_the_check_takes_one_thread(another_source, monkeypatch):
    """Two busy threads took up to 1.7 s for what one does in 0.02 s."""
    another_source(compiled.SOURCE)
    checked = []
    monkeypatch.setattr(compiled, "_disagreement", lambda: checked.append(torch.get_num_threads()) or "wrong")
    with intra_op_threads(2):
        assert compiled.refusal() == "wrong"
        assert torch.get_num_threads() == 2
    assert checked == [1]


def test_without_a_compiler_torch_computes_and_says_why(another_source, monkeypatch, caplog):
    another_source(compiled.SOURCE)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    assert "no C compiler" in compiled.refusal()
    assert compiled.decided("auto") == "torch"
    with pytest.raises(SettingError, match=r"kernels='compiled' is not possible here: no C compiler.*kernels=torch"):
        Experiment.build(RunConfig(noise_multiplier=1.0, kernels="compiled"))
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten())
    batch = torch.randn(2, 1, 5, 5), torch.tensor([0, 1])
    compiled._say_once.cache_clear()
    clipped_gradient_sum(ModelLoss(module), trainable(module), batch, FlatClipping(clip_norm=1.0))
    assert "no C compiler" in caplog.text


def test_a_compiler_that_fails_is_quoted(another_source, monkeypatch):
    another_source("this is not C")
    assert "failed: " in compiled.refusal()
    assert "error" in compiled.refusal()
    monkeypatch.setenv("CC", "/bin/false")
    compiled.refusal.cache_clear()
    assert compiled.refusal() == "/bin/false failed: no message"
    monkeypatch.setenv("CC", "/no/such/compiler")
    compiled.refusal.cache_clear()
    assert "/no/such/compiler" in compiled.refusal()


@here
def test_a_folder_that_cannot_be_written_serves_one_process(another_source, monkeypatch, tmp_path):
    another_source(compiled.SOURCE)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(compiled, "CACHE", tmp_path / "file" / "kernels")
    assert compiled.refusal() == ""


@here
@pytest.mark.slow
def test_processes_that_compile_at_once_all_have_it(tmp_path):
    code = (
        "import sys; from pathlib import Path; from fed_dpsat.step.gradients import compiled; "
        "compiled.CACHE = Path(sys.argv[1]); sys.exit(bool(compiled.refusal()))"
    )
    started = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "cache")]) for _ in range(4)]
    assert [process.wait() for process in started] == [0] * 4
    assert [path.suffix for path in Path(tmp_path / "cache").iterdir()] == [".so"]


@here
def test_a_run_says_which_it_took():
    assert Experiment.build(RunConfig(noise_multiplier=1.0)).config.kernels == "compiled"
    assert Experiment.build(RunConfig(noise_multiplier=1.0, kernels="torch")).config.kernels == "torch"
    assert Experiment.build(RunConfig(noise_multiplier=1.0, kernels="torch")).loss_fn.kernels == "torch"


@here
def test_both_kinds_of_kernels_sum_alike():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 20, 3), nn.GroupNorm(4, 20), nn.Tanh(), nn.Conv2d(20, 6, 3), nn.Flatten())
    batch, rule = (torch.randn(4, 3, 9, 9), torch.tensor([0, 1, 2, 3])), FlatClipping(clip_norm=0.1)
    ours, theirs = (
        clipped_gradient_sum(ModelLoss(module, kernels=kernels), trainable(module), batch, rule)[0]
        for kernels in ("compiled", "torch")
    )
    assert all(torch.allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-6) for name in ours)
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)


@here
@pytest.mark.parametrize("x", [torch.zeros(2, 3, 4, 5, device="meta"), torch.zeros(2, 3, 4, 5, dtype=torch.float16)])
def test_what_the_kernels_cannot_read_is_no_crash(x):
    assert not compiled.suit(x)
    with pytest.raises(TypeError, match=r"torch.float.* on (meta|cpu) for a kernel"):
        compiled.position_sums(x)


def test_unknown_kernels_say_which_there_are():
    with pytest.raises(SettingError, match="kernels='fast' is not one of auto, compiled, torch"):
        ModelLoss(nn.Linear(2, 2), kernels="fast")
