"""Objects that a caller gives in Python: a run works on copies of them, and records their names.

So two runs with one object start alike, and the object of the caller does not change: the memory of a strategy; the
device, modes, flags and buffers of a model. Data sets are not copied, because a run does not write into them.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, TypeVar

from torch import Tensor, nn

from fed_dpsat.errors import SettingError
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.settings.values import Scalar

Given = TypeVar("Given")

FROM_PYTHON = "(from Python)"
"""Ends the name of an object in a configuration."""

UNUSED: dict[str, dict[str, Scalar]] = {
    "partition": {"partition_args": "", "partition_by": ""},
    "task": {"task_args": ""},
    "optimizer": {"base_optimizer": "dp-sgd", "optimizer_args": ""},
    "strategy": {"strategy_args": ""},
}
"""By setting: the settings that an object makes unused, with their defaults."""


def copied(setting: str, given: Given, memo: dict[int, Any] | None = None) -> Given:
    """A copy of ``given`` for a run or its trial; ``memo`` is that of ``copy.deepcopy``.

    A weight that a module computes from others is copied by value. Raises ``SettingError`` if there is no copy.
    """
    memo = {} if memo is None else memo
    for part in given.modules() if isinstance(given, nn.Module) else ():
        for value in vars(part).values():
            if isinstance(value, Tensor) and not value.is_leaf:  # as of weight_norm
                memo[id(value)] = value.detach().clone()
    try:
        return copy.deepcopy(given, memo)
    except Exception as error:  # parts of any class raise any error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SettingError(
            setting,
            type(given).__name__,
            f"an object that can be copied ({reason}), and a run begins from a copy",
            f"name the function that makes it: {setting}=path/to/file.py:function, or give it a __deepcopy__",
        ) from error


def refuse_names(**given: Any) -> None:
    """Raise ``SettingError`` for a name or a class among the ``given`` objects, by setting."""
    for setting, value in given.items():
        if isinstance(value, type):
            raise SettingError(setting, value.__name__, "an object", f"it is a class; call it: {value.__name__}(...)")
        if isinstance(value, str):
            raise SettingError(setting, value, "an object", f"give a name to RunConfig({setting}={value!r})")


def called(given: Any) -> str:
    """``"module.Class (from Python)"`` with the classes of its bases; for a data set its own name."""
    if isinstance(name := getattr(given, "name", None), str) and hasattr(given, "class_names"):
        return f"{name} {FROM_PYTHON}"
    chain = [given]
    while (base := getattr(chain[-1], "base", None)) is not None:
        chain.append(base)
    return f"{' over '.join(f'{type(one).__module__}.{type(one).__qualname__}' for one in chain)} {FROM_PYTHON}"


def renamed(config: RunConfig, **given: Any) -> RunConfig:
    """``config`` with the names of the ``given`` objects (not None), by setting."""
    names: dict[str, Any] = {}
    for setting, value in given.items():
        if value is not None:
            names |= {setting: called(value), **UNUSED.get(setting, {})}
    return dataclasses.replace(config, **names)
