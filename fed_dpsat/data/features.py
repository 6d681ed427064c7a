"""Features in the place of inputs: a public, frozen extractor sees each example once, and a cache has the result.

An extractor is a function, or a module in evaluation mode, from a batch of inputs to features ``[B, F]`` or
``[B, C, ...]``. A batch is what a model gets, without ``mean`` and ``std``: pixels are in 0..1, and several inputs are
arguments by name. The features of an example must not depend on the examples beside it, or its gradient would not be
the only one that it changes; ``check_extractor`` refuses an extractor that mixes made-up and test examples.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional

from fed_dpsat import plugins
from fed_dpsat.data.cache import Arrays, cached_parts
from fed_dpsat.data.dataset import Dataset, Examples
from fed_dpsat.data.made_up import made_up_examples
from fed_dpsat.data.sequences import Sequences
from fed_dpsat.errors import DataError, SettingError
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.step import generators
from fed_dpsat.step.placement import CPU, torch_device

Extractor: TypeAlias = Callable[..., Tensor]

FORMAT = 1
"""A part of each hash: raise it if the numbers of a built-in extractor or of a normalisation change."""
ROWS = 256
"""Number of examples that an extractor sees at a time."""
LOOKED_AT = 8
"""Number of examples on which an extractor is checked."""
LARGEST = 65504.0
"""The largest number of float16."""
CHUNK_BYTES = 2**24


def with_features(dataset: Dataset, config: RunConfig, settings: Mapping[str, Any]) -> Dataset:
    """``dataset`` with float16 features ``[N, F]`` or ``[N, C, ...]``, memory-mapped from ``cache_dir``, as inputs.

    Labels and columns stay, and ``features`` of the result is the SHA-256 of the extractor: its name, arguments, source
    file and weights, and the normalisation. Raises ``PluginError`` for an extractor that is not fit, ``SettingError``
    for another hash than ``features_sha256`` or a number of groups that does not fit, and ``DataError`` for labels that
    belong to tokens, and for features that are not finite or above 65,504 in absolute value, with the row.
    """
    for split in (dataset.train, dataset.test):
        if not isinstance(split.labels, Tensor):
            raise DataError(
                f"{dataset.name}: labels belong to tokens, which features={config.features!r} replaces; leave features "
                "empty, or choose a task with a label for each example"
            )
    device = torch_device(config.device)
    with generators.kept(CPU):
        generators.seed(CPU, 0)  # of an extractor with random weights, the same in each run
        made = plugins.build("features", config.features, settings, config.features_args)
    extractor = plugins.required("features", config.features, made)
    if isinstance(extractor, nn.Module):
        extractor.to(device)
    sha256 = digest(config, extractor)
    if config.features_sha256 not in ("", sha256):
        bound = f"{sha256}, the SHA-256 of features={config.features!r}, its arguments, source and weights"
        remedy = "restore the extractor, or leave features_sha256 empty for a new run"
        raise SettingError("features_sha256", config.features_sha256, bound, remedy)
    compute = partial(_computed, config, extractor, device)
    public = dataset.test if len(dataset.test) else None
    looked_at = made_up_examples(dataset.train, public, LOOKED_AT, max(1, dataset.num_classes))
    check_extractor(config.features, extractor, looked_at, device)
    expected = compute(looked_at, torch.arange(LOOKED_AT), "made-up")
    key = _sha256(FORMAT, sha256, torch.__version__, device.type, *map(_contents, (dataset.train, dataset.test)))
    folder = Path(config.cache_dir).expanduser().absolute() / f"{dataset.name}-features-{key[:16]}"
    splits = {"train": dataset.train, "test": dataset.test}
    arrays = cached_parts(folder, partial(_parts, dataset.name, splits, expected, compute))
    _check_same(folder, arrays["looked_at"], expected)
    train, test = (
        dataclasses.replace(examples, inputs=arrays[split], mean=(), std=()) for split, examples in splits.items()
    )
    return dataclasses.replace(dataset, train=train, test=test, features=sha256)


def digest(config: RunConfig, extractor: Extractor) -> str:
    """SHA-256 in hex of all that decides the features of an example, but for modules that the source file imports."""
    norm = [config.features_norm, config.features_groups if config.features_norm == "group" else 0]
    found = hashlib.sha256(
        json.dumps([FORMAT, config.features.rpartition(":")[2], config.features_args, norm]).encode()
    )
    if ":" in config.features:
        target = config.features.rpartition(":")[0]
        source = target if target.endswith(".py") else sys.modules[target].__file__
        found.update(Path(source).read_bytes() if source else b"")
    for name, value in _state(extractor).items():
        found.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def check_extractor(name: str, extractor: Extractor, examples: Examples, device: torch.device = CPU) -> None:
    """Raise ``PluginError`` for an ``extractor`` that is not frozen, or whose features depend on a batch.

    ================================================ =======================================================
    a module, or a part of one, is in training mode  refused
    the result is not features ``[B, F]``            refused
    a second call gives other features               refused: it draws, or it counts
    an example alone, or beside others               equal features up to rounding, or refused
    a call changes a parameter or a buffer           refused
    ================================================ =======================================================
    """
    modules = list(extractor.named_modules()) if isinstance(extractor, nn.Module) else []
    if training := [part for part, module in modules if module.training]:
        raise _unfit(name, f"is in training mode ({training[0] or 'itself'})", "return it after .eval()")
    before = {part: value.detach().clone() for part, value in _state(extractor).items()}
    rows = torch.arange(len(examples))
    group = max(examples.alike(rows), key=len)
    whole = extract(name, extractor, examples, group, device)
    again = extract(name, extractor, examples, group, device)
    alone = torch.cat([extract(name, extractor, examples, group[i : i + 1], device) for i in range(len(group))])
    if alone.shape != whole.shape:
        raise _unfit(name, f"gives {list(alone[0].shape)} for one example alone", "give each example the same shape")
    scale = whole.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    allowed = torch.finfo(whole.dtype).eps ** 0.5
    for other, what, remedy in (
        (again, "a second time", "draw and count nothing in a call"),
        (alone, "without the examples beside it", "compute each example by itself, without statistics of a batch"),
    ):
        moved = float(((whole - other).abs().amax() / scale).nan_to_num(torch.inf))
        if moved > allowed:
            raise _unfit(name, f"gives an example other features {what} (by {moved:.2g} of the largest)", remedy)
    after = _state(extractor)
    if changed := [part for part, value in before.items() if not torch.equal(value, after[part])]:
        raise _unfit(name, f"changes {changed[0]!r} in a call", "return it after .eval(), frozen")


def extract(name: str, extractor: Extractor, examples: Examples, rows: Tensor, device: torch.device = CPU) -> Tensor:
    """Features of ``examples`` at ``rows[B]``, as the extractor gives them; ``DataError`` if it gives none.

    The text of that error may tell of an example, so a device keeps it.
    """
    plain = examples
    if examples.mean:
        plain = dataclasses.replace(examples, mean=(0.0,) * len(examples.mean), std=(1.0,) * len(examples.std))
    inputs, _ = plain.batch(rows, device)
    with torch.no_grad():
        try:
            found = extractor(inputs) if isinstance(inputs, Tensor) else extractor(**inputs)
        except DataError:
            raise
        except Exception as error:  # whatever an extractor raises
            said = next(iter(str(error).splitlines()), "")
            raise DataError(f"features={name!r} fails: {type(error).__name__}: {said}") from error
    if not isinstance(found, Tensor) or found.ndim < 2 or len(found) != len(rows) or not found.is_floating_point():
        seen = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        remedy = "return numbers [B, F] or [B, C, ...]"
        raise DataError(f"features={name!r} gives {seen} for {len(rows)} examples; {remedy}")
    return found.detach()


def normalised(features: Tensor, norm: str, groups: int) -> Tensor:
    """``features[B, C, ...]`` by ``norm``, each example by itself, so that nothing is computed from the others.

    "group" is a GroupNorm of ``groups`` groups of channels without weights (Tramer and Boneh, arXiv:2011.11660); "unit"
    divides an example by its L2 norm; "" leaves them. Raises ``SettingError`` for groups that do not fit.
    """
    if norm == "group":
        channels, numbers = features.shape[1], features[0].numel()
        if channels % groups or numbers == groups:
            bound = f"a divisor of {channels}, the channels of the features, with several numbers in each group"
            raise SettingError("features_groups", groups, bound, "1 normalises all numbers of an example together")
        return functional.group_norm(features, groups)
    if norm == "unit":
        return functional.normalize(features.flatten(1), dim=1).view_as(features)
    return features


def _computed(
    config: RunConfig, extractor: Extractor, device: torch.device, examples: Examples, rows: Tensor, split: str
) -> Tensor:
    """float16 features of ``examples`` at ``rows``; ``DataError`` with the row for a number beyond float16."""
    found: Tensor | None = None
    for places in examples.alike(rows):
        part = extract(config.features, extractor, examples, rows[places], device).float()
        part = normalised(part, config.features_norm, config.features_groups).cpu()
        found = torch.empty(len(rows), *part.shape[1:]) if found is None else found
        if part.shape[1:] != found.shape[1:]:
            raise DataError(
                f"features={config.features!r} gives {list(found.shape[1:])} for one example and "
                f"{list(part.shape[1:])} for another; give each the same shape"
            )
        found[places] = part
    assert found is not None
    largest = found.abs().flatten(1).amax(1)
    if len(bad := torch.nonzero(~(largest <= LARGEST))):
        row, value = int(rows[bad[0, 0]]), float(largest[bad[0, 0]])
        said = f"as large as {value:.3g}, above {LARGEST:g}" if LARGEST < value < torch.inf else "NaN or infinite"
        raise DataError(
            f"features={config.features!r} of row {row} of the {split} split are {said}; scale the features, correct "
            "the row, or set features_norm"
        )
    return found.half()


def _parts(
    name: str, splits: Mapping[str, Examples], expected: Tensor, compute: Callable[[Examples, Tensor, str], Tensor]
) -> Iterator[Arrays]:
    """The arrays of a cache, some rows at a time, with a bar on a terminal."""
    console = Console(stderr=True)
    yield {"looked_at": expected.numpy()}
    for split, examples in splits.items():
        chunks = torch.split(torch.arange(len(examples)), ROWS) if len(examples) else ()
        if not chunks:
            yield {split: expected[:0].numpy()}
        said = f"features of {name}, {split}"
        for rows in track(chunks, said, console=console, transient=True, disable=not console.is_terminal):
            yield {split: compute(examples, rows, split).numpy()}


def _check_same(folder: Path, stored: Tensor, expected: Tensor) -> None:
    """Raise ``DataError`` if the extractor now gives other features than ``stored``: code that it imports changed."""
    now, before = expected.float(), stored.float()
    if now.shape != before.shape or (now - before).abs().amax() > 0.01 * now.abs().amax():
        raise DataError(
            f"{folder} has other features than the extractor gives now, so code that its file imports has changed; "
            "delete that folder"
        )


def _contents(examples: Examples) -> str:
    """SHA-256 of all inputs."""
    found = hashlib.sha256()
    for name, leaf in examples.leaves.items():
        tensors = [leaf] if isinstance(leaf, Tensor) else [leaf.values, leaf.offsets]
        if isinstance(leaf, Sequences):
            found.update(json.dumps([leaf.max_length, leaf.padding]).encode())
        for tensor in tensors:
            found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
            rows = max(1, CHUNK_BYTES * len(tensor) // max(1, tensor.nbytes))
            for part in torch.split(tensor, rows) if len(tensor) else ():
                found.update(np.ascontiguousarray(part.numpy()).data)
    return found.hexdigest()


def _state(extractor: Extractor) -> dict[str, Tensor]:
    """Parameters and buffers by name, also those that a state dict leaves out; empty for a function."""
    if not isinstance(extractor, nn.Module):
        return {}
    return {**dict(extractor.named_parameters()), **dict(extractor.named_buffers())}


def _sha256(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _unfit(name: str, seen: str, remedy: str) -> plugins.PluginError:
    return plugins.PluginError(f"features={name!r} {seen}; {remedy}")
