"""The log of a device: one line per request with its outcome and the reason; at most two files."""

from __future__ import annotations

import logging
import sys
from functools import lru_cache
from logging.handlers import RotatingFileHandler
from pathlib import Path

from fed_dpsat.run.logs import formatter

LARGEST_BYTES, LONGEST = 1_000_000, 400
NAME = "device.log"


@lru_cache(maxsize=8)
def device_log(folder: Path, log_format: str = "text") -> logging.Logger:
    """A logger to ``folder/device.log`` and to standard error, which systemd stores."""
    log = logging.getLogger(f"fed_dpsat.device.{folder}")
    log.setLevel(logging.INFO)
    log.propagate = False
    log.handlers.clear()  # of another form
    form = formatter(log_format)
    for handler in (
        RotatingFileHandler(folder / NAME, maxBytes=LARGEST_BYTES, backupCount=1, delay=True, encoding="utf-8"),
        logging.StreamHandler(sys.stderr),
    ):
        handler.setFormatter(form)
        log.addHandler(handler)
    return log


def one_line(text: str) -> str:
    """``text`` as one short printable line, so a server cannot forge lines of a log or fill the disk."""
    plain = "".join(c if c.isprintable() else " " for c in text[: LONGEST + 1])
    return plain if len(plain) <= LONGEST else plain[:LONGEST] + " ..."


def last_line(folder: Path) -> str:
    """The last line of the log; "" for an empty log."""
    path = folder / NAME
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - 4096, 0))
        lines = file.read().decode(errors="replace").splitlines()
    return lines[-1] if lines else ""
