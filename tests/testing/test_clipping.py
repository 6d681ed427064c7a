"""check_clipping passes every shipped rule and catches each broken one."""

from __future__ import annotations

import pytest
import torch

from fed_dpsat import plugins
from fed_dpsat.step.clipping import FlatClipping
from fed_dpsat.testing import check_clipping, clipping


class Rule:
    """A rule given by its factors; ``clip_norm`` as it was asked for."""

    def __init__(self, clip_norm, factors):
        self.clip_norm = clip_norm
        self.factors = lambda squared_norms: factors(squared_norms, clip_norm)


def broken(factors):
    return lambda clip_norm: Rule(clip_norm, factors)


def norm(squared_norms):
    return torch.stack(list(squared_norms.values())).sum(0).sqrt()


def flat(norms, clip_norm):
    return (clip_norm / norms).clamp(max=1)


def for_all(squared_norms, factor):
    return dict.fromkeys(squared_norms, factor)


def per_tensor(squared_norms, clip_norm):
    return {name: flat(s.sqrt(), clip_norm) for name, s in squared_norms.items()}


def first_tensor_only(squared_norms, clip_norm):
    return for_all(squared_norms, flat(next(iter(squared_norms.values())).sqrt(), clip_norm))


def by_the_largest_of_the_batch(squared_norms, clip_norm):
    norms = norm(squared_norms)
    largest = norms.max() if len(norms) else norms.sum()
    return for_all(squared_norms, flat(largest, clip_norm).expand(len(norms)).clone())


def in_place(squared_norms, clip_norm):
    factor = flat(norm(squared_norms), clip_norm)
    for squared in squared_norms.values():
        squared.sqrt_()
    return for_all(squared_norms, factor)


class Restless(FlatClipping):
    """Its bound shrinks with every batch it sees."""

    def factors(self, squared_norms):
        factors = super().factors(squared_norms)
        object.__setattr__(self, "seen", getattr(self, "seen", 0) + 1)
        return {name: f / self.seen for name, f in factors.items()}


class Declares(FlatClipping):
    """Halves the bound that the noise is scaled to, and clips to the whole."""

    def __init__(self, clip_norm):
        super().__init__(clip_norm=clip_norm / 2)


SENSITIVITY = "sensitivity_is_at_most_clip_norm"
BROKEN = {
    "clips each tensor (DP-FedSAM)": (broken(per_tensor), SENSITIVITY),
    "does not clip": (broken(lambda s, c: for_all(s, torch.ones_like(norm(s)))), SENSITIVITY),
    "sees one tensor": (broken(first_tensor_only), SENSITIVITY),
    "0.001 % too much": (broken(lambda s, c: for_all(s, flat(norm(s), c * 1.00001))), SENSITIVITY),
    "C over the square": (broken(lambda s, c: for_all(s, flat(norm(s) ** 2, c))), SENSITIVITY),
    "scales zero by C / 0": (broken(lambda s, c: for_all(s, c / norm(s))), "zero_gradient_adds_zero"),
    "mixes the batch": (broken(by_the_largest_of_the_batch), "factors_ignore_the_other_examples"),
    "one factor for the batch": (
        broken(lambda s, c: for_all(s, flat(norm(s).sum(), c))),
        "gives_one_factor_per_example_and_parameter",
    ),
    "turns examples around": (
        broken(lambda s, c: for_all(s, -flat(norm(s), c))),
        "gives_one_factor_per_example_and_parameter",
    ),
    "turns small examples around": (
        broken(lambda s, c: for_all(s, flat(norm(s), c) * torch.where(norm(s) < c, -1.0, 1.0))),
        "gives_one_factor_per_example_and_parameter",
    ),
    "forgets a parameter": (broken(lambda s, c: {"a": flat(norm(s), c)}), "gives_one_factor_per_example_and_parameter"),
    "writes into the norms": (broken(in_place), "same_norms_give_same_factors"),
    "remembers batches": (Restless, "same_norms_give_same_factors"),
    "declares another bound": (Declares, "declares_its_clip_norm"),
}


@pytest.mark.by_default("flat")
@pytest.mark.parametrize("name", plugins.builtin("clipping"))
def test_every_shipped_rule_conforms(name):
    assert len(check_clipping(plugins.builtin("clipping")[name])) == 8


def test_a_function_of_clip_norm_joins_too(monkeypatch):
    monkeypatch.setattr(clipping, "CHECKS", (clipping.declares_its_clip_norm, clipping.zero_gradient_adds_zero))
    assert len(check_clipping(lambda bound: FlatClipping(clip_norm=bound))) == 2


@pytest.mark.by_default("mixes the batch", "clips each tensor*", "does not clip")
@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_rule_is_caught(case, caught):
    factory, check = BROKEN[case]
    assert caught(check_clipping, factory) == check
