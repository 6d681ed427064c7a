"""What all suites keep: they say what to do, and leave torch's generator alone."""

from __future__ import annotations

import pytest
import torch

from fed_dpsat import testing
from fed_dpsat.testing.conformance import ConformanceError, require, run_checks


def holds(subject):
    assert subject == 1


def fails(subject):
    require(subject == 2, expected="2", seen=str(subject), remedy="make it 2")


def raises(subject):
    torch.randn(3)
    raise KeyError("w")


def test_the_names_of_the_checks_come_back():
    assert run_checks("thing", [holds], 1) == ["holds"]


def test_the_first_failure_is_an_assertion_that_says_what_to_do():
    with pytest.raises(AssertionError, match=r"^check_thing, fails: expected 2; saw 1; make it 2$"):
        run_checks("thing", [holds, fails, raises], 1)


def test_an_exception_of_the_plug_in_is_a_failure_with_its_cause():
    said = r"^check_thing, raises: expected no exception; saw KeyError: 'w' \(test_conformance.py, line 22\); correct"
    with pytest.raises(ConformanceError, match=said) as found:
        run_checks("thing", [raises], 1)
    assert isinstance(found.value.__cause__, KeyError)


def test_the_generator_of_torch_is_left_as_it_was():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with pytest.raises(ConformanceError):
        run_checks("thing", [raises], 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_exported_is_there_and_nothing_else_is():
    assert all(callable(getattr(testing, name)) for name in testing.__all__)
    with pytest.raises(AttributeError, match="check_nothing"):
        testing.check_nothing  # noqa: B018
