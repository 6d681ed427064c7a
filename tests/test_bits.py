"""A seed gives the model, ledger and lines of before, bit for bit: what a change to the code does not mean to change.

The hashes hold for one arithmetic: processors and releases of torch round differently. A change that is meant puts
the new hashes here and says so in its commit. That workers, a resumed run and an interrupted one give the bits of these
runs is tested in ``tests/simulation``; a device's noise is secret and never repeats.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from itertools import groupby

import pytest
import torch
from torch.nn import functional as F

from fed_dpsat.accounting import chain
from fed_dpsat.accounting.packed import unpack
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.simulation import simulate
from fed_dpsat.step.gradients import compiled

ARITHMETIC = "04c84eef059a"
COMMON = {"num_rounds": 3, "noise_multiplier": 1.0, "delta": 1e-4, "num_clients": 6, "local_steps": 2, "seed": 3}
RUNS = {
    "digits": ({}, "6d60e5dc1c87"),
    "convolutions": ({"model": "tanh-cnn-small", "num_clients": 3, "sample_rate": 0.1}, "52e3fff6549a"),
    "stacked": ({"stack_clients": 3, "model": "mlp"}, "889361149569"),
    "client-level": ({"privacy_unit": "client", "optimizer": "dp-sgd"}, "89b56178bda0"),
    "secure-aggregation": ({"secure_aggregation": True, "num_rounds": 2}, "95302fe440b0"),
    "buffered": ({"buffer_size": 2, "delay": "lognormal", "clients_per_round": 4}, "4554cbc50620"),
    "poisson-cohorts": ({"client_sampling": "poisson", "clients_per_round": 3}, "0a4bbc8dd576"),
    "adaptive-clipping": ({"clipping": "adaptive", "model": "mlp"}, "be53ff4022f6"),
    "personal-layers": ({"model": "mlp", "personal_layers": "head"}, "3253551b195f"),
    "momentum": ({"model": "mlp", "optimizer": "dp-sat-momentum", "momentum": 0.5}, "da95a34235ea"),
    "top-k": (
        {"privacy_unit": "client", "optimizer": "dp-sgd", "update_codec": "top-k", "keep_share": 0.2},
        "7c822545becf",
    ),
    "budgets": (
        {"noise_multiplier": 2.0, "target_epsilon": 3.0, "budget_mode": "retire", "num_rounds": 4},
        "0dc80b358507",
    ),
    "attack": ({"attack": "sign-flip", "attackers": 0.3, "strategy": "trimmed"}, "40b29898ef09"),
    "kalman": ({"strategy": "kalman"}, "148557ef28e5"),
    "random-freeze": ({"optimizer": "random-freeze", "model": "mlp"}, "95330b0fe421"),
    "zeroth-order": ({"optimizer": "zeroth-order"}, "c9721e336b8a"),
    "dp-sgd": ({"optimizer": "dp-sgd", "model": "mlp"}, "fe2d3e39e303"),
    "dp-sam": ({"optimizer": "dp-sam", "model": "mlp"}, "7496dec8c53a"),
    "adam": ({"optimizer": "adam", "model": "mlp"}, "340020e42151"),
    "dplis": ({"optimizer": "dplis", "model": "mlp"}, "5c847921ec9f"),
    "disk": ({"optimizer": "disk", "model": "mlp"}, "32c36ff008c5"),
    "extrapolated": ({"optimizer": "extrapolated", "model": "mlp"}, "2a6bca301888"),
    "modelmix": ({"optimizer": "modelmix", "model": "mlp"}, "c02f78204cef"),
    "saf": ({"optimizer": "saf", "model": "mlp"}, "a5720fadb565"),
    "sat-over-adam": ({"optimizer": "dp-sat", "base_optimizer": "adam", "model": "mlp"}, "9ba33b04d3e2"),
    "freeze-over-momentum": (
        {"optimizer": "random-freeze", "base_optimizer": "dp-sgd", "momentum": 0.5, "model": "mlp"},
        "fd5d3ea999b5",
    ),
    "stacked-momentum": (
        {"stack_clients": 3, "model": "mlp", "optimizer": "dp-sat-momentum", "momentum": 0.5},
        "702ef0d51c96",
    ),
    "stacked-adam": ({"stack_clients": 3, "model": "mlp", "optimizer": "adam"}, "95415673dfdf"),
    "per-layer": ({"clipping": "per-layer", "model": "mlp"}, "602da315458e"),
    "fedadam": ({"strategy": "flwr.serverapp.strategy:FedAdam", "model": "mlp"}, "f3d3855bacca"),
    "fedmedian": ({"strategy": "flwr.serverapp.strategy:FedMedian"}, "87d68e59c81d"),
    "ordinary": ({"private": False, "noise_multiplier": 0.0, "optimizer": "dp-sgd", "clip_norm": 1.0}, "02fd65825064"),
}


def arithmetic() -> str:
    """How this machine rounds what runs compute."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(8, 16, 8, 8, generator=generator) for _ in range(2))
    flat = x.flatten(1)
    parts = [
        flat @ w.flatten(1).T,
        flat.T @ flat,
        F.conv2d(x, w[:, :, :3, :3]),
        x.tanh(),
        x.softmax(1),
        x.exp().sum((0, 2)),
    ]
    found = hashlib.sha256(f"{torch.__version__} {compiled.decided('auto')}".encode())
    for part in parts:
        found.update(part.contiguous().numpy().tobytes())
    return found.hexdigest()[:12]


def by_client(file, table) -> list[tuple]:
    """The rows of ``table`` with a row for each client of a row, chained again."""
    rows, last = [], chain.GENESIS
    stored = file.execute(f"SELECT {chain.COLUMNS[table]} FROM {table} ORDER BY seq")
    for _, same in groupby(stored, key=lambda row: row[1:3]):
        for row in sorted((client, *rest) for clients, *rest in same for client in unpack(clients).tolist()):
            last = chain.link(last, (len(rows) + 1, *row))
            rows.append((len(rows) + 1, *row, last))
    return rows


def bits(folder) -> str:
    """Of the final model, of what was charged and came of it, and of all lines."""
    found = hashlib.sha256()
    model = torch.load(folder / "checkpoint" / "model.pt", weights_only=True)["params"]
    for name, value in model.items():
        found.update(name.encode() + value.numpy().tobytes())
    with sqlite3.connect(folder / "ledger.sqlite") as file:
        for table in ("charges", "outcomes"):
            found.update(repr(by_client(file, table)).encode())
    for line in (folder / "rounds.jsonl").read_text().splitlines():
        found.update(json.dumps(json.loads(line), sort_keys=True).encode())
    return found.hexdigest()[:12]


@pytest.mark.by_default(
    "digits",
    "convolutions",
    "stacked",
    "client-level",
    "secure-aggregation",
    "buffered",
    "adaptive-clipping",
    "personal-layers",
    "budgets",
    "kalman",
    "zeroth-order",
    "freeze-over-momentum",
)
@pytest.mark.parametrize("name", RUNS)
def test_a_seed_gives_the_bits_of_before(name, tmp_path, untried):
    if arithmetic() != ARITHMETIC:
        pytest.skip(f"this machine rounds otherwise ({arithmetic()}) than where the hashes were taken ({ARITHMETIC})")
    settings, expected = RUNS[name]
    simulate(RunConfig(**{**COMMON, **settings}), tmp_path / "run")
    assert bits(tmp_path / "run") == expected
