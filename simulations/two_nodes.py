"""Two Ray nodes on one machine: a run joins a cluster that is there, spreads its workers, and leaves it running.

Claim: ``simulations/digits_dpsat.toml`` gives the same bits on a worker of each of two nodes as in one process.
Command: ``python -m simulations.two_nodes`` (seed 0, n = 1, no data to download; epsilon 3 at delta 1e-4)

On several hosts the nodes are started by hand, and the rest is the same; see docs/scale.md.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import torch
from ray.cluster_utils import Cluster

from fed_dpsat.settings.config import RunConfig
from fed_dpsat.simulation import simulate

CONFIG = Path(__file__).with_name("digits_dpsat.toml")


def main() -> None:
    """Start two nodes, run on them and in process, compare."""
    config = RunConfig.load(CONFIG)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        with tempfile.TemporaryDirectory() as folder:
            on_nodes = dataclasses.replace(config, workers=2, ray_address=cluster.address)
            summary = simulate(on_nodes, Path(folder, "nodes"))
            simulate(config, Path(folder, "here"))
            models = [
                torch.load(Path(folder, name, "checkpoint", "model.pt"), weights_only=True)["params"]
                for name in ("nodes", "here")
            ]
        same = all(torch.equal(models[0][name], models[1][name]) for name in models[1])
        print(
            f"{len(cluster.list_all_nodes())} nodes at {cluster.address}, 2 workers: {summary['test_accuracy']:.1%} at"
        )
        print(f"epsilon {summary['epsilon']:.2f}; bits {'the same as' if same else 'OTHER than'} in one process")
        if not same:
            raise SystemExit(1)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
