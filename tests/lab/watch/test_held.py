import io
import logging

import pytest
from rich.console import Console
from rich.logging import RichHandler

from fed_dpsat.lab.watch.held import KEPT, HeldWarnings, held_in_place_of_printed


@pytest.fixture
def logger():
    found = logging.Logger("of this test")  # no parent: nobody else hears it
    found.handlers = []
    return found


def test_a_flood_of_one_kind_is_a_few_lines_and_a_number(logger):
    held = HeldWarnings()
    logger.addHandler(held)
    for client in range(1000):
        logger.warning("client %d dropped", client)
    logger.info("nothing")
    logger.warning("the disk is nearly full")
    assert held.count == 1001
    assert held.lines() == [
        "client 0 dropped", "client 1 dropped", "client 2 dropped", "the disk is nearly full",
        "and 997 more warnings like these",
    ]  # fmt: skip
    assert list(held.recent) == ["client 998 dropped", "client 999 dropped", "the disk is nearly full"]


def test_kinds_without_end_take_bounded_memory(logger):
    held = HeldWarnings()
    logger.addHandler(held)
    for number in range(1000):
        logger.warning(f"kind {number}")
    assert len(held.lines()) == KEPT + 1


def test_it_stands_in_for_what_prints_there_and_prints_at_the_end(logger):
    console, other = (Console(file=io.StringIO()) for _ in range(2))
    printing, elsewhere = RichHandler(console=console), RichHandler(console=other)
    logger.handlers = [printing, elsewhere]

    def interrupted():
        with held_in_place_of_printed(HeldWarnings(), logger, console):
            logger.warning("a [bracket] stays")
            assert console.file.getvalue() == ""
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert console.file.getvalue() == "a [bracket] stays\n"
    assert "stays" in other.file.getvalue()
    assert set(logger.handlers) == {printing, elsewhere}
