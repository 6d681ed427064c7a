"""Factors are held to the bound where they are used, and what runs to what is charged; each wrong one is refused."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from fed_dpsat.accounting import PrivacyEvent
from fed_dpsat.errors import SettingError
from fed_dpsat.params import global_norm, trainable
from fed_dpsat.step import loop
from fed_dpsat.step.clipping import AdaptiveClipping, FlatClipping
from fed_dpsat.step.clipping.automatic import AutomaticClipping
from fed_dpsat.step.clipping.bound import Held, check_factors
from fed_dpsat.step.clipping.global_ import GlobalClipping
from fed_dpsat.step.clipping.per_layer import PerLayerClipping
from fed_dpsat.step.clipping.psac import PSACClipping
from fed_dpsat.step.gradients.per_example import ENGINES, ModelLoss, clipped_gradient_sum
from fed_dpsat.step.loop import Member, Streams, train_locally
from fed_dpsat.step.mechanism import GaussianMechanism
from fed_dpsat.step.optimizers import DPSGD
from fed_dpsat.step.sampling import PoissonSampler
from fed_dpsat.step.stacked import Stacked
from fed_dpsat.step.unchecked import unchecked

C = 2.0
ROWS = torch.tensor([[3.0, 0.0, 4.0], [0.0, 0.0, 0.0], [0.3, 0.4, 0.0]])


@dataclass(kw_only=True)
class Rule:
    """A rule of ``clip_norm`` C whose factors are ``of(squared_norms)``."""

    of: object
    clip_norm: float = C

    def factors(self, squared_norms):
        return self.of(squared_norms)


def norm(squares):
    return torch.stack(list(squares.values())).sum(0).sqrt()


def flat(squares, clip_norm=C):
    return dict.fromkeys(squares, (clip_norm / norm(squares)).clamp(max=1))


def cheap(squares):
    """Makes the norms look small, so that its own factors would pass."""
    for square in squares.values():
        square.zero_()
    return {name: torch.ones_like(s) for name, s in squares.items()}


def forgetful(squares):
    del squares["b.weight"]
    return {name: torch.ones_like(s) for name, s in squares.items()}


WRONG = {
    "5 everywhere": lambda s: {name: torch.full_like(n, 5.0) for name, n in s.items()},
    "5 everywhere, one tensor": lambda s: dict.fromkeys(s, torch.full_like(norm(s), 5.0)),
    "1 everywhere": lambda s: {name: torch.ones_like(n) for name, n in s.items()},
    "each tensor to C": lambda s: {name: (C / n.sqrt()).clamp(max=1) for name, n in s.items()},
    "0.001 % too much": lambda s: flat(s, C * 1.00001),
    "C over the square": lambda s: dict.fromkeys(s, C / norm(s) ** 2),
    "NaN": lambda s: dict.fromkeys(s, torch.full_like(norm(s), math.nan)),
    "NaN for the zero norm": lambda s: dict.fromkeys(s, 0 / norm(s)),
    "inf": lambda s: dict.fromkeys(s, torch.full_like(norm(s), math.inf)),
    "negative": lambda s: dict.fromkeys(s, -flat(s)["a.weight"]),
    "1e30 for the zero norm": lambda s: dict.fromkeys(s, C / norm(s).clamp(min=1e-30)),
    "writes into the norms": cheap,
    "takes names away": forgetful,
    "a name too many": lambda s: {**flat(s), "c.weight": norm(s)},
    "a factor too many": lambda s: dict.fromkeys(s, torch.ones(len(norm(s)) + 1) * 0.1),
    "one factor for all": lambda s: dict.fromkeys(s, torch.tensor(0.1)),
    "numbers": lambda s: dict.fromkeys(s, 0.1),
    "complex": lambda s: dict.fromkeys(s, 0.1j * norm(s)),
    "in bfloat16, so too much": lambda s: dict.fromkeys(s, (C / norm(s)).clamp(max=1).to(torch.bfloat16) * 1.01),
}


class Dot(nn.Module):
    """The gradient of an example over both parameters is the example."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 1, bias=False), nn.Linear(1, 1, bias=False)

    def forward(self, x):
        return self.a(x[:, :2]) + self.b(x[:, 2:])


def loss_of(module):
    return ModelLoss(module, criterion=lambda outputs, targets: outputs[:, 0])


def member(**changes):
    sampler = PoissonSampler(num_examples=len(ROWS), sample_rate=1.0)
    mechanism = GaussianMechanism(noise_multiplier=1.0, clip_norm=C, expected_batch_size=3)
    return {
        "batches": lambda indices: (ROWS[indices], torch.zeros(len(indices))),
        "state": {},
        "sampler": sampler,
        "mechanism": mechanism,
        "streams": Streams(seed=0, client=0, round=1),
        **changes,
    }


def train(rule, **changes):
    module = Dot()
    settings = {"loss_fn": loss_of(module), "optimizer": DPSGD(lr=0.1), "clipping": rule, "local_steps": 2}
    return train_locally(trainable(module), **settings, **member(**changes))


def train_together(rule, **changes):
    module, members = Dot(), [Member(**member()), Member(**member(**changes))]
    return loop.train(
        trainable(module),
        members,
        executor=Stacked,
        loss_fn=loss_of(module),
        optimizer=DPSGD(lr=0.1),
        clipping=rule,
        local_steps=2,
    )


@pytest.mark.parametrize(
    ("case", "engine"), [*((c, "planned") for c in WRONG), *(("1 everywhere", e) for e in ENGINES)]
)
def test_factors_that_keep_no_bound_are_refused_by_every_engine(case, engine):
    module = Dot()
    batch = ROWS, torch.zeros(len(ROWS))
    with pytest.raises(SettingError, match=r"clipping='Rule' is not (one|with) .*; make .*check_clipping on the"):
        clipped_gradient_sum(loss_of(module), trainable(module), batch, Rule(of=WRONG[case]), engine=engine)


@pytest.mark.parametrize("loop", [train, train_together])
@pytest.mark.parametrize("case", ["5 everywhere", "5 everywhere, one tensor", "each tensor to C", "NaN"])
def test_a_client_that_would_not_clip_releases_nothing(case, loop):
    with pytest.raises(SettingError, match=r"clipping='Rule' is not one that keeps the bound: .* clip_norm=2, or NaN"):
        loop(Rule(of=WRONG[case]))


@pytest.mark.parametrize("loop", [train, train_together])
def test_a_negative_factor_is_named_as_such(loop):
    with pytest.raises(SettingError, match=r"clipping='Rule' is not one without a negative factor; make each factor"):
        loop(Rule(of=WRONG["negative"]))


def test_an_error_says_nothing_of_the_examples():
    """Neither norms (5, 0.5) nor how many examples there are."""
    for case in WRONG:
        with pytest.raises(SettingError) as refused:
            train(Rule(of=WRONG[case]))
        assert not {"5", "0.5", "3", "25", "10"} & set(str(refused.value).replace("=", " ").split()), refused.value


def test_a_bound_that_grows_after_the_check_is_not_believed():
    class Growing(FlatClipping):
        """Says C when the noise is made, and a thousand times that afterwards."""

        reads = 0

        @property
        def clip_norm(self):
            Growing.reads += 1
            return C if Growing.reads <= 1 else 1000 * C

        @clip_norm.setter
        def clip_norm(self, value):
            raise AttributeError

        def __init__(self):
            pass

    for trained in (train, train_together):
        Growing.reads = 0
        with pytest.raises(SettingError, match=r"clip_norm"):
            trained(Growing())


RULES = [
    FlatClipping,
    AutomaticClipping,
    GlobalClipping,
    PerLayerClipping,
    PSACClipping,
    AdaptiveClipping,
    lambda clip_norm: Rule(of=lambda s: flat(s, clip_norm), clip_norm=clip_norm),
    lambda clip_norm: Rule(of=lambda s: {n: f.float() for n, f in flat(s, clip_norm).items()}, clip_norm=clip_norm),
    lambda clip_norm: Rule(of=lambda s: dict.fromkeys(s, norm(s) <= clip_norm), clip_norm=clip_norm),
    lambda clip_norm: Rule(of=lambda s: dict.fromkeys(s, clip_norm / norm(s).clamp(min=1e-12)), clip_norm=clip_norm),
    lambda clip_norm: Rule(of=lambda s: dict.fromkeys(s, clip_norm / (norm(s) + 1e-12)), clip_norm=clip_norm),
]


@pytest.mark.parametrize("clip_norm", [1e-20, 1e-12, 1e-3, 1.0, 1e30])
@pytest.mark.parametrize("make", RULES)
def test_rules_that_clip_pass(make, clip_norm):
    """At norms from 0 over what float32 forgets to what it barely holds, in one tensor or in many."""
    sizes = torch.tensor([0.0, 1e-46, 1e-30, 1e-6, 1 - 1e-7, 1.0, 1 + 1e-7, 1e6, 1e30], dtype=torch.float64)
    for count in (1, 3, 62):
        squares = {f"layer{i}.weight": (sizes * clip_norm) ** 2 / count for i in range(count)}
        rule, rows = make(clip_norm=clip_norm), torch.stack(list(squares.values()))
        if clip_norm < 1e-15 and "1e-12" in str(getattr(rule, "of", "")):
            continue
        check_factors(rule, rule.factors(squares), list(squares), rows)


def test_a_rule_without_a_bound_still_gives_finite_factors():
    rows = torch.ones(1, 3, dtype=torch.float64)
    unbounded = Held(rule=Rule(of=None), clip_norm=math.inf)
    check_factors(unbounded, {"w": torch.full((3,), 1e100, dtype=torch.float64)}, ["w"], rows)
    for bad in (math.inf, math.nan):
        with pytest.raises(SettingError, match=r"'Rule'"):
            check_factors(unbounded, {"w": torch.tensor([1.0, bad, 1.0])}, ["w"], rows)


def test_what_is_unchecked_says_so_and_only_there():
    """The door of audits and suites: within it the rule that does not clip moves the sum by 25, not by 2."""
    module, rule = Dot(), Rule(of=WRONG["5 everywhere"])
    batch = ROWS[:1], torch.zeros(1)
    with unchecked():
        total, _ = clipped_gradient_sum(loss_of(module), trainable(module), batch, rule)
    assert float(global_norm(total)) == pytest.approx(25)
    with pytest.raises(SettingError):
        clipped_gradient_sum(loss_of(module), trainable(module), batch, rule)


# mechanism against event, sampler against rate, noise against streams


@dataclass(frozen=True, kw_only=True)
class TenthOfTheNoise(GaussianMechanism):
    def privatize(self, clipped_sum, generator):
        quiet = GaussianMechanism(
            noise_multiplier=self.noise_multiplier / 10,
            clip_norm=self.clip_norm,
            expected_batch_size=self.expected_batch_size,
        )
        return quiet.privatize(clipped_sum, generator)


@dataclass(frozen=True, kw_only=True)
class PromisesMore(GaussianMechanism):
    def event(self, *, sample_rate, steps, unit="example"):
        return PrivacyEvent(noise_multiplier=10 * self.noise_multiplier, sample_rate=sample_rate, steps=steps)


@dataclass(frozen=True, kw_only=True)
class DrawsAll(PoissonSampler):
    def sample(self, generator):
        return torch.arange(self.num_examples)


class SameNoise(Streams):
    def generator(self, purpose):
        return Streams(seed=0, client=0, round=0).generator(purpose)


FOREIGN = {
    "mechanism": [
        kind(noise_multiplier=1.0, clip_norm=C, expected_batch_size=3) for kind in (TenthOfTheNoise, PromisesMore)
    ],
    "sampler": [DrawsAll(num_examples=3, sample_rate=0.01)],
    "streams": [SameNoise(seed=0, client=0, round=1)],
}


@pytest.mark.parametrize("loop", [train, train_together])
@pytest.mark.parametrize(("name", "part"), [(name, part) for name, parts in FOREIGN.items() for part in parts])
def test_what_may_do_something_else_than_is_charged_is_refused(name, part, loop):
    rule = FlatClipping(clip_norm=C)
    with pytest.raises(SettingError, match=rf"{name}='{type(part).__name__}' is not a .* itself"):
        loop(rule, **{name: part})
    with unchecked():
        loop(rule, **{name: part})


def test_an_adaptive_rule_whose_count_costs_extra_is_refused():
    class Cheap(AdaptiveClipping):
        """All of the noise on the gradient, and a count beside it."""

        def noise_multipliers(self, noise_multiplier, expected_batch_size):
            return noise_multiplier, 2 * expected_batch_size / 20

    big = GaussianMechanism(noise_multiplier=1.0, clip_norm=C, expected_batch_size=100)
    train(AdaptiveClipping(clip_norm=C), mechanism=big)
    with pytest.raises(SettingError, match=r"clipping='Cheap' is not one whose gradient and count cost .* together"):
        train(Cheap(clip_norm=C), mechanism=big)
