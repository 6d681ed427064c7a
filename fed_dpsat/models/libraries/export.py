"""Files of a trained model that other libraries load: transformers, peft, or anything that reads safetensors.

======================================= ====================================================================
the model                               files
======================================= ====================================================================
a network of transformers               ``config.json``, ``model.safetensors``, with the names of the library
any network with an adapter, not merged ``adapter_config.json``, ``adapter_model.safetensors``, of peft
any other                               ``model.safetensors``, with the names of the module
======================================= ====================================================================
"""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fed_dpsat.errors import SettingError
from fed_dpsat.models.libraries.adapters import adapters, library_network, remove_adapter
from fed_dpsat.models.libraries.transformers import quiet
from fed_dpsat.models.pretrained import Renaming
from fed_dpsat.models.ties import layer_of, named_tensors


def save_model(module: nn.Module, folder: Path, class_names: Sequence[str] = ()) -> None:
    """Write ``module``, which has no adapter, into the existing ``folder``.

    A network of transformers gets ``class_names`` as its ``id2label``. One with other layers than transformers would
    build, such as GroupNorm for BatchNorm, is written as any other module.
    """
    if (network := _as_in_library(module)) is not None:
        _describe(network, class_names)
        with quiet():
            network.save_pretrained(folder)
        return
    importlib.import_module("safetensors.torch").save_model(module, str(folder / "model.safetensors"))


def save_adapter(
    module: nn.Module, folder: Path, *, start_from: str, weights: Mapping[str, Tensor], class_names: Sequence[str] = ()
) -> None:
    """Write the adapters, and what else of ``module`` is not in ``weights``, into the existing ``folder``.

    ``weights`` are those of the file ``start_from``, whose network is the base: ``PeftModel.from_pretrained(base,
    folder)`` computes what ``module`` does. What else there is are a trained head, and layers that the file does not
    have. A network of transformers also gets a ``config.json``. ``module`` is changed. Raises ``SettingError`` if a
    layer has a name by which peft would take others too.
    """
    peft, network = importlib.import_module("peft"), library_network(module)
    plain = _as_in_library(module)
    trained = {name: layer.state_dict() for name, layer in adapters(network).items()}
    remove_adapter(module, merge=False)
    settings: Any = network.peft_config["default"]  # type: ignore[index]
    settings.modules_to_save = _further(module, weights, trained)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft says that the network had an adapter before
        model = peft.get_peft_model(network, settings)
        for name, layer in adapters(network).items():
            layer.load_state_dict(trained[name])
        settings.base_model_name_or_path = start_from
        model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # a form of peft, with nothing filled in
    if plain is not None:
        _describe(plain, class_names)
        plain.config.save_pretrained(folder)


def _further(module: nn.Module, weights: Mapping[str, Tensor], trained: Collection[str]) -> list[str]:
    """Names of layers in the library's network with tensors that ``weights`` do not have, or with other values.

    ``trained`` names the layers with adapters.
    """
    network, first = library_network(module), named_tensors(module)
    own = module.own_weights(weights, new_head=True)[0] if isinstance(module, Renaming) else weights
    given = {first.get(name, name): value for name, value in own.items()}
    differs = [name for name, p in module.named_parameters() if not _same(given.get(name), p)]
    prefix = next(name for name, each in module.named_modules() if each is network)
    layers = list(dict.fromkeys(layer_of(name).removeprefix(f"{prefix}.") for name in differs))
    others = [name for name, _ in network.named_modules() if name.endswith(tuple(layers)) and name not in layers]
    inner = [name for name in layers if name in trained or any(network.get_submodule(name).children())]
    if wrong := [*others, *inner]:
        raise SettingError("merge", False, f"possible: no file of peft can have {wrong[0]} alone", "add --merge")
    return sorted(layers)


def _same(given: Tensor | None, p: Tensor) -> bool:
    return given is not None and given.shape == p.shape and torch.equal(given, p)


def _as_in_library(module: nn.Module) -> Any:
    """The network of transformers in ``module`` if it has the tensors that its configuration says; otherwise None."""
    network: Any = library_network(module)
    if network is module and not hasattr(network, "save_pretrained"):
        return None
    with torch.device("meta"):
        plain = type(network)(copy.deepcopy(network.config))
    own = {name.replace(".base_layer.", ".") for name in network.state_dict() if ".lora_" not in name}
    return network if plain.state_dict().keys() == own else None


def _describe(network: Any, class_names: Sequence[str]) -> None:
    network.config.architectures = [type(network).__name__]
    if len(class_names) == network.config.num_labels:
        network.config.id2label = dict(enumerate(class_names))
        network.config.label2id = {name: i for i, name in enumerate(class_names)}
