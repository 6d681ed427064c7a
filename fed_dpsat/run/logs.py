"""Logs as JSON lines: an object per line, with the fields of an event beside its message."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

LOG_FORMATS = ("text", "json")
FIELDS = "fields"
"""The key of ``extra`` in a call of a logger: a mapping of more keys for the line."""
TEXT = "%(asctime)s %(levelname)s %(message)s"


class JsonLines(logging.Formatter):
    """``time`` (UTC), ``level``, ``logger``, ``message``, the fields of the event, and ``error`` with a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage().strip(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def formatter(log_format: str) -> logging.Formatter:
    """The formatter of a ``log_format``."""
    return JsonLines() if log_format == "json" else logging.Formatter(TEXT)


def use(log_format: str) -> None:
    """Write the lines of this project and of Flower to standard error as JSON; "text" leaves them as they are."""
    if log_format != "json":
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("fed_dpsat", "flwr"):
        log = logging.getLogger(name)
        log.handlers, log.propagate = [handler], False
        log.setLevel(logging.INFO)
