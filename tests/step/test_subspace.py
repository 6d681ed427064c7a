"""What a round can change, said in few numbers: round trips, shares, and descriptions that are none."""

from __future__ import annotations

import pytest
import torch

from fed_dpsat.params import cut, laid_end_to_end
from fed_dpsat.step import subspace
from fed_dpsat.step.subspace import Coordinates, Span, described, direction, read_subspace


def test_coordinates_keep_every_bit_and_let_nothing_else_through():
    """100 coordinates, 70 frozen: 30 numbers say the end, and what is frozen cannot come back changed."""
    subspace = Coordinates(seed=1, round=3, frozen=70)
    start, end = torch.randn(100), torch.randn(100)
    active = subspace.active(100)
    assert int(active.sum()) == subspace.size(100) == 30
    numbers = subspace.numbers(start, end)
    assert torch.equal(numbers, end[active])
    found = subspace.end(start, numbers)
    assert torch.equal(found[active], end[active])
    assert torch.equal(found[~active], start[~active])


def test_masks_follow_from_seed_and_round_and_differ():
    masks = [Coordinates(seed=s, round=r, frozen=50).active(100) for s, r in ((0, 1), (0, 2), (1, 1), (0, 1))]
    assert torch.equal(masks[0], masks[3])
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_every_coordinate_has_its_turn():
    """Over 200 rounds at half frozen, each of 50 is active about 100 times: within 5 standard deviations."""
    times = sum(Coordinates(seed=0, round=r, frozen=25).active(50).int() for r in range(200))
    assert int(times.min()) > 100 - 5 * 50**0.5
    assert int(times.max()) < 100 + 5 * 50**0.5


@pytest.mark.parametrize("frozen", [0, 10])
def test_all_or_nothing(frozen):
    subspace = Coordinates(seed=0, round=1, frozen=frozen)
    start, end = torch.zeros(10), torch.ones(10)
    assert torch.equal(subspace.end(start, subspace.numbers(start, end)), start if frozen else end)


def test_a_span_is_found_again():
    subspace = Span(seed=2, first=12, steps=3)
    start = torch.randn(500)
    end = start + 0.5 * direction(2, 12, 500) - 2 * direction(2, 13, 500) + 1e-3 * direction(2, 14, 500)
    numbers = subspace.numbers(start, end)
    torch.testing.assert_close(numbers, torch.tensor([0.5, -2, 1e-3]), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(subspace.end(start, numbers), end, rtol=1e-5, atol=1e-5)


def test_a_span_of_several_directions_is_found_again_in_parts(monkeypatch):
    """Blocks of 7 coordinates, whose sums are those of the whole."""
    span, start = Span(seed=2, first=5, steps=2, directions=3), torch.randn(500)
    said = torch.tensor([0.5, -2.0, 1e-3, 3.0, 0.0, -1.0])
    end = span.end(start, said)
    torch.testing.assert_close(end, sum((a * direction(2, 15 + i, 500) for i, a in enumerate(said)), start))
    whole = span.numbers(start, end)
    torch.testing.assert_close(whole, said, rtol=1e-4, atol=1e-6)
    monkeypatch.setattr(subspace, "CHUNK", 42)
    torch.testing.assert_close(span.numbers(start, end), whole, rtol=1e-6, atol=1e-8)
    monkeypatch.undo()
    assert read_subspace(described(span)) == span


def test_directions_are_of_length_sqrt_d_and_nearly_orthogonal():
    u, v = direction(0, 1, 10_000), direction(0, 2, 10_000)
    assert float(u.norm()) == pytest.approx(100, rel=1e-6)
    assert abs(float(u @ v)) / 10_000 < 0.05
    assert torch.equal(u, direction(0, 1, 10_000))


def test_cut_is_the_inverse_of_laying_end_to_end(same_bits):
    params = {"a": torch.randn(2, 3), "b": torch.randn(()), "c": torch.randn(0), "d": torch.randn(4)}
    assert same_bits(cut(laid_end_to_end(params), params), params)


@pytest.mark.parametrize("subspace", [Coordinates(seed=1, round=2, frozen=3), Span(seed=1, first=0, steps=4)])
def test_a_description_is_read_again(subspace):
    assert read_subspace(described(subspace)) == subspace


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"kind": "line"},
        {"kind": "span", "seed": 1, "first": 0},
        {"kind": "span", "seed": 1, "first": 0, "steps": -1},
        {"kind": "coordinates", "seed": 1, "round": 1, "frozen": 0.5},
        {"kind": "coordinates", "seed": 1, "round": 1, "frozen": 5, "more": 1},
    ],
)
def test_what_describes_no_subspace_is_refused(said):
    with pytest.raises(ValueError, match="describes no subspace"):
        read_subspace(said)
