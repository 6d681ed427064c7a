"""Low-rank adapters, through peft: the setting ``adapter`` and those that begin with ``adapter_``.

A layer with an adapter computes ``W x + (alpha / rank) B A x``. At the start A is drawn, uniform as peft draws it, and
B is zero, so that the network computes what it did before.

============ ================== =======================================
adapter      trained            frozen
============ ================== =======================================
``lora``     A, B and the head  all else
``ffa-lora`` B and the head     all else; A stays as it was drawn
============ ================== =======================================

The head of a network that gives tokens is frozen too: it is pre-trained (``fed_dpsat.models.pretrained.tuned_head``).

Sources: Hu et al. 2021, "LoRA" (arXiv 2106.09685); Sun et al. 2024, "Improving LoRA in Privacy-preserving Federated
Learning" (arXiv 2403.12313), for ``ffa-lora``.
"""

from __future__ import annotations

import difflib
import importlib
import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fed_dpsat.errors import SettingError
from fed_dpsat.models import ties
from fed_dpsat.models.libraries.transformers import Classifier
from fed_dpsat.models.pretrained import head_names, tuned_head

PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers that can have an adapter, beside ``CONV1D``, which is linear too."""
READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
"""Layers of torch that read the weights of the layers in them, so that an adapter around one of those has no effect."""
CONV1D = "transformers.pytorch_utils.Conv1D"
SHOWN = 8


def add_adapter(module: nn.Module, adapter: str, *, rank: int, alpha: int, targets: str = "") -> None:
    """Put an adapter around each target layer of ``module``, in place, and freeze all but the adapters and the head.

    ``targets`` are the ends of the names of layers, with commas; without any, those that peft has for the
    ``model_type`` of a network of transformers. A is drawn from torch's generator. Raises ``SettingError`` without
    peft, for a head that shares its weight, and for targets that match nothing, the head, or a layer that cannot have
    an adapter.
    """
    peft, network = _peft(adapter), library_network(module)
    if adapters(module):
        raise SettingError("adapter", adapter, "possible for a model that has adapters", "leave one of them out")
    tuned = set(tuned_head(module))
    if tuned and (shared := ties.shared_head(module)):
        bound = f"possible with a head that shares {shared[0]} with {shared[1]}, which an adapter freezes"
        raise SettingError("adapter", adapter, bound, "give the head a weight of its own")
    learns = [p for name, p in module.named_parameters() if name in tuned and p.requires_grad]
    names = set(head_names(module))
    head = [p for name, p in module.named_parameters() if name in names]
    settings = _settings(peft, network, head, rank=rank, alpha=alpha, targets=targets)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft says that the weight of a Conv1D is turned
            peft.inject_adapter_in_model(settings, network)
    except ValueError as error:  # such as for a rank that the groups of a convolution do not divide
        reason = str(error).strip().splitlines()[0]
        raise SettingError("adapter_rank", rank, f"possible here ({reason})", "change it, or the targets") from error
    for p in learns:
        p.requires_grad_(True)
    for layer in adapters(module).values():
        layer.lora_A.requires_grad_(adapter == "lora")


def library_network(module: nn.Module) -> nn.Module:
    """The network of transformers in ``module``, in which layers have the names of the library; or ``module``."""
    return module.network if isinstance(module, Classifier) else module


def adapters(module: nn.Module) -> dict[str, Any]:
    """The layers of peft with an adapter in ``module``, by name."""
    return {name: layer for name, layer in module.named_modules() if hasattr(layer, "lora_A")}


def remove_adapter(module: nn.Module, *, merge: bool) -> None:
    """Undo ``add_adapter`` on the layers of ``module``; with ``merge``, each W becomes ``W + (alpha / rank) B A``."""
    for name, layer in adapters(module).items():
        if merge:
            layer.merge(safe_merge=True)
        parent, _, key = name.rpartition(".")
        setattr(module.get_submodule(parent), key, layer.get_base_layer())


def _peft(adapter: str) -> Any:
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "peft"
        what = "without peft" if missing else f"without peft, which cannot be imported ({error})"
        raise SettingError("adapter", adapter, f"possible {what}", 'pip install "fed_dpsat[text]"') from error


def _settings(peft: Any, network: nn.Module, head: Sequence[Tensor], *, rank: int, alpha: int, targets: str) -> Any:
    """A ``LoraConfig`` whose targets are all layers that can have an adapter; raises ``SettingError``."""
    names = [name.strip() for name in targets.split(",") if name.strip()]
    kind = getattr(getattr(network, "config", None), "model_type", None)
    default = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind)
    linear = _linear(network, head)
    if not names and default is None:
        what = f"model_type={kind!r}" if kind else type(network).__name__
        raise _wrong(targets, f"possible for {what}, for which peft has no targets", _listed(linear))
    settings = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=names or default, lora_dropout=0.0)
    matches = peft.tuners.tuners_utils.check_target_module_exists
    found = [name for name, _ in network.named_modules() if name and matches(settings, name)]
    if not found and not names:
        raise _wrong(targets, f"possible: peft's own targets ({default}) match no layer here", _listed(linear))
    for name in names:
        if not any(f".{key}".endswith(f".{name}") for key in found):
            near = difflib.get_close_matches(name, linear, n=3)
            remedy = f"did you mean {', '.join(near)}?" if near else _listed(linear)
            raise _wrong(targets, f"made of ends of names of layers: there is no {name!r}", remedy)
    for name in found:
        if reason := _reason(network, name, head):
            raise _wrong(targets, f"possible: {name} {reason}", f"name others, or longer ends; {_listed(linear)}")
    return settings


def _reason(network: nn.Module, name: str, head: Sequence[Tensor]) -> str:
    """The reason against an adapter around the layer ``name``; empty for a layer that can have one."""
    layer, parent = network.get_submodule(name), network.get_submodule(name.rpartition(".")[0])
    own = {id(p) for p in layer.parameters()}
    if own & {id(p) for p in head}:
        return "is of the head, which has no adapter"
    if not _can(layer):
        return f"is a {type(layer).__name__}, not a linear layer or a convolution with a weight of its own"
    if isinstance(parent, READERS):
        return f"is in a {type(parent).__name__}, which reads its weight itself and would not use the adapter"
    if sum(each is layer for _, each in network.named_modules(remove_duplicate=False)) > 1:
        return "stands under two names"
    tensors = [id(p) for _, p in network.named_parameters(remove_duplicate=False)]
    if any(tensors.count(tensor) > 1 for tensor in own):
        return "shares its weight with another layer, which would not have the adapter"
    return ""


def _can(layer: nn.Module) -> bool:
    linear = isinstance(layer, PLAIN) or f"{type(layer).__module__}.{type(layer).__name__}" == CONV1D
    return linear and "weight" in layer._parameters


def _linear(network: nn.Module, head: Sequence[Tensor]) -> list[str]:
    """The last parts of the names of layers that can have an adapter, each once."""
    found = [name for name, layer in network.named_modules() if _can(layer) and not _reason(network, name, head)]
    return list(dict.fromkeys(name.rpartition(".")[2] for name in found))


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"linear layers and convolutions are {', '.join(names[:SHOWN])}{more}" if names else "no layer can have one"


def _wrong(targets: str, bound: str, remedy: str) -> SettingError:
    return SettingError("adapter_targets", targets, bound, remedy)
