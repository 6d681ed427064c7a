"""A log as JSON lines: each line is an object with the fields of its event."""

from __future__ import annotations

import io
import json
import logging

import pytest

from fed_dpsat.run import logs
from fed_dpsat.run.logs import FIELDS, JsonLines


@pytest.fixture
def written():
    """Call a logger and read the lines."""
    stream = io.StringIO()
    log = logging.Logger("fed_dpsat.of_a_test")
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    log.addHandler(handler)
    return log, lambda: [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_has_time_level_message_and_the_fields_of_its_event(written):
    log, lines = written
    log.warning("round %d\nforged", 3, extra={FIELDS: {"round": 3, "dropped": {"1": "absent"}}})
    (line,) = lines()
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "WARNING", "logger": "fed_dpsat.of_a_test", "message": "round 3\nforged", "round": 3,
        "dropped": {"1": "absent"},
    }  # fmt: skip


def test_a_traceback_is_one_field(written):
    log, lines = written
    try:
        raise ValueError("a\nb")
    except ValueError:
        log.exception("failed")
    (line,) = lines()
    assert line["error"].endswith("ValueError: a\nb")


def test_text_leaves_loggers_as_they_are_and_json_takes_those_of_flower_too():
    kept = {
        name: (log.handlers, log.propagate, log.level)
        for name in ("fed_dpsat", "flwr")
        if (log := logging.getLogger(name))
    }
    try:
        logs.use("text")
        assert {name: logging.getLogger(name).handlers for name in kept} == {name: k[0] for name, k in kept.items()}
        logs.use("json")
        for name in kept:
            (handler,) = logging.getLogger(name).handlers
            assert isinstance(handler.formatter, JsonLines)
    finally:
        for name, (handlers, propagate, level) in kept.items():
            log = logging.getLogger(name)
            log.handlers, log.propagate = handlers, propagate
            log.setLevel(level)
