"""A pre-trained start: weights from a file, and which layers are trained from there.

A layer is a module with parameters of its own; layers are counted in the order in which they are defined, and the last
one is the head. A tensor that several layers use is of each of them (``fed_dpsat.models.ties``). What is not trained
is no parameter of the run: it is not sent, clipped or noised.

The file's weights count as public. If they were trained on private data, that has a cost of its own, which no run that
starts from them knows.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fed_dpsat.errors import SettingError
from fed_dpsat.models import ties
from fed_dpsat.models.norms import statistics_of_others

CHECKPOINT = Path("checkpoint") / "model.pt"
"""Where a run folder keeps its model."""
IN_FOLDER = ("model.safetensors", "pytorch_model.bin")
"""Where a folder of transformers or timm keeps its weights."""

BIAS = re.compile(r"(.*\.)?(\w+_)?bias(_\w+)?")
"""The name of a bias if it is a vector: ``bias``, ``q_bias``, ``in_proj_bias``, ``bias_hh_l0``."""
SHOWN = 8


@runtime_checkable
class Renaming(Protocol):
    """A module with a network of a library, whose files have other names."""

    def own_weights(self, weights: Mapping[str, Tensor], *, new_head: bool) -> tuple[dict[str, Tensor], list[str]]:
        """``weights`` by the names that they have in the module, and with ``new_head`` names of other heads."""
        ...

    def head_names(self) -> list[str]:
        """Names of the parameters that a file of the body alone does not have."""
        ...

    def keeps_head(self) -> bool:
        """Whether the head gives tokens, so that it is that of the file and not one for a new task."""
        ...

    def optional_names(self) -> list[str]:
        """Names of the parameters that keep their initial values if the head is new and the file does not have them."""
        ...


def weights_file(start_from: str) -> Path:
    """The file that ``start_from`` names: itself, or the last checkpoint of a run, or the weights in a folder."""
    path = Path(start_from)
    if not path.is_dir():
        return path
    of_library = (path / name for name in IN_FOLDER if not (path / CHECKPOINT).is_file())
    return next((file for file in of_library if file.is_file()), path / CHECKPOINT)


def read_weights(start_from: str) -> tuple[dict[str, Tensor], str]:
    """Tensors by name, and the SHA-256 of the file: safetensors, a state dict, or a checkpoint of this project.

    Nothing is unpickled but tensors and plain containers. Raises ``SettingError`` for anything else.
    """
    path = weights_file(start_from)
    try:
        found = _read(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except Exception as error:  # whatever the two libraries say of a file that is none
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if isinstance(error, UnpicklingError):  # torch's text speaks to programmers, and of running code in the file
            reason = "it is no archive of tensors, or holds other objects, such as a whole module"
        remedy = f"{reason}; give safetensors, or a state dict of torch.save"
        raise _wrong(start_from, "a file of weights", remedy) from error
    if isinstance(found, Mapping) and {"round", "params", "server"} <= found.keys():
        found = found["params"]
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise _wrong(start_from, "tensors by name", "save model.state_dict() alone, not what holds it")
    if bad := [name for name, value in found.items() if value.is_floating_point() and not value.isfinite().all()]:
        raise _wrong(start_from, "finite", f"{_few(bad)} hold NaN or inf: it was saved from a run that diverged")
    return dict(found), digest


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], start_from: str, *, new_head: bool) -> list[str]:
    """Copy ``weights`` into ``module``: all its parameters, of the same names and shapes, and no others.

    With ``new_head`` the head stays at its initial values, whatever the file says of it. A buffer that the file does
    not have stays as it is; of a tensor with several names, one is enough. Returns the names that are left out: running
    statistics of a BatchNorm that is a GroupNorm now, and with ``new_head`` heads that only the file has, if a library
    knows them (``Renaming``). Raises ``SettingError`` that lists what differs, or for a new head that shares a tensor
    with another layer.
    """
    left_out: list[str] = []
    if isinstance(module, Renaming):
        weights, left_out = module.own_weights(weights, new_head=new_head)
    without = statistics_of_others(module, list(weights))
    weights, left_out = {n: value for n, value in weights.items() if n not in without}, [*left_out, *without]
    own, first = module.state_dict(), ties.named_tensors(module)
    head = set(head_names(module)) if new_head else set()
    optional = module.optional_names() if new_head and isinstance(module, Renaming) else []
    if new_head and (shared := ties.shared_head(module)):
        raise SettingError(
            "start_head",
            "new",
            f"possible with a head that shares {shared[0]} with {shared[1]}: a new head would lose what the file has",
            "set start_head='loaded', or give the head a weight of its own",
        )
    skipped = {name for name, tensor in first.items() if tensor in head}
    given = {first.get(name, name) for name in weights}
    missing = [name for name in dict.fromkeys(first.values()) if name not in {*given, *skipped, *optional}]
    surplus = [name for name in weights if name not in own and name not in skipped]
    shapes = {
        name: f"{name} {list(value.shape)}, where the model has {list(own[name].shape)}"
        for name, value in weights.items()
        if name in own and name not in skipped and value.shape != own[name].shape
    }
    if missing or surplus or shapes:
        differs = [
            f"{what}: {_few(names)}"
            for what, names in (("missing", missing), ("not in the model", surplus), ("shapes", shapes.values()))
            if names
        ]
        others = not surplus or isinstance(module, Renaming)
        only_head = others and not new_head and _of_head_alone(module, set(missing) | set(shapes))
        remedy = "set start_head='new' to begin with a new head" if only_head else "name the model it was saved from"
        raise _wrong(start_from, f"weights of this model ({'; '.join(differs)})", remedy)
    for name, value in weights.items():
        tensor = first.get(name, name)
        if tensor not in skipped and not torch.equal(value, weights.get(tensor, value)):
            remedy = "leave one of them out of the file, or untie them in the model"
            raise _wrong(start_from, f"weights of this model, in which {tensor} and {name} are one tensor", remedy)
    with torch.no_grad():
        for name, value in weights.items():
            if name not in skipped:
                own[name].copy_(value)
    return left_out


def head_names(module: nn.Module) -> list[str]:
    """The first names of the tensors of the head, also of those that it shares with others.

    The head is the last layer, and in a network of transformers all that is not of the body.
    """
    further = module.head_names() if isinstance(module, Renaming) else []
    return list(dict.fromkeys([*ties.last_layers(module, 1), *further]))


def tuned_head(module: nn.Module) -> list[str]:
    """The ``head_names`` that are trained beside an adapter or biases: none of a network that gives tokens.

    That has a pre-trained head, as large as its vocabulary and often the embedding itself.
    """
    return [] if isinstance(module, Renaming) and module.keeps_head() else head_names(module)


def _of_head_alone(module: nn.Module, names: set[str]) -> bool:
    head = {*head_names(module), *(module.optional_names() if isinstance(module, Renaming) else [])}
    return names <= head and ties.shared_head(module) is None


def trained_names(module: nn.Module, train_layers: str, last_layers: int) -> list[str]:
    """What is trained in the first round, of what requires a gradient; see the setting ``train_layers``.

    "bias" is all biases, of every layer, and the head: Ben Zaken et al. 2022, "BitFit" (arXiv 2106.10199). Raises
    ``SettingError`` for more layers than there are, or none that can be trained.
    """
    learns = [name for name, p in module.named_parameters() if p.requires_grad]
    if train_layers == "all":
        return learns
    if train_layers == "bias":
        return _biases_and_head(module, learns)
    found = ties.layers(module)
    count = last_layers if train_layers == "last" else 1
    if count > len(found):
        raise SettingError(
            "last_layers", count, f"at most {len(found)}, the layers of the model", "lower it, or train_layers=all"
        )
    chosen = ties.last_layers(module, count)
    names = [name for name in learns if name in chosen]
    if not names:
        raise SettingError(
            "train_layers", train_layers, f"a choice that trains anything: {_few(chosen)} are frozen", "unfreeze them"
        )
    return names


def _biases_and_head(module: nn.Module, learns: Sequence[str]) -> list[str]:
    head, params = set(tuned_head(module)), dict(module.named_parameters())
    biases = {name for name in learns if name not in head and params[name].ndim == 1 and BIAS.fullmatch(name)}
    if not biases:
        raise SettingError(
            "train_layers",
            "bias",
            "possible for a model whose body has no bias",
            "set train_layers=head, or an adapter",
        )
    return [name for name in learns if name in head or name in biases]


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _few(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:SHOWN]) + (f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else "")


def _wrong(start_from: str, bound: str, remedy: str) -> SettingError:
    return SettingError("start_from", start_from, bound, remedy)
