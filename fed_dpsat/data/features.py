"""Features in the place of inputs: a public, frozen extractor sees each example once, and a cache has the result."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from fed_dpsat import plugins
from fed_dpsat.data.cache import Arrays, cached_parts
from fed_dpsat.data.dataset import Dataset, Examples
from fed_dpsat.data.extractor import Extractor, check_extractor, extract, normalised, state_of
from fed_dpsat.data.made_up import made_up_examples
from fed_dpsat.data.sequences import Sequences
from fed_dpsat.errors import DataError, SettingError
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.step import generators
from fed_dpsat.step.placement import CPU, torch_device

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
    folder = Path(config.cache_dir).expanduser().absolute() / f"{dataset.name.replace('/', '-')}-features-{key[:16]}"
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
    for name, value in state_of(extractor).items():
        found.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


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


def _sha256(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
