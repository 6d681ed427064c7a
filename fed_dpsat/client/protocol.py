"""Which versions of this project work together: those with one protocol. Server and client tell each other theirs."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib.metadata import version

PACKAGE = "fed-dpsat"
PROTOCOL = 2
"""Versions with this number understand each other's messages and continue each other's runs to the same bits.

CONTRIBUTING.md says which change raises it. Versions up to 0.1.0 state none.
"""
UNSTATED = "0.1.0 or older"
LONGEST = 40
"""Characters of a version that another process states, in an error."""


@functools.cache
def installed() -> str:
    """The version of this project, from pyproject.toml by the way of the installation."""
    return version(PACKAGE)


def stated() -> dict[str, int | str]:
    """What a process states of itself in a message, and a run in its folder."""
    return {"protocol": PROTOCOL, "version": installed()}


def difference(said: Mapping[str, object], of: str, own: str) -> str:
    """Why ``of``, which states ``said``, does not work with this version, named ``own``; "" if it does."""
    if said.get("protocol") == PROTOCOL:
        return ""
    theirs = str(said.get("version", UNSTATED))[:LONGEST]
    return f"{of} {PACKAGE} {theirs}, {own} {installed()}, and the two have different protocols"
