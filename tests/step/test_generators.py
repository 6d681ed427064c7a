"""Generators are given back as they were, and a draw that nobody announced is noticed."""

import random

import numpy as np
import pytest
import torch

from fed_dpsat.step.generators import Mark, borrowed, kept, others_moved, seed

CPU = torch.device("cpu")
SOURCES = {
    "torch": lambda: torch.rand(3).tolist(),
    "random": lambda: [random.random(), random.gauss(0, 1)],
    "numpy": lambda: np.random.standard_normal(3).tolist(),
}
"""An odd number of normals leaves one over, which is part of the state of Python's and numpy's generators."""


def states():
    numpy = np.random.get_state(legacy=False)
    numpy["state"]["key"] = numpy["state"]["key"].tolist()
    return random.getstate(), numpy, torch.get_rng_state().tolist()


def draw_all():
    return [source() for source in SOURCES.values()]


@pytest.mark.parametrize("keep", [borrowed, kept])
@pytest.mark.parametrize("raises", [False, True])
def test_they_are_given_back(keep, raises):
    draw_all()
    before = states()
    try:
        with keep(CPU):
            draw_all()
            if raises:
                raise KeyError
    except KeyError:
        pass
    assert states() == before


@pytest.mark.parametrize("outer", [borrowed, kept])
def test_one_inside_another(outer):
    before = states()
    with outer(CPU):
        with kept(CPU):
            seed(CPU, 5)
            first = draw_all()
            here = states()
            with kept(CPU), borrowed(CPU):
                seed(CPU, 6)
                assert draw_all() != first
            assert states() == here
            assert not others_moved()
        with kept(CPU):
            seed(CPU, 5)
            assert draw_all() == first
    assert states() == before


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("source", SOURCES)
def test_a_draw_is_noticed_and_undone(source, held):
    def look():
        for _ in range(3):
            assert not Mark.here(CPU).moved()
        mark = Mark.here(CPU)
        drawn = SOURCES[source]()
        assert mark.moved()
        assert held or SOURCES[source]() == drawn
        mark = Mark.here(CPU)
        assert not mark.moved()

    if not held:
        return look()
    with kept(CPU):
        seed(CPU, 3)
        look()
    return None


@pytest.mark.parametrize("outer", [borrowed, kept])
def test_what_was_drawn_before_is_no_draw_of_the_inner_one(outer):
    with outer(CPU):
        draw_all()
        with kept(CPU):
            assert not others_moved()
            random.random()
            assert others_moved()


def test_large_seeds_are_used_whole():
    with kept(CPU):
        found = []
        for value in (1, 1 + 2**100, 1 + 2**40):
            seed(CPU, value)
            found.append(np.random.random_sample())
        assert len(set(found)) == 3
