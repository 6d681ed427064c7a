"""Networks of other libraries, named ``PREFIX:NAME``; these prefixes win over ``module:attribute``.

================ ===================================================== =========================================
prefix           the name is                                           arguments (``model_args``) go to
================ ===================================================== =========================================
``timm``         a name of ``timm.list_models()``                      ``timm.create_model``
``torchvision``  a network of ``torchvision.models``, or its class     its builder, or the class
``transformers`` a folder with ``config.json``                         the configuration
================ ===================================================== =========================================

Number of classes, channels and size of images come from the data. All weights are new: nothing is downloaded, and
``start_from`` loads a file. What the library raises ends in one line (``plugins.call``). ``plugins`` reads the table
``LIBRARIES``.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from types import ModuleType

from torch import nn

from fed_dpsat.errors import ModelError

DOWNLOADS = frozenset({"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "weights"})
DOWNLOADS |= {"cache_dir", "weights_backbone", "trust_remote_code"}
"""Arguments by which a library fetches weights or code, or reads a file that no run records."""


def of_timm(name: str) -> Callable[..., nn.Module]:
    """A network of timm, by its name there: timm:vit_tiny_patch16_224."""
    from fed_dpsat.models.libraries.timm import factory

    return factory(name)


def of_torchvision(name: str) -> Callable[..., nn.Module]:
    """A network of torchvision.models, by its name there or its class: torchvision:resnet18."""
    from fed_dpsat.models.libraries.torchvision import factory

    return factory(name)


def of_transformers(folder: str) -> Callable[..., nn.Module]:
    """A classifier of transformers, of texts or images, by a folder with its config.json: transformers:minilm."""
    from fed_dpsat.models.libraries.transformers import factory

    return factory(folder)


LIBRARIES: dict[str, Callable[[str], Callable[..., nn.Module]]] = {
    "timm": of_timm,
    "torchvision": of_torchvision,
    "transformers": of_transformers,
}


def files_of(model: str) -> dict[str, Path]:
    """The files that decide what the network ``model`` of a library is, by how they are called."""
    prefix, separator, name = model.partition(":")
    return {"config.json": (Path(name) / "config.json").resolve()} if separator and prefix == "transformers" else {}


def imported(library: str, model: str, extra: str) -> ModuleType:
    """The package ``library``; ``ModelError`` with the ``extra`` to install if it is missing or does not import."""
    try:
        return importlib.import_module(library)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == library
        what = "is not installed" if missing else f"cannot be imported ({error})"
        raise ModelError(f'model={model!r}: {library} {what}; pip install "fed_dpsat[{extra}]"') from error


def unknown(model: str, name: str, known: Collection[str], where: str) -> ModelError:
    """The error for a ``name`` that is not one of ``known``, with those near its last part."""
    near = difflib.get_close_matches(name.rpartition("/")[2], known, n=4, cutoff=0.5) or sorted(known)[:4]
    return ModelError(f"model={model!r}: {name!r} is not {where}; did you mean {', '.join(near)}?")


def check_arguments(model: str, arguments: Iterable[str]) -> None:
    """Raise ``ModelError`` for an argument in ``DOWNLOADS``."""
    if found := sorted(DOWNLOADS & set(arguments)):
        raise ModelError(
            f"model={model!r}: model_args has {found[0]!r}, and a run downloads nothing and records each file that it "
            "reads; save the weights to a file and name it in start_from"
        )
