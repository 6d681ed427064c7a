"""``RunConfig``: every setting of a run, flat, as a TOML file, ``--set`` and Flower's run config have them.

Each group of settings is a module beside this one. A name (``optimizer``, ``model``, ...) becomes an object in
``fed_dpsat.plugins``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fed_dpsat.errors import warn_once
from fed_dpsat.settings import flat
from fed_dpsat.settings.combinations import Settings, check_combinations
from fed_dpsat.settings.paths import beside
from fed_dpsat.settings.privacy import noise_unused
from fed_dpsat.settings.values import Scalar, check_value

MACHINE = frozenset(name for name, spec in flat.SPECS.items() if spec.metadata["may_change"])
"""Settings that may change when a run is resumed: they decide place and time, and not the result."""

Class = TypeVar("Class", bound=type)


def _with_near_names(cls: Class) -> Class:
    """``cls``, made of settings: for an unknown name it raises the ``SettingError`` of ``check_names``."""
    init = cls.__init__  # type: ignore[misc]

    @functools.wraps(init)
    def checked(self: object, /, *args: Any, **values: Any) -> None:
        flat.check_names(values)
        init(self, *args, **values)

    cls.__init__ = checked  # type: ignore[misc]
    return cls


@_with_near_names
@dataclass(frozen=True, kw_only=True)
class RunConfig(Settings):
    """One run. Raises ``SettingError`` for an unknown name, a wrong type, a bad value or an impossible combination."""

    def __post_init__(self) -> None:
        for name, spec in flat.SPECS.items():
            value = getattr(self, name)
            check_value(spec, value)
            if spec.type == "float":
                object.__setattr__(self, name, float(value))
        check_combinations(self)
        if unused := noise_unused(self):
            off = ", ".join(f"{name}={getattr(self, name):g}" for name in unused)
            warn_once(f"private=false: this run adds no noise, and its epsilon is inf; {off} has no effect")
            for name in unused:
                object.__setattr__(self, name, 0.0)

    def settings(self) -> dict[str, Scalar]:
        """Every setting as it stands, in order: a Flower run config, or the body of a TOML file."""
        return dataclasses.asdict(self)

    def to_toml(self) -> str:
        """The settings as TOML, with the documentation of each as a comment."""
        return flat.to_toml(self.settings())

    def with_absolute_paths(self) -> RunConfig:
        """Paths resolved against the working directory, for code that runs elsewhere."""
        return dataclasses.replace(self, **beside(self.settings(), Path(), flat.SPECS.values()))

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> RunConfig:
        """From already typed scalars."""
        return cls(**values)

    @classmethod
    def load(cls, path: Path | None = None, overrides: Iterable[str] = ()) -> RunConfig:
        """From a TOML file, if any, and ``key=value`` strings that win over it.

        Relative paths in the file are relative to it, others to the working directory.
        """
        values = {} if path is None else flat.read_settings(path)
        return cls.from_mapping({**values, **flat.parse_overrides(overrides)})
