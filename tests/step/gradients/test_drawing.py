"""What a model draws is each example's own: whatever the engine, the chunks and the company."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils import checkpoint

from fed_dpsat.errors import ModelError, SettingError
from fed_dpsat.params import trainable
from fed_dpsat.step.clipping import FlatClipping
from fed_dpsat.step.draws import Draws, kept
from fed_dpsat.step.gradients.capture import Capture
from fed_dpsat.step.gradients.per_example import ENGINES, ModelLoss, clipped_gradient_sum
from fed_dpsat.testing.problems import step_info

KEY = bytes(range(16))
IDS = np.array([10, 3, 4, 5, 90, 7])
RULE = FlatClipping(clip_norm=0.5)


class Between(nn.Module):
    """``draw`` between two linear layers."""

    def __init__(self, draw, width=6):
        super().__init__()
        self.a, self.draw, self.b = nn.Linear(width, width), draw, nn.Linear(width, 3)

    def forward(self, x):
        h = self.draw(self.a(x))
        return self.b(h if h.ndim == 2 else h.mean(1))


class Attention(nn.Module):
    """Torch's attention, with or without the weights that it can give."""

    def __init__(self, need_weights):
        super().__init__()
        self.attention, self.need = nn.MultiheadAttention(6, 2, dropout=0.4, batch_first=True), need_weights

    def forward(self, x):
        return self.attention(x, x, x, need_weights=self.need)[0]


class Positions(nn.Module):
    """Dropout of what is not of the batch, whose first dimension is as long as a batch may be."""

    def __init__(self):
        super().__init__()
        self.places = nn.Parameter(torch.randn(len(IDS), 6))

    def forward(self, x):
        return x + functional.dropout(self.places, 0.5, self.training)


class Recurrent(nn.Module):
    """Layers with dropout between them."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 6, 2, dropout=0.5, batch_first=True)

    def forward(self, x):
        return self.lstm(x)[0]


def drop_path(x):
    """As timm has it."""
    return x * x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(0.7) / 0.7


def masked_in_no_grad(x):
    with torch.no_grad():
        mask = functional.dropout(torch.ones_like(x), 0.5)
    return x * mask


ONE_PASS = {
    "dropout": nn.Dropout(0.5),
    "in place": nn.Dropout(0.5, inplace=True),
    "all of it": nn.Dropout(1.0),
    "torch's own name": lambda x: torch.dropout(x, 0.5, True),
    "alpha dropout": nn.AlphaDropout(0.3),
    "drop path": drop_path,
    "without gradient": masked_in_no_grad,
    "noise": lambda x: x + torch.randn_like(x) * x.sigmoid(),
    "uniform": lambda x: x * torch.rand_like(x),
    "coins": lambda x: x * torch.bernoulli(x.sigmoid()),
    "filled": lambda x: x * torch.empty_like(x).uniform_(-1, 2) + torch.empty_like(x).normal_(1, 2),
    "exponential": lambda x: x * torch.empty_like(x).exponential_(2),
    "rrelu": nn.RReLU(),
    "two calls": nn.Sequential(nn.Dropout(0.5), nn.Tanh(), nn.Dropout(0.2)),
}
MAPPED = {
    "gumbel": functional.gumbel_softmax,
    "of a size": lambda x: x * torch.rand(len(x), 1, dtype=x.dtype),
    "written to": lambda x: x * torch.empty(x.shape, dtype=x.dtype).bernoulli_(0.5),
    "of the weights": Positions(),
}
ALONE = {
    "random": lambda x: x * (random.random() < 0.5),
    "numpy": lambda x: x * float(np.random.rand() < 0.5),
    "permuted": lambda x: x[..., torch.randperm(x.shape[-1])],
    "checkpoint": lambda x: checkpoint.checkpoint(lambda h: functional.dropout(h.tanh(), 0.5), x, use_reentrant=False),
}
SEQUENCES = {
    "transformer": nn.TransformerEncoderLayer(6, 2, 8, dropout=0.3, batch_first=True),
    "attention": Attention(need_weights=False),
    "attention weights": Attention(need_weights=True),
    "dropout1d": nn.Dropout1d(0.5),
}
CASES = {
    **{name: (draw, (6,), "planned") for name, draw in ONE_PASS.items()},
    **{name: (draw, (4, 6), "planned") for name, draw in SEQUENCES.items()},
    **{name: (draw, (6,) if name != "of the weights" else (len(IDS), 6), "planned") for name, draw in MAPPED.items()},
    **{name: (draw, (6,), "loop") for name, draw in ALONE.items()},
    "lstm": (Recurrent(), (4, 6), "planned"),
}


def setting(name):
    draw, shape, way = CASES[name]
    torch.manual_seed(0)
    module = Between(draw).double()
    return ModelLoss(module), torch.randn(6, *shape).double(), torch.tensor([0, 1, 2, 0, 1, 2]), way


def total(loss, inputs, targets, ids, *, key=KEY, rule=RULE, **settings):
    found, _ = clipped_gradient_sum(
        loss, trainable(loss.module), (inputs, targets), rule, draws=Draws(key=key, ids=np.array(ids)), **settings
    )
    return torch.cat([g.flatten() for g in found.values()])


@pytest.fixture
def said(monkeypatch):
    """Which slower ways were taken."""
    ways = set()
    monkeypatch.setattr("fed_dpsat.step.gradients.loop._say_once", lambda module, reason: ways.add("loop"))
    return ways


@pytest.mark.parametrize("name", CASES)
def test_a_sum_is_that_of_its_examples_one_by_one(name, said):
    """Equal to a sum over batches of one, in any chunks and any order; and with the draws of other examples another."""
    loss, x, y, way = setting(name)
    whole = total(loss, x, y, IDS)
    assert said == ({"loop"} if way == "loop" else set())
    one_by_one = sum(total(loss, x[i : i + 1], y[i : i + 1], IDS[i : i + 1]) for i in range(6))
    torch.testing.assert_close(whole, one_by_one, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(total(loss, x, y, IDS, physical_batch_size=4), whole, rtol=1e-9, atol=1e-12)
    order = [5, 2, 0, 1, 4, 3]
    torch.testing.assert_close(total(loss, x[order], y[order], IDS[order]), whole, rtol=1e-9, atol=1e-12)
    assert name == "all of it" or float((total(loss, x, y, IDS, key=b"q" * 16) - whole).norm()) > 0.01


@pytest.mark.parametrize("name", {**ONE_PASS, **SEQUENCES})
def test_every_engine_draws_the_same(name):
    loss, x, y, _ = setting(name)
    unclipped = FlatClipping(clip_norm=1e30)
    by_vmap = total(loss, x, y, IDS, rule=unclipped, engine="vmap")
    for engine, rule in (("planned", unclipped), ("planned", FlatClipping(clip_norm=math.inf))):
        torch.testing.assert_close(total(loss, x, y, IDS, engine=engine, rule=rule), by_vmap, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", sorted(CASES.keys() - {"all of it"}))
def test_opacus_is_refused_what_draws(name):
    loss, x, y, _ = setting(name)
    with pytest.raises(SettingError, match="engine='opacus' is not"):
        total(loss, x, y, IDS, engine="opacus")


@pytest.mark.parametrize("engine", ["auto", "vmap"])
@pytest.mark.parametrize("clip_norm", [1.0, 1e-3])
def test_an_example_in_front_moves_a_sum_by_at_most_the_bound(engine, clip_norm):
    """Dropout before a linear layer, 1,000 others: with masks by position the sum moved by 35 times the bound."""
    torch.manual_seed(0)
    loss = ModelLoss(nn.Sequential(nn.Dropout(0.5), nn.Linear(20, 5)))
    x, y = torch.randn(1001, 20), torch.randint(5, (1001,))
    rule = FlatClipping(clip_norm=clip_norm)
    without = total(loss, x[1:], y[1:], range(1000), engine=engine, rule=rule)
    moved = total(loss, x, y, [1000, *range(1000)], engine=engine, rule=rule) - without
    assert 0 < float(moved.norm()) <= clip_norm * (1 + 1e-3)
    by_position = total(loss, x, y, range(1001), engine=engine, rule=rule) - without
    assert float(by_position.norm()) > 10 * clip_norm  # what the old way amounts to


@pytest.mark.parametrize("name", CASES)
def test_nobody_elses_generator_is_moved(name):
    loss, x, y, _ = setting(name)
    for _ in range(2):
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        total(loss, x, y, IDS)
        assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


def test_two_calls_without_draws_share_nothing():
    loss, x, y, _ = setting("dropout")
    sums = [clipped_gradient_sum(loss, trainable(loss.module), (x, y), RULE)[0]["b.bias"] for _ in range(2)]
    assert not torch.equal(*sums)


class KeepsAGenerator(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def forward(self, x):
        return x * self.draw()


OWN = {
    "numpy": lambda: float(np.random.default_rng(0).random()),
    "torch": lambda: torch.rand(1, generator=torch.Generator().manual_seed(0)),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("own", ["numpy", "torch"])
def test_a_generator_of_a_models_own_is_refused(own, engine):
    """Seeded anew in each pass it is a constant, and fine."""
    generator = np.random.default_rng(0) if own == "numpy" else torch.Generator().manual_seed(0)
    draw = (lambda: float(generator.random())) if own == "numpy" else (lambda: torch.rand(1, generator=generator))
    _, x, y, _ = setting("dropout")
    with pytest.raises((ModelError, SettingError), match=r"generator of its own|tell apart|opacus"):
        total(ModelLoss(Between(KeepsAGenerator(draw)).double()), x, y, IDS, engine=engine)
    if engine == "auto":
        constant = ModelLoss(Between(KeepsAGenerator(OWN[own])).double())
        assert torch.equal(total(constant, x, y, IDS), total(constant, x, y, IDS, key=bytes(16)))


def test_a_draw_that_only_some_data_ask_for_is_still_noticed(said):
    """The probe's made-up examples do not."""

    loss = ModelLoss(Between(lambda x: x * random.random() if float(x.detach().sum()) else x).double())
    _, x, y, _ = setting("dropout")
    whole = total(loss, x, y, IDS, physical_batch_size=6)
    assert said == {"loop"}
    torch.testing.assert_close(whole, total(loss, x, y, IDS, physical_batch_size=4), rtol=1e-9, atol=1e-12)


def test_a_loss_is_one_function_in_all_its_calls():
    """A finite difference of a dropout network, as zeroth-order steps ask for: with two masks it is of any size."""
    from fed_dpsat.step.optimizers.dpsgd import DPSGD
    from fed_dpsat.step.optimizers.zeroth_order import SCALAR, ZerothOrder

    for name in ("dropout", "random"):
        loss, x, y, _ = setting(name)
        params = trainable(loss.module)
        optimizer = ZerothOrder(base=DPSGD(lr=1.0), seed=0, steps_per_round=1, smoothing=1e-6)
        at = optimizer.query_point(params, optimizer.init(params), step_info())
        drawn = Draws(key=KEY, ids=IDS)
        found, _ = clipped_gradient_sum(loss, at, (x, y), FlatClipping(clip_norm=1e9), draws=drawn)
        gradient = total(loss, x, y, IDS, rule=FlatClipping(clip_norm=1e9))
        along = torch.cat([u.flatten() for u in optimizer._direction(params, step_info()).values()])
        assert float(found[SCALAR]) == pytest.approx(float(gradient @ along), rel=1e-4)


def test_the_mask_of_dropout_by_hand():
    drawn, x = Draws(key=KEY, ids=IDS), torch.ones(6, 4)

    def both(one):
        spread = one[..., None, None].expand(1, 4, 2, 3)
        return torch.cat([functional.dropout(one, 0.25)[..., None], functional.dropout2d(spread, 0.25).flatten(2)], 2)

    with drawn.used():
        found = Capture(6, {}).each(both, x)
    for call, mask in enumerate((found[..., 0], found[..., 1])):
        keep = kept(torch.from_numpy(np.ascontiguousarray(drawn.words(call, 4))), 0.25)
        torch.testing.assert_close(mask, keep / 0.75)
        with drawn.used():
            capture = Capture(6, {})
        capture.drawn.calls = call
        assert torch.equal(capture.each(lambda one: functional.dropout(one, 0.25), x.double()), keep.double() / 0.75)
    assert bool((found[..., 1:] == found[..., 1:2]).all())


def test_alpha_dropout_keeps_mean_and_variance():
    x = torch.randn(1000, 400)
    for p in (0.1, 0.5):
        with Draws(key=KEY, ids=np.arange(1000)).used():
            found = Capture(1000, {}).each(lambda one, p=p: functional.alpha_dropout(one, p, training=True), x)
        assert abs(float(found.mean())) < 0.01
        assert float(found.std()) == pytest.approx(1, abs=0.01)
        assert float((found == found.flatten().mode().values).float().mean()) == pytest.approx(p, abs=0.005)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [None, "bool", "float"])
def test_attention_with_almost_no_dropout_is_that_of_torch(masked, causal):
    if masked and causal:
        pytest.skip("torch takes one of them")
    torch.manual_seed(0)
    q, k, v = (torch.randn(6, 2, 4, 3, dtype=torch.float64) for _ in range(3))
    seen = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 1]]).bool()
    mask = {None: None, "bool": seen, "float": torch.zeros(4, 4).double().masked_fill(~seen, -math.inf)}[masked]
    with Draws(key=KEY, ids=IDS).used():
        found = Capture(6, {}).each(
            lambda *one: functional.scaled_dot_product_attention(*one, mask, 1e-9, causal), q, k, v
        )
    expected = functional.scaled_dot_product_attention(q, k, v, mask, 0.0, causal)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def seeded(draw):
    """As some augmentations do it: the same numbers in each pass, by place, and nothing shows afterwards."""

    def drawn(x):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return x * draw(x)

    return drawn


FORKED = {
    "randint": lambda x: torch.randint(0, 2, x.shape),
    "multinomial": lambda x: torch.multinomial(torch.ones(len(x), 3), 1),
    "poisson": lambda x: torch.poisson(torch.ones_like(x)),
    "cauchy_": lambda x: torch.empty_like(x).cauchy_(),
    "dropout": lambda x: functional.dropout(torch.ones_like(x), 0.5),
    "rand": lambda x: torch.rand(len(x), 1),
}


@pytest.mark.by_default("dropout-*", "rand-*", "poisson-*")
@pytest.mark.parametrize("engine", ["auto", "vmap"])
@pytest.mark.parametrize("name", FORKED)
def test_a_seed_of_a_models_own_gives_no_example_the_numbers_of_its_place(name, engine):
    """They moved the sum by up to 7.9 times the bound: nothing had shown in the generators."""
    torch.manual_seed(0)
    loss = ModelLoss(nn.Sequential(Between(seeded(FORKED[name])), nn.Linear(3, 4)))
    x, y = torch.randn(64, 6), torch.randint(3, (64,))
    rule = FlatClipping(clip_norm=0.1)
    ids = list(range(64))
    first = total(loss, x, y, ids, rule=rule, engine=engine)
    without = total(loss, x[1:], y[1:], ids[1:], rule=rule, engine=engine)
    assert (first - without).norm() <= 0.1 * (1 + 1e-5)
