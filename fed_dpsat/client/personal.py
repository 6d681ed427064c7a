"""Private heads: parameters that a client keeps in its own state and never sends, so that no server averages them.

Source: Arivazhagan et al. 2019, "Federated Learning with Personalization Layers" (arXiv 1912.00818): the base is
shared, the last layers are each client's, and both are trained together.

The gradient of the WHOLE model is clipped and noised together, though only a part of it leaves: the body's next release
is taken at the head's value, so it is an adaptive composition of private releases only if the head is one too.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from fed_dpsat.client.evaluation import worst_decile
from fed_dpsat.errors import SettingError
from fed_dpsat.models.ties import layer_of
from fed_dpsat.params import Params
from fed_dpsat.tasks.metric import Metric

PERSONAL = "personal"
"""The key of a client's own parameters in its state."""


def personal_names(params: Params, personal_layers: str, tensors: Mapping[str, str] | None = None) -> frozenset[str]:
    """The names of ``params`` that stay on the client. ``tensors`` has all their names (``ties.named_tensors``).

    =============== ==================================================================
    personal_layers the client's own
    =============== ==================================================================
    ""              nothing
    "head"          the last layer that has trained parameters
    "3, 0.bias"     those parameters, and all of layers of those names, as in ``params``
    =============== ==================================================================

    A tensor that another layer uses too stays with it.
    Raises ``SettingError`` for an unknown name, or if no parameter is left to share.
    """
    wanted = [name.strip() for name in personal_layers.split(",") if name.strip()]
    tensors = {name: first for name, first in (tensors or {n: n for n in params}).items() if first in params}
    if wanted == ["head"]:
        wanted = [layer_of(list(tensors)[-1]) or list(tensors)[-1]]
    found: set[str] = set()
    for name in wanted:
        matches = {first for key, first in tensors.items() if key == name or key.startswith(f"{name}.")}
        if not matches:
            layers = list(dict.fromkeys(layer_of(key) or key for key in tensors))
            near = difflib.get_close_matches(name, [*layers, *tensors], n=3) or layers[-3:]
            raise SettingError(
                "personal_layers",
                personal_layers,
                f"made of layers of the model: it has no {name!r}",
                f"did you mean {', '.join(near)}? 'head' is the last one",
            )
        found |= matches
    if not params:
        raise SettingError(
            "model",
            "without a parameter that learns",
            "a network with parameters to train",
            "call requires_grad_(True) on those, or choose other train_layers",
        )
    if found >= params.keys():
        raise SettingError(
            "personal_layers",
            personal_layers,
            "a part of the model: nothing would be left to share",
            "leave out a layer; a model of one layer has no head of its own",
        )
    return frozenset(found)


def without(params: Params, names: Collection[str]) -> Params:
    """``params`` but for ``names``, in order."""
    return {name: p for name, p in params.items() if name not in names}


def only(params: Params, names: Collection[str]) -> Params:
    """Those of ``params`` that are among ``names``, in order."""
    return {name: p for name, p in params.items() if name in names}


def deal_test(
    train_labels: np.ndarray, test_labels: np.ndarray, partitions: Sequence[np.ndarray], seed: int
) -> list[np.ndarray]:
    """Each client's share of the public test split, as sorted indices; disjoint, and empty for some if it is small.

    The test examples of a class are dealt in proportion to the training examples of that class that each client holds,
    by largest remainders, ties and examples by ``seed``. So a share has the labels of its client's data, whatever the
    partition, and depends on their counts. No client gets a class without training examples.
    """
    generator = np.random.default_rng(seed)
    counts = np.stack([np.bincount(train_labels[part], minlength=_classes(train_labels)) for part in partitions])
    shares: list[list[np.ndarray]] = [[] for _ in partitions]
    for label in range(counts.shape[1]):
        examples = generator.permutation(np.flatnonzero(test_labels == label))
        held = counts[:, label]
        if not held.sum():
            continue
        quotas = len(examples) * held / held.sum()
        sizes = np.floor(quotas).astype(np.int64)
        by_remainder = np.lexsort((generator.random(len(held)), -(quotas - sizes)))
        sizes[by_remainder[: len(examples) - sizes.sum()]] += 1
        for share, dealt in zip(shares, np.split(examples, np.cumsum(sizes)[:-1]), strict=True):
            share.append(dealt)
    return [np.sort(np.concatenate(share)) for share in shares]


def summarised(values: Mapping[int, float], metric: Metric) -> dict[str, float | int]:
    """Mean and worst decile of the ``metric`` of clients' own models, and their number: for ``rounds.jsonl``.

    Nothing for no value, which is so if the metric is undefined on the share of each client.
    """
    found = list(values.values())
    if not found:
        return {}
    sign = 1 if metric.higher_is_better else -1
    return {
        f"personal_{metric.name}": sum(found) / len(found),
        "personal_worst_decile": sign * worst_decile([sign * value for value in found]),
        "personal_clients": len(found),
    }


def _classes(labels: np.ndarray) -> int:
    return int(labels.max()) + 1
