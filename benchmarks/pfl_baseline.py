"""pfl-research's own cifar10_iid baseline, rebuilt from its public API, as a contestant that takes turns.

``python -m benchmarks.pfl_baseline DATA.npz COHORT ROUNDS none|local|central``, run by a Python that has
``pfl[pytorch]``; nothing of fed_dpsat is imported. ``DATA.npz`` holds normalised ``inputs[N, 3, 32, 32]`` and
``labels[N]``.

Setting and callbacks are those of ``benchmarks/image_classification`` (``configs/baseline.yaml``, ``pytorch/train.py``)
of apple/pfl-research: 50 examples a user, local batch 10, one local epoch at learning rate 0.1, users weighted
equally, central SGD at 1.0, FedAvg. ``local``: Gaussian mechanism on each user's update, clipped to 0.4, noise 1;
``central``: the same clipping, and noise 0.01 once, on the sum, by the server.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByUser
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.aggregate_metrics_to_disk import AggregateMetricsToDisk
from pfl.callback.base import TrainingProcessCallback
from pfl.callback.central_evaluation import CentralEvaluationCallback
from pfl.callback.stopwatch import StopwatchCallback
from pfl.callback.track_best_overall_metrics import TrackBestOverallMetrics
from pfl.data import ArtificialFederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.data.sampling import get_data_sampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from pfl.privacy.gaussian_mechanism import GaussianMechanism
from pfl.privacy.privacy_mechanism import CentrallyAppliedPrivacyMechanism
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.turns import Turn, turn_from_stdin

EXAMPLES_PER_USER, TEST_EXAMPLES = 50, 500


class Measured(nn.Sequential):
    """Layers, with the loss and the metrics that pfl asks of a module."""

    def loss(self, inputs: Tensor, targets: Tensor, eval: bool = False) -> Tensor:
        """Mean cross-entropy."""
        self.train(not eval)
        return functional.cross_entropy(self(inputs), targets)

    @torch.no_grad()
    def metrics(self, inputs: Tensor, targets: Tensor, eval: bool = True) -> dict[str, Weighted]:
        """Loss and accuracy."""
        self.train(not eval)
        outputs = self(inputs)
        loss = functional.cross_entropy(outputs, targets, reduction="sum").item()
        correct = (outputs.argmax(1) == targets).sum().item()
        return {"loss": Weighted(loss, len(inputs)), "accuracy": Weighted(correct, len(inputs))}


def cnn() -> Measured:
    """``pfl_cnn`` of ``benchmarks.rounds_plugins``."""
    layers = [nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25)]
    layers += [nn.Flatten(), nn.Linear(12544, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10)]
    for layer in layers:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
    return Measured(*layers)


class TakeTurns(TrainingProcessCallback[Any]):
    """Ready before the first central iteration and after each."""

    def __init__(self, turn: Turn) -> None:
        self._turn = turn

    def on_train_begin(self, *, model: Any) -> Metrics:
        self._turn()
        return Metrics()

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: Any, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        self._turn()
        return False, Metrics()


def train(
    data: Path,
    cohort: int,
    rounds: int,
    noise: str,
    turn: Turn,
    *,
    module: Measured,
    examples_per_user: int = EXAMPLES_PER_USER,
    batch_size: int = EXAMPLES_PER_USER // 5,
    local_steps: int | None = None,
    clipping_bound: float = 0.4,
) -> None:
    """``rounds`` central iterations of ``cohort`` users; without ``local_steps`` one local epoch each."""
    arrays = np.load(data)
    inputs, labels = torch.from_numpy(arrays["inputs"]), torch.from_numpy(arrays["labels"])
    users = ArtificialFederatedDataset.from_slices(
        [inputs, labels],
        get_data_sampler("random", len(labels)),
        lambda: examples_per_user,
        create_dataset_fn=PyTorchTensorDataset,
    )
    model = PyTorchModel(
        model=module,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(module.parameters(), 1.0),
    )
    gaussian = GaussianMechanism(clipping_bound=clipping_bound, relative_noise_stddev=1.0 if noise == "local" else 0.01)
    private = {"none": [], "local": [gaussian], "central": [CentrallyAppliedPrivacyMechanism(gaussian)]}[noise]
    backend = SimulatedBackend(training_data=users, val_data=users, postprocessors=[WeightByUser(), *private])
    test = PyTorchTensorDataset((inputs[:TEST_EXAMPLES], labels[:TEST_EXAMPLES]))
    with tempfile.TemporaryDirectory() as folder:
        FederatedAveraging().run(
            algorithm_params=NNAlgorithmParams(
                central_num_iterations=rounds,
                evaluation_frequency=10,
                train_cohort_size=cohort,
                val_cohort_size=0,
            ),
            backend=backend,
            model=model,
            model_train_params=NNTrainHyperParams(
                local_learning_rate=0.1,
                local_num_epochs=None if local_steps else 1,
                local_num_steps=local_steps,
                local_batch_size=batch_size,
            ),
            model_eval_params=NNEvalHyperParams(local_batch_size=10000),
            callbacks=[
                StopwatchCallback(),
                CentralEvaluationCallback(
                    test, model_eval_params=NNEvalHyperParams(local_batch_size=10000), frequency=10
                ),
                AggregateMetricsToDisk(str(Path(folder) / "metrics.csv")),
                TrackBestOverallMetrics(higher_is_better_metric_names=["Central val | accuracy"]),
                TakeTurns(turn),
            ],
        )


if __name__ == "__main__":
    torch.manual_seed(0)
    np.random.seed(0)  # pfl draws users from the global generator
    torch.set_num_threads(1)
    train(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], turn_from_stdin(), module=cnn())
