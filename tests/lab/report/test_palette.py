from __future__ import annotations

from fed_dpsat.lab.report.palette import ALL, BLUE, SERIES, VERMILLION, css, looks


def test_methods_keep_their_colour_whoever_is_beside_them():
    assert looks(["dp-sgd", "mine", "dp-sat, lr 1"])["dp-sat, lr 1"].colour == BLUE
    assert looks(["dp-sat"])["dp-sat"].colour == BLUE
    assert looks(["other", "dp-sgd"])["dp-sgd"].colour == VERMILLION


def test_no_two_of_few_series_look_alike():
    names = ["dp-sat", "dp-sat, lr 1", *(f"method {i}" for i in range(12))]
    found = looks(names)
    assert list(found) == names
    assert len({(look.colour, look.dash) for look in found.values()}) == len(names)
    assert len({look.colour for look in list(found.values())[: len(SERIES)]}) == len(SERIES)


def test_colours_are_distinct_since_pages_replace_them_by_value():
    assert len({colour.light for colour in ALL}) == len({colour.name for colour in ALL}) == len(ALL)
    assert all(f"--{colour.name}:{colour.light};" in css() and colour.dark in css() for colour in ALL)
