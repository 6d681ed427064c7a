"""The model that a run starts with: its weights, the layers that are trained, and the checks before any training."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fed_dpsat import plugins
from fed_dpsat.data.dataset import Examples
from fed_dpsat.data.made_up import made_up_examples
from fed_dpsat.data.sequences import Sequences
from fed_dpsat.errors import ModelError, SettingError
from fed_dpsat.models.libraries.adapters import add_adapter
from fed_dpsat.models.norms import with_norm
from fed_dpsat.models.pretrained import load_weights, read_weights, trained_names
from fed_dpsat.models.ties import check_memory
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.step.examples import Examples as Tree
from fed_dpsat.step.gradients.per_example import check_module
from fed_dpsat.step.gradients.unchanging import check_unchanging
from fed_dpsat.step.placement import device_of

log = logging.getLogger("fed_dpsat")


@dataclass(frozen=True, kw_only=True)
class Start:
    """Names of the trained parameters, and of those from ``unfreeze_round`` on; the SHA-256 of ``start_from``.

    ``notes`` say what of the model was replaced, what of the file was left out, and if an adapter has no file.
    """

    names: tuple[str, ...]
    later_names: tuple[str, ...] = ()
    sha256: str = ""
    notes: tuple[str, ...] = ()


def begin(model: nn.Module, config: RunConfig) -> tuple[nn.Module, Start]:
    """``model`` with the ``norm``, the weights of ``start_from`` and the ``adapter``; what is not trained is frozen.

    An adapter is drawn from torch's generator. Raises ``SettingError`` for a trained parameter that is not float32: in
    float16, noise and sums are rounded away, and float64 meets inputs of float32.
    """
    check_memory(model)
    sha256, left_out, without_file = "", "", ""
    model, replaced = with_norm(model, config.norm)
    if config.start_from:
        weights, sha256 = read_weights(config.start_from)
        missing = load_weights(model, weights, config.start_from, new_head=config.start_head == "new")
        if missing:
            shown = ", ".join([*missing[:3], *(["..."] if len(missing) > 3 else [])])
            left_out = f"start_from={config.start_from!r}: {len(missing)} tensors are left out ({shown})"
    if config.adapter:
        rank, alpha, targets = config.adapter_rank, config.adapter_alpha, config.adapter_targets
        add_adapter(model, config.adapter, rank=rank, alpha=alpha, targets=targets)
        if not config.start_from:
            without_file = f"adapter={config.adapter!r} without start_from: initial weights are frozen"
    everything = trained_names(model, "all", 0)
    names = trained_names(model, config.train_layers, config.last_layers)
    later = everything if config.train_layers == "head-then-all" else []
    for name, p in model.named_parameters():
        if name not in names:
            p.requires_grad_(False)
        if name in {*names, *later} and p.dtype != torch.float32:
            raise SettingError(
                "model",
                config.model,
                f"of float32 parameters ({name} is {str(p.dtype).removeprefix('torch.')})",
                "build it in float32, or call .float() on it; precision=bfloat16 computes its layers in bfloat16",
            )
    notes = tuple(note for note in (replaced, left_out, without_file) if note)
    return model, Start(names=tuple(names), later_names=tuple(later), sha256=sha256, notes=notes)


def check_one_input(model: str, like: Examples) -> None:
    """Raise ``ModelError`` for a name of a built-in model, or of a library's, and examples with several inputs."""
    names = list(like.leaves)
    if len(names) > 1 and (model in plugins.builtin("model") or model.partition(":")[0] in plugins.libraries("model")):
        raise ModelError(
            f"model={model!r} takes one array, and the inputs of the data set are {', '.join(map(repr, names))}; join "
            "them in one array, or give a model of your own whose forward has these arguments"
        )


def check_passes(module: nn.Module, like: Examples) -> None:
    """Raise ``ModelError`` if ``module`` mixes examples like those, or if a pass through it changes it."""
    check_module(module)  # the name of a layer that mixes examples says more than that of its statistics
    try:
        check_unchanging(module, *_passed(like, device_of(module)))
    except ModelError:
        raise
    except Exception as error:  # a module that fails here fails in the trial, with a better message
        log.debug(
            "not known whether passes change %s, which fails on made-up examples: %s", type(module).__name__, error
        )


def _passed(like: Examples, device: torch.device) -> tuple[Tree, Tree]:
    """Two made-up batches of zeros and ones, which are valid as pixels, features and tokens, and differ in all."""
    if isinstance(like.inputs, Tensor):
        shape = (2, *like.inputs.shape[1:])
        first = (torch.arange(math.prod(shape)) % 2).view(shape).to(device)
        first = first.float() if like.mean or like.inputs.is_floating_point() else first
        return first, 1 - first
    named, _ = made_up_examples(like, None, 2, 1).batch(torch.arange(2), device)
    assert isinstance(named, dict)
    # masks stay, and so does padding, whose number is any of the vocabulary
    swapped = {
        name for name, leaf in like.leaves.items() if not isinstance(leaf, Sequences) or leaf.vocabulary_size > 1
    }
    return named, {n: value.where(value > 1, 1 - value) if n in swapped else value for n, value in named.items()}
