"""Errors that say what to do."""

from __future__ import annotations


class SettingError(ValueError):
    """A setting outside its bounds: its name, its value, the bound, and the remedy, on one line."""

    def __init__(self, name: str, value: object, bound: str, remedy: str) -> None:
        super().__init__(f"{name}={value!r} is not {bound}; {remedy}")
        self.name = name
        self.value = value
