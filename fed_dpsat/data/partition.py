"""Partitions of the training split among simulated clients by number and by class.

A partition returns ``num_clients`` sorted int64 index arrays. They are disjoint, not empty, and together cover
``0..N-1``. Equal arguments give equal partitions. All but ``iid`` use the partitioners of flwr-datasets on examples in
a seeded random order, so that the seed decides which examples a client gets and not only how many; ``iid`` gives the
same result without a call per client.

========= =========================== ===================================================
name      class of flwr-datasets      own
========= =========================== ===================================================
iid       ``IidPartitioner``          sizes differ by at most one
dirichlet ``DirichletPartitioner``    an empty client gets an example of the largest
shards    ``ShardPartitioner``        no example is left over
size-skew ``SizePartitioner``         sizes by a power law
========= =========================== ===================================================

Those that divide by class take ``labels[N]`` (int64), the others ``num_examples``. Each raises ``DataError`` for
``num_clients`` outside ``[1, N]``, for a setting out of bounds, and for labels that are not classes.
"""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING

import numpy as np

from fed_dpsat.errors import DataError

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner  # type: ignore[import-untyped]

BY = "by"
"""The column by which a partitioner of flwr-datasets divides."""
MAX_ALPHA = 1e6  # above it the draw is uniform up to rounding, and far above it overflows


def iid(num_examples: int, num_clients: int, seed: int) -> list[np.ndarray]:
    """Equal shares of the shuffled examples; sizes differ by at most one."""
    order, _ = begin(num_examples, num_clients, seed)
    return _finish(np.array_split(order, num_clients), num_examples)


def dirichlet(labels: np.ndarray | None, num_clients: int, seed: int, dirichlet_alpha: float = 0.3) -> list[np.ndarray]:
    """Each class divided by its own Dirichlet(dirichlet_alpha) draw; lower is more uneven.

    ``dirichlet_alpha`` is in ``(0, 1e6]``. In the order of clients, an empty client takes one example from the largest
    client at that moment (the first of equals). flwr-datasets instead draws again until no client is empty, which fails
    at 1,000 clients and alpha 0.1.

    Source: Yurochkin et al., "Bayesian Nonparametric Federated Learning of Neural Networks",
    arXiv:1905.12022, section 4; sizes are not balanced.
    """
    from flwr_datasets.partitioner import DirichletPartitioner

    if not 0 < dirichlet_alpha <= MAX_ALPHA:
        raise DataError(
            f"dirichlet_alpha={dirichlet_alpha} is not in (0, {MAX_ALPHA:g}]; 0.1 is very "
            f"uneven, 100 nearly even, and partition=iid is even"
        )
    labels = classes(labels, "dirichlet")
    order, flwr_seed = begin(len(labels), num_clients, seed)
    partitioner = DirichletPartitioner(
        num_clients,
        BY,
        float(dirichlet_alpha),
        min_partition_size=0,
        self_balancing=False,
        shuffle=False,
        seed=flwr_seed,
    )
    return _finish(_fill_empty(divide(partitioner, order, labels)), len(labels))


def shards(labels: np.ndarray | None, num_clients: int, seed: int, classes_per_client: int = 2) -> list[np.ndarray]:
    """Examples sorted by class, cut into equal shards; classes_per_client shards for each client.

    A shard has one class, except at the border of two classes. So a client holds about ``classes_per_client`` classes:
    fewer if it draws two shards of one class, more if a shard spans a border. ``classes_per_client`` is in
    ``[1, number of classes]``, and ``num_clients * classes_per_client`` is at most N.

    A shard has ``N // (num_clients * classes_per_client)`` examples. The remaining examples, drawn at random, go one by
    one to the smallest client that holds their class, or to the smallest client if none holds it.

    Source: McMahan et al., "Communication-Efficient Learning of Deep Networks", arXiv:1602.05629, section 3.
    """
    from flwr_datasets.partitioner import ShardPartitioner

    labels = classes(labels, "shards")
    order, flwr_seed = begin(len(labels), num_clients, seed)
    num_classes = len(np.unique(labels))
    if not 1 <= classes_per_client <= num_classes:
        raise DataError(
            f"classes_per_client={classes_per_client} is not in [1, {num_classes}], the number "
            f"of classes; choose one of these"
        )
    num_shards = num_clients * classes_per_client
    if num_shards > len(labels):
        raise DataError(
            f"classes_per_client={classes_per_client} for num_clients={num_clients} makes "
            f"{num_shards} shards, more than the {len(labels)} examples; lower one of them"
        )
    left_over, order = np.split(order, [len(labels) % num_shards])
    partitioner = ShardPartitioner(
        num_clients, BY, num_shards_per_partition=classes_per_client, shuffle=False, seed=flwr_seed
    )
    return _finish(_deal(left_over, labels, divide(partitioner, order, labels)), len(labels))


def size_skew(num_examples: int, num_clients: int, seed: int, size_skew: float = 1.0) -> list[np.ndarray]:
    """Shuffled examples in shares of decreasing size: the share of client i is proportional to (i + 1) ** -size_skew.

    ``size_skew`` is in ``[0, inf)``: 0 gives equal sizes, 1 gives client 1 half the examples of client 0 (Zipf's law).
    Each client gets one example, and largest remainders apportion the rest, so no client is empty.
    """
    from flwr_datasets.partitioner import SizePartitioner

    order, _ = begin(num_examples, num_clients, seed)
    if not 0 <= size_skew < math.inf:
        raise DataError(f"size_skew={size_skew} is not in [0, inf); 0 is equal sizes, 1 is Zipf's law")
    weights = np.arange(1, num_clients + 1, dtype=np.float64) ** -float(size_skew)
    quotas = (num_examples - num_clients) * weights / weights.sum()
    sizes = 1 + np.floor(quotas).astype(np.int64)
    by_remainder = np.argsort(-(quotas % 1), kind="stable")
    sizes[by_remainder[: num_examples - sizes.sum()]] += 1
    return _finish(divide(SizePartitioner(sizes.tolist()), order), num_examples)


PARTITIONS = {"iid": iid, "dirichlet": dirichlet, "shards": shards, "size-skew": size_skew}


def begin(num_examples: int, num_clients: int, seed: int) -> tuple[np.ndarray, int]:
    """A random order of the examples and a seed for flwr-datasets, both from ``seed``."""
    if not 1 <= num_clients <= num_examples:
        raise DataError(
            f"num_clients={num_clients} is not in [1, {num_examples}], the number of training "
            f"examples; choose one of these or take a larger dataset"
        )
    if seed < 0:
        raise DataError(f"seed={seed} is negative; choose one in [0, inf)")
    for_order, for_flwr = np.random.SeedSequence(seed).spawn(2)
    return np.random.default_rng(for_order).permutation(num_examples), int(for_flwr.generate_state(1)[0])


def classes(labels: np.ndarray | None, partition: str) -> np.ndarray:
    """``labels``, after a check that they are class numbers ``[N]``."""
    if labels is None:
        raise DataError(
            f"partition={partition!r} divides by class, and the labels of this data set are not classes; "
            "choose natural (by a column), iid or size-skew"
        )
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"labels are {labels.dtype} {list(labels.shape)}, not int64 [N]; give class numbers")
    return labels


def divide(partitioner: Partitioner, order: np.ndarray, by: np.ndarray | None = None) -> list[np.ndarray]:
    """The parts that a partitioner of flwr-datasets makes from the examples in ``order``, by their values ``by[N]``."""
    import datasets  # type: ignore[import-untyped]

    columns = {} if by is None else {BY: by[order]}
    partitioner.dataset = datasets.Dataset.from_dict({**columns, "example": order})
    with warnings.catch_warnings():
        # ShardPartitioner sorts with datasets 4.8, for which pyarrow 26 warns
        warnings.filterwarnings("ignore", "Specifying null_placement", FutureWarning)
        parts = [partitioner.load_partition(client) for client in range(partitioner.num_partitions)]
    return [np.asarray(part["example"][:], dtype=np.int64) for part in parts]


def _fill_empty(parts: list[np.ndarray]) -> list[np.ndarray]:
    sizes = np.array([len(part) for part in parts])
    for client in np.flatnonzero(sizes == 0):
        donor = int(sizes.argmax())
        parts[client], parts[donor] = parts[donor][-1:], parts[donor][:-1]
        sizes[client], sizes[donor] = 1, sizes[donor] - 1
    return parts


def _deal(left_over: np.ndarray, labels: np.ndarray, parts: list[np.ndarray]) -> list[np.ndarray]:
    sizes = np.array([len(part) for part in parts])
    held = [set(labels[part].tolist()) for part in parts]
    holders = {
        label: np.array([client for client, classes in enumerate(held) if label in classes])
        for label in np.unique(labels).tolist()
    }
    dealt: list[list[int]] = [[] for _ in parts]
    for example in left_over.tolist():
        candidates = holders[int(labels[example])]
        if not len(candidates):
            candidates = np.arange(len(parts))
        client = int(candidates[sizes[candidates].argmin()])
        dealt[client].append(example)
        sizes[client] += 1
    return [np.concatenate([part, np.array(extra, dtype=np.int64)]) for part, extra in zip(parts, dealt, strict=True)]


def _finish(parts: list[np.ndarray], num_examples: int) -> list[np.ndarray]:
    """Sorted parts, after a check that they are a partition, because the guarantee depends on it."""
    together = np.sort(np.concatenate(parts))
    if not all(map(len, parts)) or not np.array_equal(together, np.arange(num_examples)):
        raise DataError(
            f"flwr-datasets divided {num_examples} examples into parts that overlap, are empty "
            f"or leave some out; report this with the installed version of flwr-datasets"
        )
    return [np.sort(part) for part in parts]
