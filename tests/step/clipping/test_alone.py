"""Rules that nobody vouches for: an example's factors follow from its own norms alone, and are read once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fed_dpsat.errors import SettingError
from fed_dpsat.params import global_norm, subtract, trainable
from fed_dpsat.step.clipping import FlatClipping, Tally
from fed_dpsat.step.clipping.automatic import AutomaticClipping
from fed_dpsat.step.clipping.bound import is_own
from fed_dpsat.step.clipping.global_ import GlobalClipping
from fed_dpsat.step.clipping.per_layer import PerLayerClipping
from fed_dpsat.step.gradients.per_example import ENGINES, ModelLoss, clipped_gradient_sum
from fed_dpsat.step.mechanism import GaussianMechanism
from fed_dpsat.step.stacked import stacked_sum
from fed_dpsat.step.unchecked import unchecked
from fed_dpsat.testing.problems import filled, prescribed

C = 1.0
SHAPES = {"a.weight": (1, 2), "b.weight": (1, 1)}
ROWS = torch.cat([torch.tensor([[300.0, 0.0, 400.0]]), torch.full((40, 3), 2.0)])
"""Whoever leaves out the first leaves 40 examples that a rule may have treated otherwise beside it."""


@dataclass(kw_only=True)
class Rule:
    of: object
    clip_norm: float = C

    def factors(self, squared_norms):
        return self.of(self, squared_norms)


def norm(squares):
    return torch.stack(list(squares.values())).sum(0).sqrt()


def flat(squares):
    return (C / norm(squares)).clamp(max=1)


def remembers(rule, squares):
    """Nothing is left of an example after a norm above 100."""
    rule.seen = max(getattr(rule, "seen", 0.0), float(norm(squares).max()))
    return dict.fromkeys(squares, flat(squares) * float(rule.seen < 100))


def looks_around(rule, squares):
    """Looks for neighbours in the memory that its norms are a part of."""
    square = next(iter(squares.values()))
    values = square.as_strided((square.untyped_storage().nbytes() // square.element_size(),), (1,), 0)
    return dict.fromkeys(squares, flat(squares) * float(values.max() < 1e4))


MIXING = {
    "C over the largest norm": lambda _, s: dict.fromkeys(s, (C / norm(s).max()).expand(len(norm(s)))),
    "the parity of the batch": lambda _, s: dict.fromkeys(s, flat(s) * (len(norm(s)) % 2)),
    "to the median": lambda _, s: dict.fromkeys(s, flat(s) * norm(s).median().clamp(max=1) * (norm(s).max() > 100)),
    "remembers": remembers,
    "looks around": looks_around,
}


class Dot(nn.Module):
    """The gradient of an example over both parameters is the example."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 1, bias=False), nn.Linear(1, 1, bias=False)

    def forward(self, x):
        return self.a(x[:, :2]) + self.b(x[:, 2:])


def engine_sum(engine, rule, rows):
    module, batch = Dot(), (rows, torch.zeros(len(rows)))
    loss = ModelLoss(module, criterion=lambda outputs, targets: outputs[:, 0])
    return clipped_gradient_sum(loss, trainable(module), batch, rule, engine=engine, physical_batch_size=64)[0]


def together(rule, rows):
    """Two clients of the same examples; the sum of the first."""
    params = {n: p.expand(2, *p.shape) for n, p in filled(SHAPES).items()}
    there, targets = torch.ones(2, len(rows), dtype=torch.bool), torch.zeros(2, len(rows))
    sums, _ = stacked_sum(prescribed, params, rows.expand(2, *rows.shape), targets, there, rule)
    return {n: s[0] for n, s in sums.items()}


WAYS = {**{e: lambda rule, rows, e=e: engine_sum(e, rule, rows) for e in ENGINES}, "stack": together}


def moved(way, make):
    """How much the first example moves the sum, in C."""
    return float(global_norm(subtract(WAYS[way](make(), ROWS), WAYS[way](make(), ROWS[1:])))) / C


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", MIXING)
def test_an_example_moves_no_factor_of_another(case, way):
    def make():
        return Rule(of=MIXING[case])

    assert moved(way, make) <= 1 + 1e-5
    if way == "vmap":
        with unchecked():  # the rule as it is, on the whole batch
            assert moved(way, make) > 30


HONEST = {
    "flat": lambda _, s: dict.fromkeys(s, flat(s)),
    "by parameter": lambda _, s: {n: (C / 2 / q.sqrt()).clamp(max=1) for n, q in s.items()},
    "reads a number": lambda _, s: dict.fromkeys(s, flat(s) if float(norm(s).max()) > 3 else flat(s) / 2),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", HONEST)
def test_a_rule_that_looks_at_one_example_gives_what_it_gives_each_alone(case, way):
    rule, parts = Rule(of=HONEST[case]), dict(zip(SHAPES, ROWS.split([2, 1], 1), strict=True))
    squares = {n: part.double().square().sum(1) for n, part in parts.items()}
    alone = [rule.factors({n: s[i : i + 1] for n, s in squares.items()}) for i in range(len(ROWS))]
    total = {n: sum(f[n] * row for f, row in zip(alone, part, strict=True))[None] for n, part in parts.items()}
    torch.testing.assert_close(WAYS[way](rule, ROWS), {n: t.float() for n, t in total.items()}, rtol=1e-5, atol=1e-5)


class Fifty(dict):
    """Fifty times as much to whoever asks by name."""

    def __getitem__(self, name):
        return dict.__getitem__(self, name) * 50


class Doubled(Tensor):
    """A fiftieth to whoever asks for a double."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        answer = super().__torch_function__(func, types, args, kwargs or {})
        return answer.as_subclass(Tensor) / 50 if func is Tensor.double else answer


def with_another_to(factor):
    """A plain tensor whose ``to`` is not the one of its class."""
    factor.to = lambda *_: factor * 50
    return factor


TWO_FACED = {
    "a dict that multiplies": lambda _, s: Fifty(dict.fromkeys(s, flat(s))),
    "a tensor that divides": lambda _, s: dict.fromkeys(s, (flat(s) * 50).as_subclass(Doubled)),
    "a method on the tensor": lambda _, s: dict.fromkeys(s, with_another_to(flat(s))),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", TWO_FACED)
def test_factors_are_read_once(case, way):
    """Refused, or what is checked is what is used; on what reads them twice the example moved the sum by 50 C."""
    try:
        assert moved(way, lambda: Rule(of=TWO_FACED[case])) <= 1 + 1e-5
    except SettingError as refused:
        assert "with one real factor per example" in str(refused)  # noqa: PT017


def test_a_rule_without_a_copy_is_refused():
    class Single(Rule):
        def __deepcopy__(self, memo):
            return self

    class Locked(Rule):
        def __deepcopy__(self, memo):
            raise TypeError("cannot pickle")

    for kind in (Single, Locked):
        with pytest.raises(SettingError, match=rf"clipping='{kind.__name__}' is not one that copy.deepcopy copies; "):
            WAYS["auto"](kind(of=HONEST["flat"]), ROWS)


def test_a_rule_that_remembers_outside_of_itself_is_refused():
    seen = []

    def largest(rule, squares):
        seen.append(float(norm(squares).max()))
        return dict.fromkeys(squares, flat(squares) * float(max(seen) < 100))

    for rows in (ROWS, ROWS.flip(0)):
        seen.clear()
        with pytest.raises(SettingError, match=r"is not one whose factors follow from the norms of an example alone"):
            WAYS["vmap"](Rule(of=largest), rows)


def test_the_bound_is_read_once():
    class Growing:
        reads = 0

        @property
        def clip_norm(self):
            Growing.reads += 1
            return C if Growing.reads <= 1 else 50 * C

        def factors(self, squares):
            return dict.fromkeys(squares, (50 * C / norm(squares)).clamp(max=1))

    for engine in ENGINES:
        Growing.reads = 0
        with pytest.raises(SettingError, match=r"leaves an example more than clip_norm=1, or"):
            engine_sum(engine, Growing(), ROWS)


@pytest.mark.parametrize("value", [torch.tensor(1.0), True, "1", None, 1j, 10**400, np.array(1.0)])
def test_a_bound_is_a_real_number(value):
    def mechanism(**changes):
        return GaussianMechanism(**{"noise_multiplier": 1.0, "clip_norm": C, "expected_batch_size": 1.0, **changes})

    for make in (
        lambda: engine_sum("auto", Rule(of=HONEST["flat"], clip_norm=value), ROWS),
        lambda: FlatClipping(clip_norm=value),
        *(lambda name=name: mechanism(**{name: value}) for name in vars(mechanism())),
    ):
        with pytest.raises(SettingError, match=r"is not a real number( that a float holds)?; give") as refused:
            make()
        assert "\n" not in str(refused.value)


def test_what_is_this_librarys_own_is_so_to_the_letter():
    """Anything else takes the way that is right for anything."""

    class Derived(FlatClipping):
        pass

    class Number(float):
        """Divides by the largest of what it is divided by."""

        def __truediv__(self, other):
            return float(self) / other.max().expand(len(other))

    patched, numbered = FlatClipping(clip_norm=C), FlatClipping(clip_norm=C)
    object.__setattr__(patched, "factors", lambda s: MIXING["C over the largest norm"](None, s))
    object.__setattr__(numbered, "clip_norm", Number(C))
    for rule in (patched, numbered):
        assert moved("vmap", lambda rule=rule: rule) <= 1 + 1e-5
        assert not is_own(rule)
    assert not is_own(Derived(clip_norm=C))
    for kind in (FlatClipping, AutomaticClipping, GlobalClipping, PerLayerClipping, Tally):
        assert is_own(kind(clip_norm=np.float64(C)))
    assert type(FlatClipping(clip_norm=Number(C)).clip_norm) is float
