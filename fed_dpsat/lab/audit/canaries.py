"""An audit in one run: a fair coin includes each canary, and an attack guesses the coins.

Steinke, Nasr and Jagielski 2023 (arXiv 2305.08846), Algorithm 1. The whole federation of a configuration trains, with
the included canaries in the data of one client. There are two attackers:

============ =========================================================== ==========================================
name         a canary is                                                 its score is
============ =========================================================== ==========================================
gradient     an example whose gradient is one coordinate (per layer, if  the likelihood ratio of all private
             the rule clips per layer), clipped to the bound             gradients of the client, if the attacker
                                                                         knows all its other examples
mislabelled  a public test image with a wrong label                      the decrease of its loss over all global
                                                                         models
============ =========================================================== ==========================================

The attack guesses "in" for the k highest scores and "out" for the k lowest, for several fixed shares k. The best share
counts, at a confidence corrected for the number of shares (Bonferroni).
"""

from __future__ import annotations

import copy
import dataclasses
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fed_dpsat.accounting import PrivacyLedger, epsilon
from fed_dpsat.accounting.plans import make_plans
from fed_dpsat.client.build import Experiment
from fed_dpsat.client.half import with_half
from fed_dpsat.data.dataset import Dataset, Examples
from fed_dpsat.errors import SettingError
from fed_dpsat.flower.federation import run_federation
from fed_dpsat.lab.audit.bounds import best_one_run_epsilon, check_confidence
from fed_dpsat.lab.audit.scores import log_likelihood_ratio
from fed_dpsat.params import Params
from fed_dpsat.run.folder import RunFolder
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.simulation import simulation_grid
from fed_dpsat.step.clipping import ClippingRule
from fed_dpsat.step.examples import Examples as Batch
from fed_dpsat.step.gradients.per_example import LossFn, ModelLoss, clipped_gradient_sum
from fed_dpsat.step.optimizers.chain import split_chain
from fed_dpsat.step.query import At, spread

ATTACKS = ("gradient", "mislabelled")
SHARES = (1.0, 0.5, 0.25, 0.1, 0.05)
"""Shares of the canaries with a guess; the confidence is corrected for the number of shares."""

AUDIT = "an audit with canaries"
"""What needs images with a class, in errors."""

UNREAD = frozenset({"saf", "zeroth-order"})
"""Optimizers without gradient canaries: their loss depends on outputs, or they release one number."""


@dataclass(frozen=True, kw_only=True)
class OneRunAudit:
    """``epsilon_lower`` holds with ``confidence`` for ``client``; the ledger charged it ``epsilon_ledger``."""

    attack: str
    epsilon_lower: float
    epsilon_ledger: float
    delta: float
    confidence: float
    client: int
    canaries: int
    included: int
    guesses: int
    correct: int
    shares_tried: int
    steps: int

    @property
    def broken(self) -> bool:
        """Whether the lower bound is above the epsilon of the ledger."""
        return self.epsilon_lower > self.epsilon_ledger


def audit_one_run(
    config: RunConfig, *, attack: str = "gradient", canaries: int = 500, confidence: float = 0.95, seed: int = 0
) -> OneRunAudit:
    """Train the federation of ``config`` once with canaries and attack it; ``seed`` draws the coins.

    Clients train one after the other in this process. Raises ``SettingError`` for an unknown attack, and for more
    canaries than coordinates of the model (gradient) or images of the test split (mislabelled).
    """
    check_confidence(confidence)
    if attack not in ATTACKS:
        raise SettingError("attack", attack, f"one of {', '.join(ATTACKS)}", "choose one of those")
    check_unit(config)
    if attack == "gradient" and (unread := UNREAD & {config.optimizer, *split_chain(config.base_optimizer)}):
        raise SettingError(
            "optimizer",
            min(unread),
            "an optimizer with a gradient of the loss of each single example",
            "use audit --game alone",
        )
    if attack == "gradient" and config.unfreeze_round:
        raise SettingError("unfreeze_round", config.unfreeze_round, "0 in an audit", "audit each part alone")
    if canaries < 20:
        raise SettingError("canaries", canaries, "at least 20", "few guesses show nothing; 500 is usual")
    config = one_process(config)
    experiment = Experiment.build(config)
    client = costliest_client(config)
    generator = np.random.default_rng([seed, 0xCA7A27])
    coins = generator.random(canaries) < 0.5
    run = _gradient_scores if attack == "gradient" else _mislabelled_scores
    scores, spent, steps = run(experiment, client, coins, generator)
    tries = [_right(scores, coins, int(share * canaries) // 2) for share in SHARES]
    lower, best = best_one_run_epsilon(canaries, tries, config.delta, confidence)
    return OneRunAudit(
        attack=attack,
        epsilon_lower=lower,
        epsilon_ledger=spent,
        delta=config.delta,
        confidence=confidence,
        client=client,
        canaries=canaries,
        included=int(coins.sum()),
        guesses=tries[best][0],
        correct=tries[best][1],
        shares_tried=len(SHARES),
        steps=steps,
    )


def one_process(config: RunConfig) -> RunConfig:
    """``config`` for clients that train one after the other in this process, on the CPU."""
    here: dict[str, Any] = {"workers": 0, "ray_address": "", "gpus_per_worker": 0.0, "device": "cpu"}
    return dataclasses.replace(config, **here, stack_clients=1, out="", resume=False, profile=False)


def check_unit(config: RunConfig) -> None:
    """Raise ``SettingError`` for a run that is not private, or whose privacy unit is the client."""
    if config.privacy_unit != "example":
        raise SettingError("privacy_unit", config.privacy_unit, "'example' for canaries", "play the game alone: --game")
    check_private(config)


def check_private(config: RunConfig) -> None:
    """Raise ``SettingError`` for a run without a guarantee, or with a client's half, which no game plays."""
    if not config.private:
        raise SettingError(
            "private", config.private, "true in an audit", "epsilon is infinite; there is no guarantee to test"
        )
    if with_half(config).local_models:
        remedy = "audit its optimizer with strategy=fedavg: a half sees only what that releases"
        raise SettingError("strategy", config.strategy, "one of the server alone in an audit", remedy)


def costliest_client(config: RunConfig) -> int:
    """The client with the costliest round by its plan, the first of several."""
    plans = make_plans(config)
    return int(np.argmax([epsilon([plan.event], config.delta, config.accountant) for plan in plans]))


def train(experiment: Experiment, client: int | None, folder: RunFolder, on_round: Any = None) -> float:
    """Run the federation; returns the epsilon of ``client`` in its ledger, or the maximum over clients."""
    config = experiment.config
    with simulation_grid(experiment, None, folder) as grid:
        run_federation(grid, experiment, folder, on_round=on_round, objects=["experiment of an audit"])
    with PrivacyLedger(folder.ledger_path, readonly=True) as ledger:
        spent: dict[int, float] = ledger.epsilon_by_client(config.delta, config.accountant)
    return float(max(spent.values(), default=0.0) if client is None else spent.get(client, 0.0))


def _right(scores: NDArray[np.float64], coins: NDArray[np.bool_], k: int) -> tuple[int, int]:
    """``(guesses, correct)`` for the guess "in" on the ``k`` highest scores and "out" on the ``k`` lowest."""
    order = np.argsort(scores, kind="stable")
    out, into = order[:k], order[len(order) - k :]
    return 2 * k, int((~coins[out]).sum() + coins[into].sum())


# gradient canaries


@dataclass(frozen=True, kw_only=True)
class CanaryCriterion:
    """``criterion`` on the first ``num_classes`` outputs; for a higher target, the output with that number."""

    criterion: Callable[[Tensor, Tensor], Tensor]
    num_classes: int

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """``outputs[B, K + m], targets[B] -> losses[B]``."""
        ordinary = self.criterion(outputs[:, : self.num_classes], targets.clamp(max=self.num_classes - 1))
        canary = outputs.gather(1, targets.clamp(min=self.num_classes)[:, None])[:, 0]
        return torch.where(targets >= self.num_classes, canary, ordinary)


def canary_loss(loss: ModelLoss, params: Params, num_classes: int, coordinates: Tensor, slope: float) -> ModelLoss:
    """``loss``, and the linear loss of a canary for targets from ``num_classes`` on.

    ``coordinates[m, L]`` holds the coordinates of canary m in the flat ``params``, each with the slope ``slope``. The
    losses of canaries are m further outputs of the model, from a linear layer whose weight is a function of the
    parameters. So every engine that supports the model supports them too.
    """
    module, names = copy.deepcopy(loss.module), list(params)

    def append(module: nn.Module, _: Any, outputs: Tensor) -> Tensor:
        found = dict(module.named_parameters())
        flat = torch.cat([found[name].flatten() for name in names])
        weight = slope * flat[coordinates].sum(1, keepdim=True)
        return torch.cat([outputs, functional.linear(outputs.new_ones(len(outputs), 1), weight)], 1)

    module.register_forward_hook(append)
    criterion = CanaryCriterion(criterion=loss.criterion, num_classes=num_classes)
    return dataclasses.replace(loss, module=module, criterion=criterion)


@dataclass(kw_only=True)
class Watch:
    """The statistics that the attacker computes from each private gradient of the client."""

    loss: LossFn
    batch: tuple[Batch, Tensor]
    clipping: ClippingRule
    coordinates: Tensor
    sample_rate: float
    scale: float
    along: list[Tensor] = field(default_factory=list)

    def __call__(self, _: int, at: At, private_gradient: Params) -> None:
        """Subtract the expected sum of the known examples, and store the component along each canary, in clip norms."""
        known = spread(at, clipped_gradient_sum(self.loss, at, self.batch, self.clipping)[0])
        residual = torch.cat([g.flatten() * self.scale for g in private_gradient.values()])
        residual = residual - self.sample_rate * torch.cat([k.flatten() for k in known.values()])
        length = self.clipping.clip_norm * math.sqrt(self.coordinates.shape[1])
        self.along.append(residual[self.coordinates].sum(1).double() / length)


def canary_coordinates(params: Params, clipping: ClippingRule, canaries: int, generator: np.random.Generator) -> Tensor:
    """Distinct coordinates of each canary, ``[m, L]``: L = 1, or one per layer if the rule then keeps more."""
    sizes = {name: p.numel() for name, p in params.items()}
    starts = dict(zip(sizes, np.cumsum([0, *sizes.values()]), strict=False))
    single, each = max(sizes, key=lambda name: sizes[name]), _largest_of_layers(sizes)
    kept = [float(_clipped(clipping, sizes, names)[1].max()) for names in ([single], each)]
    spread = len(each) > 1 and kept[1] > 1.01 * kept[0]
    room = min(sizes[name] for name in each) if spread else sum(sizes.values())
    if canaries > room:
        raise SettingError("canaries", canaries, f"at most {room}, the number of coordinates", "lower it")
    if not spread:
        return torch.from_numpy(generator.permutation(room)[:canaries])[:, None]
    columns = [starts[name] + generator.permutation(sizes[name])[:canaries] for name in each]
    return torch.from_numpy(np.stack(columns, 1))


def slope_of(clipping: ClippingRule, params: Params, coordinates: Tensor) -> float:
    """The slope along each coordinate at which the clipped gradient of a canary is largest."""
    sizes, spread = {name: p.numel() for name, p in params.items()}, coordinates.shape[1]
    names = _largest_of_layers(sizes) if spread > 1 else [max(sizes, key=lambda name: sizes[name])]
    norms, left = _clipped(clipping, sizes, names)
    return float(norms[left >= left.max() * (1 - 1e-6)].min()) / math.sqrt(spread)


def _largest_of_layers(sizes: dict[str, int]) -> list[str]:
    """The name of the largest parameter of each layer, in order."""
    layers: dict[str, list[str]] = {}
    for name in sizes:
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    return [max(names, key=lambda name: sizes[name]) for names in layers.values()]


def _clipped(clipping: ClippingRule, sizes: dict[str, int], names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Norms ``[n]`` of a gradient spread evenly over ``names``, and the norms after clipping."""
    limit = float(getattr(clipping, "global_threshold", clipping.clip_norm))
    norms = torch.cat([torch.logspace(-3, 3, 61, dtype=torch.float64) * clipping.clip_norm, torch.tensor([limit])])
    shares = {name: norms**2 * (name in names) / len(names) for name in sizes}
    factors = clipping.factors(shares)
    left = torch.stack([f.double().square() * shares[name] for name, f in factors.items()])
    return norms, left.nan_to_num().sum(0).sqrt()  # a tensor without a gradient may have a factor of C / 0


def _gradient_scores(
    experiment: Experiment, client: int, coins: NDArray[np.bool_], generator: np.random.Generator
) -> tuple[NDArray[np.float64], float, int]:
    config, dataset = experiment.config, experiment.dataset
    params = experiment.trained(1)
    coordinates = canary_coordinates(params, experiment.clipping, len(coins), generator)
    included = torch.from_numpy(np.flatnonzero(coins))
    inputs, _ = dataset.train.of_classes(AUDIT)
    blank = inputs.new_zeros((len(included), *dataset.input_shape))
    labels = dataset.num_classes + included
    own = experiment.partitions[client]
    plan = make_plans(config)[client]
    watch = Watch(
        loss=experiment.loss_fn,
        batch=dataset.train.batch(torch.from_numpy(own)),
        clipping=experiment.clipping,
        coordinates=coordinates,
        sample_rate=plan.event.sample_rate,
        scale=plan.event.sample_rate * (len(own) + len(included)),
    )
    watched = dataclasses.replace(
        experiment,
        config=dataclasses.replace(config, engine="auto"),
        dataset=_with_examples(dataset, blank, labels, [f"canary {i}" for i in range(len(coins))]),
        partitions=_with_rows(experiment.partitions, client, len(dataset.train), len(included)),
        loss_fn=canary_loss(
            experiment.loss_fn,
            params,
            dataset.num_classes,
            coordinates,
            slope_of(experiment.clipping, params, coordinates),
        ),
        named=False,
        watches={client: watch},
    )
    with tempfile.TemporaryDirectory() as folder:
        spent = train(watched, client, RunFolder(Path(folder) / "run"))
    along = torch.stack(watch.along, 1).numpy()
    return log_likelihood_ratio(along, plan.event.noise_multiplier, plan.event.sample_rate), spent, along.shape[1]


# mislabelled canaries


def _mislabelled_scores(
    experiment: Experiment, client: int, coins: NDArray[np.bool_], generator: np.random.Generator
) -> tuple[NDArray[np.float64], float, int]:
    dataset, count = experiment.dataset, len(coins)
    if count > len(dataset.test):
        raise SettingError("canaries", count, f"at most {len(dataset.test)}, the number of test images", "lower it")
    rows = torch.from_numpy(generator.permutation(len(dataset.test))[:count])
    wrong = torch.from_numpy(generator.integers(1, dataset.num_classes, count))
    public, classes = dataset.test.of_classes(AUDIT)
    labels = (classes[rows] + wrong) % dataset.num_classes
    included = torch.from_numpy(np.flatnonzero(coins))
    audited = dataclasses.replace(
        experiment,
        dataset=_with_examples(dataset, public[rows[included]], labels[included], []),
        partitions=_with_rows(experiment.partitions, client, len(dataset.train), len(included)),
        named=False,
    )
    inputs, losses = dataset.test.batch(rows)[0], []
    with tempfile.TemporaryDirectory() as name:
        folder = RunFolder(Path(name) / "run")

        def look(record: object) -> None:
            checkpoint = folder.load_checkpoint()
            assert checkpoint is not None  # written before this call
            with torch.no_grad():
                losses.append(experiment.loss_fn(checkpoint.params, inputs, labels).double().numpy())

        spent = train(audited, client, folder, look)
    return losses[0] - np.mean(losses[1:], axis=0), spent, len(losses) - 1


def _with_examples(dataset: Dataset, inputs: Tensor, labels: Tensor, more_classes: Sequence[str]) -> Dataset:
    """``dataset`` with further examples at the end of its training split."""
    old = dataset.train
    before, classes = old.of_classes(AUDIT)
    extended = Examples(
        inputs=torch.cat([before, inputs]),
        labels=torch.cat([classes, labels]),
        mean=old.mean,
        std=old.std,
    )
    return dataclasses.replace(dataset, train=extended, class_names=(*dataset.class_names, *more_classes))


def _with_rows(partitions: Sequence[NDArray[np.int64]], client: int, first: int, count: int) -> list[NDArray[np.int64]]:
    """``partitions`` with the ``count`` rows from ``first`` on added to ``client``."""
    extended = list(partitions)
    extended[client] = np.concatenate([extended[client], np.arange(first, first + count)])
    return extended
