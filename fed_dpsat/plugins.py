"""Names in a configuration become objects here, built-in ones and yours through the same door.

A plug-in is named ``package.module:attribute``, ``path/to/file.py:attribute`` or, for what ships with the
project, by a short name. Short names are found by importing the modules of one package per kind and reading
their table, so a new built-in is one new file:

=======
=============== ============================= ====================
kind            package                       table
=============== ============================= ====================
optimizer       ``fed_dpsat.step.optimizers`` ``OPTIMIZERS``
clipping        ``fed_dpsat.step.clipping``   ``CLIPPING``
noise_mechanism ``fed_dpsat.step.correlated`` ``NOISE_MECHANISMS``
model           ``fed_dpsat.models``          ``MODELS``
dataset         ``fed_dpsat.data``            ``DATASETS``
partition       ``fed_dpsat.data``            ``PARTITIONS``
features        ``fed_dpsat.data``            ``FEATURES``
task            ``fed_dpsat.tasks``           ``TASKS``
strategy        ``strategies``                ``STRATEGIES``
attack          ``fed_dpsat.lab.attacks``     ``ATTACKS``
logger          ``fed_dpsat.lab.loggers``     ``LOGGERS``
=============== ============================= ====================

A strategy of Flower is also named by its class (``STOCK``), such as ``FedAdam``. A model of another library is named
``PREFIX:NAME`` with a prefix of ``LIBRARIES`` in ``fed_dpsat.models.libraries``, such as ``timm:vit_tiny_patch16_224``.
These prefixes win over a module of the same name.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
import tomllib
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from fed_dpsat.errors import InputError, RunError
from fed_dpsat.left import moved, successor

PACKAGES = {
    "optimizer": "fed_dpsat.step.optimizers",
    "clipping": "fed_dpsat.step.clipping",
    "noise_mechanism": "fed_dpsat.step.correlated",
    "model": "fed_dpsat.models",
    "dataset": "fed_dpsat.data",
    "partition": "fed_dpsat.data",
    "features": "fed_dpsat.data",
    "task": "fed_dpsat.tasks",
    "strategy": "strategies",
    "attack": "fed_dpsat.lab.attacks",
    "logger": "fed_dpsat.lab.loggers",
}
TABLES = {
    "optimizer": "OPTIMIZERS",
    "clipping": "CLIPPING",
    "noise_mechanism": "NOISE_MECHANISMS",
    "model": "MODELS",
    "dataset": "DATASETS",
    "partition": "PARTITIONS",
    "features": "FEATURES",
    "task": "TASKS",
    "strategy": "STRATEGIES",
    "attack": "ATTACKS",
    "logger": "LOGGERS",
}
STOCK = {"strategy": ("flwr.serverapp.strategy", "Strategy")}
"""By kind, a module and a base class of it: its other subclasses have the name of the class."""
NOT_STOCK = ("DifferentialPrivacy", "FedXgb")
"""Beginnings of the names of wrappers whose noise no ledger counts, and of strategies of trees."""
LIBRARIES = {"model": "fed_dpsat.models.libraries"}
"""By kind, the module with a table ``LIBRARIES`` from a prefix to what makes a factory of the rest of the name."""

HAVE = {
    "optimizer": ("init", "query_point", "update"),
    "clipping": ("clip_norm", "factors"),
    "noise_mechanism": ("stream",),
    "model": ("named_parameters", "named_buffers", "train"),
    "dataset": ("train", "test", "class_names"),
    "features": ("__call__",),
    "attack": ("forge",),
    "task": ("loss", "measure", "metrics", "outputs"),
}
"""What the objects of a kind have at least; the rest is for the suites of ``fed_dpsat.testing``."""
WHAT = {
    "optimizer": "a private optimizer (fed_dpsat.step.optimizers)",
    "clipping": "a clipping rule (fed_dpsat.step.clipping)",
    "noise_mechanism": "a mechanism with stream() (fed_dpsat.step.correlated.measured.OwnMechanism)",
    "model": "a torch.nn.Module",
    "dataset": "a fed_dpsat.data.dataset.Dataset",
    "features": "a function from a batch of inputs to features",
    "attack": "an attack (fed_dpsat.lab.attacks)",
    "task": "a task (fed_dpsat.tasks.base.Task)",
}

Factory = Callable[..., Any]


class PluginError(InputError):
    """A name that leads to no plug-in, or a plug-in that asks for a setting that nobody gave."""


def builtin(kind: str) -> dict[str, Factory]:
    """Short name to factory for one ``kind``, sorted by name."""
    package = importlib.import_module(PACKAGES[kind])
    found: dict[str, Factory] = dict(getattr(package, TABLES[kind], {}))
    for module in pkgutil.iter_modules(getattr(package, "__path__", ())):
        table = getattr(importlib.import_module(f"{package.__name__}.{module.name}"), TABLES[kind], {})
        if clash := found.keys() & table.keys():
            raise PluginError(f"{kind} {sorted(clash)[0]!r} is defined twice in {package.__name__}")
        found |= table
    return dict(sorted(found.items()))


def stock(kind: str) -> dict[str, Factory]:
    """Name to class of another library, for one ``kind``: ``FedAdam`` and other strategies of Flower."""
    if kind not in STOCK:
        return {}
    name, base = STOCK[kind]
    module = importlib.import_module(name)
    classes = {n: c for n, c in inspect.getmembers(module, inspect.isclass) if not n.startswith(NOT_STOCK)}
    return {n: c for n, c in classes.items() if issubclass(c, getattr(module, base)) and not inspect.isabstract(c)}


def libraries(kind: str) -> dict[str, Callable[[str], Factory]]:
    """Prefix to what makes a factory of the name after it, for one ``kind``."""
    return dict(importlib.import_module(LIBRARIES[kind]).LIBRARIES) if kind in LIBRARIES else {}


def listed(kind: str) -> dict[str, str]:
    """Built-in names, classes of Flower, and ``PREFIX:...`` of each library, with a line that says what they are."""
    of_libraries = {f"{prefix}:...": factory for prefix, factory in libraries(kind).items()}
    return {name: summary(factory) for name, factory in (builtin(kind) | stock(kind) | of_libraries).items()}


def load(kind: str, name: str) -> Factory:
    """The factory that ``name`` stands for; a ``PluginError`` names near ones if it stands for nothing."""
    prefix, separator, rest = name.partition(":")
    if separator and (of_library := libraries(kind).get(prefix)):
        return of_library(rest)
    if separator:
        return _load_dotted(kind, name)
    table = builtin(kind) | stock(kind)
    if name in table:
        return table[name]
    if instead := successor(kind, name):
        raise PluginError(f"{kind}={name!r} is not a built-in {kind}; {instead}")
    near = difflib.get_close_matches(name, table, n=3, cutoff=0.4) or list(table)
    raise PluginError(
        f"{kind}={name!r} is not a built-in {kind}; did you mean {', '.join(near)}? "
        f"Your own is named package.module:attribute"
    )


def build(kind: str, name: str, settings: Mapping[str, Any], arguments: str = "") -> Any:
    """Call the factory with those of ``settings`` that its signature names, and with all of ``arguments``.

    One vocabulary makes this work: a factory's parameter has the name of the setting that fills it. What no setting
    fills can be given as ``arguments``, ``"eta = 0.02, tau = 1e-3"``, as in a TOML inline table. An argument that is
    a setting too is refused with ``PluginError``, except for a model: its words are those of its library, such as
    ``dropout_rate``.
    """
    given = parse_arguments(kind, arguments)
    if kind != "model" and (twice := sorted(given.keys() & settings.keys())):
        raise PluginError(f"{kind}_args={arguments!r}: {twice[0]!r} is a setting of its own; set it as that")
    return call(kind, name, load(kind, name), settings, given)


def call(kind: str, name: str, factory: Factory, settings: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
    """``build`` of a ``factory`` that was loaded before, with arguments as they are.

    Raises ``PluginError`` for whatever the factory raises, with its place.
    """
    parameters = _parameters(kind, name, factory).values()
    settings = {**settings, **given}
    missing = [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.name not in settings
    ]
    if missing:
        remedy = "give it a default"
        if kind != "logger":  # it has no setting for arguments
            remedy = f'give it: {kind}_args = "{missing[0]} = VALUE" (--set "{kind}_args=..."), or a default'
        raise PluginError(f"{kind}={name!r} needs {missing[0]!r}, which is not a setting; {remedy}")
    named = {p.name for p in parameters}
    if not any(p.kind is p.VAR_KEYWORD for p in parameters) and (unknown := given.keys() - named):
        near = difflib.get_close_matches(wrong := min(unknown), named, n=3) or sorted(named)
        raise PluginError(f"{kind}={name!r} takes no {wrong!r}; did you mean {', '.join(near) or 'nothing'}?")
    try:
        return factory(**{key: settings[key] for key in named & settings.keys() | given.keys()})
    except (InputError, RunError):
        raise
    except Exception as error:  # whatever a factory raises
        frame = traceback.extract_tb(error.__traceback__)[-1]
        said = next(iter(str(error).splitlines()), "")
        raise PluginError(
            f"{kind}={name!r} fails: {type(error).__name__}: {said} ({Path(frame.filename).name}, line {frame.lineno})"
        ) from error


def required(kind: str, name: str, thing: Any) -> Any:
    """``thing``, if it has what an object of ``kind`` has; raises ``PluginError``."""
    wanted = HAVE.get(kind, ())
    if lacking := [attribute for attribute in wanted if isinstance(thing, type) or not hasattr(thing, attribute)]:
        what = f"the class {thing.__name__}" if isinstance(thing, type) else f"a {type(thing).__name__}"
        raise PluginError(f"{kind}={name!r} is {what}, without {lacking[0]!r}; return {WHAT[kind]}")
    return thing


def parameters(kind: str, name: str, factory: Factory) -> list[str]:
    """The names of what ``factory`` can be given by name; one that takes anything has ``**`` among them."""
    found = _parameters(kind, name, factory).values()
    return [f"**{p.name}" if p.kind is p.VAR_KEYWORD else p.name for p in found if p.kind is not p.VAR_POSITIONAL]


def parse_arguments(kind: str, text: str) -> dict[str, Any]:
    """``"eta = 0.02, tau = 1e-3"`` as names and values; ``PluginError`` for what is none of that."""
    try:
        (found,) = tomllib.loads(f"arguments = {{{text}}}").values()
    except ValueError as error:
        raise PluginError(f"{kind}_args={text!r} are no arguments ({error}); write a = 1, b = 'text'") from None
    return dict(found)


def summary(factory: Factory) -> str:
    """The first line of the factory's docstring."""
    return (inspect.getdoc(factory) or "").partition("\n")[0].rstrip(".")


def _parameters(kind: str, name: str, factory: Factory) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(factory).parameters
    except (TypeError, ValueError):
        raise PluginError(f"{kind}={name!r} is no function that says its parameters; wrap it in one") from None


def _load_dotted(kind: str, name: str) -> Factory:
    target, _, attribute = name.rpartition(":")
    if not target.strip(".") or (target.startswith(".") and not target.endswith(".py")):
        raise PluginError(
            f"{kind}={name!r} names no module; write package.module:attribute or path/to/file.py:attribute"
        )
    try:
        module = _import_file(Path(target)) if target.endswith(".py") else importlib.import_module(target)
    except ImportError as error:
        said = f"{error}; {now}" if (now := moved(error.name)) else str(error)
        raise PluginError(f"{kind}={name!r}: cannot import {target!r} ({said})") from error
    try:
        factory: Factory = getattr(module, attribute)
    except AttributeError:
        near = difflib.get_close_matches(attribute, dir(module), n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise PluginError(f"{kind}={name!r}: {target!r} has no {attribute!r}{hint}") from None
    return factory


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ImportError(f"no file {path}")
    module_name = f"fed_dpsat_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    return module
