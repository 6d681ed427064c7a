"""Whole rounds on a card, pretended or real: nothing mixes devices, and the results are those of the CPU.

A real one adds up in another order, and some of these functions are steep.
"""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from fed_dpsat import plugins
from fed_dpsat.accounting.event import CLIENTS, PrivacyEvent
from fed_dpsat.accounting.plans import LocalTraining
from fed_dpsat.client.assignment import Assignment
from fed_dpsat.client.build import Experiment
from fed_dpsat.client.evaluation import evaluation_of, predict, quality_of
from fed_dpsat.client.train import Request
from fed_dpsat.data.dataset import Examples
from fed_dpsat.flower.federation import run_federation
from fed_dpsat.models.resnet import WSConv2d
from fed_dpsat.params import flatten, global_norm, trainable
from fed_dpsat.run.folder import RunFolder
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.simulation import simulation_grid
from fed_dpsat.step.clipping import FlatClipping
from fed_dpsat.step.gradients.per_example import ModelLoss, clipped_gradient_sum
from fed_dpsat.step.gradients.plan import plan_table
from fed_dpsat.step.loop import Streams
from fed_dpsat.step.mechanism import GaussianMechanism
from fed_dpsat.step.noise import keyed_words
from fed_dpsat.step.placement import CPU, exact, generator_states, moved


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.LayerNorm(12), nn.Linear(12, 10))


def cnn():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.Tanh(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2),
        nn.ReLU(),
        nn.Conv2d(8, 8, 1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


MODELS = {"mlp": mlp, "cnn": cnn}
OPTIMIZERS = (
    *("dp-sgd", "adam", "dp-sat", "dp-sat-momentum", "dp-sam", "extrapolated", "modelmix", "disk", "dplis"),
    *("random-freeze", "zeroth-order"),
)


def experiment_of(model="mlp", **settings):
    chosen = {"optimizer": "dp-sat", "local_steps": 2, "sample_rate": 0.2, "lr": 0.1, "num_clients": 20}
    chosen |= {"noise_multiplier": 1.0, "clip_norm": 0.5, "momentum": 0.5, "weight_decay": 0.01}
    torch.manual_seed(3)
    return Experiment.build(RunConfig(**{**chosen, **settings}), model=MODELS[model]())


def on_card(experiment, device):
    module = copy.deepcopy(experiment.loss_fn.module).to(device)
    return dataclasses.replace(experiment, loss_fn=dataclasses.replace(experiment.loss_fn, module=module))


def rounds(experiment, clients=(1,), count=2, proximal_mu=0.0):
    """``count`` rounds of each of ``clients``, from the global model, with the state that it keeps."""
    found, states = [], dict.fromkeys(clients)
    for round in range(1, count + 1):
        assignment = Assignment(round=round, event=PrivacyEvent(noise_multiplier=1.0, sample_rate=0.2, steps=2))
        if experiment.config.privacy_unit == "client":
            event = PrivacyEvent(noise_multiplier=1.0, sample_rate=1.0, steps=1, kind=CLIENTS)
            training = LocalTraining(sample_rate=0.2, local_steps=2)
            assignment = Assignment(round=round, event=event, training=training)
        params = experiment.shared(round)
        asked = [
            Request(client=c, assignment=assignment, params=params, state=states[c], proximal_mu=proximal_mu)
            for c in clients
        ]
        results = experiment.client_rounds(asked)
        states = {c: result.state for c, result in zip(clients, results, strict=True)}
        found += results
    return found


def tensors(results):
    for result in results:
        yield from flatten({"params": result.params, "state": result.state}).items()


def assert_close(results, expected, there, tolerance=0.0):
    tolerance = tolerance or (1e-3 if there.type == "cuda" else 1e-5)
    found, wanted = list(tensors(results)), list(tensors(expected))
    assert [name for name, _ in found] == [name for name, _ in wanted]
    for (name, a), (_, b) in zip(found, wanted, strict=True):
        assert type(a) is torch.Tensor, f"{name} is still there"
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture
def drawn(monkeypatch):
    """The bytes that every generator of coins or noise has given out since this list was last cleared."""
    given = []

    class Spy(np.random.Generator):
        def integers(self, *args, **kwargs):
            numbers = super().integers(*args, **kwargs)
            given.append(np.asarray(numbers).tobytes())
            return numbers

        def random(self, *args, **kwargs):
            numbers = super().random(*args, **kwargs)
            given.append(np.asarray(numbers).tobytes())
            return numbers

    def words(*args):  # of stacked clients
        numbers = keyed_words(*args)
        given.append(numbers.tobytes())
        return numbers

    generator = Streams.generator
    monkeypatch.setattr(Streams, "generator", lambda self, purpose: Spy(generator(self, purpose).bit_generator))
    monkeypatch.setattr("fed_dpsat.step.noise.keyed_words", words)
    monkeypatch.setattr("fed_dpsat.step.stacked.keyed_words", words)
    return given


def both(experiment, there, drawn, **how):
    """Results here and there; the coins and the noise have to be the same bits."""
    here = rounds(experiment, **how)
    given = list(drawn)
    drawn.clear()
    found = rounds(on_card(experiment, there), **how)
    assert drawn == given
    assert given
    return found, here


@pytest.mark.by_default("*dp-sat-mlp-planned", "*dp-sat-cnn-vmap", "*dp-sgd-cnn-planned")
@pytest.mark.parametrize(
    ("optimizer", "model", "engine"),
    [
        *(("dp-sat", model, engine) for model in MODELS for engine in ("planned", "vmap")),
        ("dp-sgd", "cnn", "planned"),
        *(
            pytest.param("dp-sgd", *case, marks=pytest.mark.slow)
            for case in [("cnn", "vmap"), ("mlp", "planned"), ("mlp", "vmap")]
        ),
        *(
            pytest.param(optimizer, model, "opacus", marks=pytest.mark.slow)
            for optimizer in ("dp-sgd", "dp-sat")
            for model in MODELS
        ),
    ],
)
def test_a_round_is_that_of_the_cpu(optimizer, model, engine, there, drawn):
    assert_close(*both(experiment_of(model, optimizer=optimizer, engine=engine), there, drawn), there)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_trains_there_on_the_same_draws(optimizer, there, drawn):
    assert_close(*both(experiment_of(optimizer=optimizer), there, drawn), there)


RULES = ("automatic", "global", "per-layer", "adaptive")


@pytest.mark.by_default("*per-layer", "*adaptive")
@pytest.mark.parametrize("clipping", RULES)
def test_every_clipping_rule_clips_there(clipping, there, drawn):
    assert_close(*both(experiment_of(clipping=clipping, sample_rate=0.9), there, drawn), there)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "saf", "base_optimizer": "adam", "optimizer_args": "saf_epochs = 1", "sample_rate": 0.9},
        {"optimizer": "dp-sat", "base_optimizer": "disk+adam"},
        {"personal_layers": "head"},
        {"ascent_memory": "zero"},
        {"privacy_unit": "client", "keep_share": 0.5},
        {"train_layers": "head-then-all", "unfreeze_round": 2},
        {"attack": "sign-flip", "attackers": 0.9},
        {"precision": "bfloat16"},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_other_ways_to_train(settings, there, drawn):
    """In bfloat16 the CPU's normalisation takes narrow inputs, a card's widens them: digits of bfloat16 differ."""
    tolerance = 2e-2 if "precision" in settings else 0.0
    assert_close(*both(experiment_of("cnn", **settings), there, drawn), there, tolerance)


def test_the_proximal_term_pulls_there(there, drawn):
    assert_close(*both(experiment_of(), there, drawn, proximal_mu=0.5), there)


def test_the_plan_of_a_card_is_of_what_runs_there(there):
    torch.manual_seed(0)
    rows, reason = plan_table(cnn().to(there), torch.zeros(4, 1, 8, 8, device=there), timed=True, repeats=1)
    assert not reason
    assert [row.strategy for row in rows if row.layer == "conv2d"] == ["rows", "rows", "rows"]
    assert not any(row.channels_last for row in rows)
    deep, _ = plan_table(
        nn.Sequential(nn.Conv2d(64, 64, 3, padding=1)).to(there), torch.zeros(4, 64, 2, 2, device=there)
    )
    assert [row.strategy for row in deep] == ["product"]


def test_without_noise_one_ordinary_pass_is_made_there(there):
    plain = {"private": False, "noise_multiplier": 0.0, "clip_norm": float("inf"), "optimizer": "sam"}
    for settings in (plain, {**plain, "optimizer": "disk"}):
        experiment = experiment_of("cnn", **settings)
        assignment = Assignment(round=1, event=PrivacyEvent(noise_multiplier=0.0, sample_rate=0.2, steps=2))
        found, wanted = (
            e.client_round(1, assignment, e.shared(1), None) for e in (on_card(experiment, there), experiment)
        )
        assert_close([found], [wanted], there)


def test_noise_of_the_operating_system_is_rounded_to_its_grid_and_goes_there(there):
    generator = Streams(seed=0, client=0, round=1, noise_source="system").generator("noise")
    mechanism = GaussianMechanism(noise_multiplier=2.0, clip_norm=0.5, expected_batch_size=4.0)
    found = mechanism.privatize({"w": torch.ones(3, 2).to(there)}, generator)["w"]
    assert found.device == there
    steps = found.cpu().double() * 4 * 2**22
    assert torch.equal(steps, steps.round())


@pytest.mark.by_default("*dp-sat")
@pytest.mark.parametrize("optimizer", ["dp-sat", "adam", "modelmix"])
def test_stacked_clients_train_there_together(optimizer, there, drawn, monkeypatch):
    monkeypatch.setattr("fed_dpsat.client.train.warn_once", lambda reason: pytest.fail(reason))
    experiment = experiment_of("mlp", optimizer=optimizer)
    assert_close(*both(experiment, there, drawn, clients=(0, 3, 5)), there)


def test_dropout_draws_there_from_the_seed_of_the_client(there, monkeypatch):
    monkeypatch.setattr("fed_dpsat.step.gradients.loop.remember", lambda loss_fn, reason: pytest.fail(reason))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Dropout(0.5), nn.Linear(32, 10))
    experiment = on_card(Experiment.build(experiment_of().config, model=model), there)
    before = generator_states(there)
    first, again, other = (rounds(experiment, clients=(c,), count=1)[0].params["1.weight"] for c in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert all(torch.equal(*pair) for pair in zip(before, generator_states(there), strict=True))


def test_the_server_evaluates_there(there):
    experiment = experiment_of("cnn")
    module, test, params = experiment.loss_fn.module, experiment.dataset.test, experiment.shared(1)
    found = predict(on_card(experiment, there).loss_fn.module, params, test)
    assert {t.device for pair in found for t in pair} == {there}
    assert evaluation_of(found).accuracy == evaluation_of(predict(module, params, test)).accuracy
    torch.testing.assert_close(quality_of(found, 10).nll, quality_of(predict(module, params, test), 10).nll)


@pytest.mark.slow
def test_a_run_there_leaves_the_ledger_and_nearly_the_model_of_one_here(there, tmp_path):
    config = experiment_of("cnn", num_rounds=2, clients_per_round=2).config
    found = {}
    for name in ("here", "there"):
        torch.manual_seed(3)
        experiment = Experiment.build(config, model=cnn())
        experiment = on_card(experiment, there) if name == "there" else experiment
        folder = RunFolder(tmp_path / name)
        with simulation_grid(experiment, folder=folder) as grid:
            found[name] = run_federation(grid, experiment, folder), folder.load_checkpoint().params
    (here, wanted), (away, params) = found["here"], found["there"]
    assert away["epsilon"] == here["epsilon"]
    assert away["test_accuracy"] == pytest.approx(here["test_accuracy"], abs=0.01)
    for name, p in wanted.items():
        torch.testing.assert_close(params[name], p, rtol=1e-4, atol=1e-5)


def layers():
    return {
        "standardised": (WSConv2d(2, 4, kernel_size=3), (2, 6, 6)),
        "depthwise": (nn.Conv2d(4, 4, 3, groups=4), (4, 6, 6)),
        "few positions": (nn.Conv2d(64, 64, 3, padding=1), (64, 2, 2)),
        "standardised, few positions": (WSConv2d(64, 64, kernel_size=3), (64, 2, 2)),
        "1d": (nn.Conv1d(2, 4, 3, dilation=2), (2, 9)),
        "3d": (nn.Conv3d(2, 4, 2, stride=2), (2, 4, 4, 4)),
        "group norm": (nn.GroupNorm(2, 4), (4, 5, 5)),
        "instance norm": (nn.InstanceNorm2d(4, affine=True), (4, 5, 5)),
        "sequence": (nn.Linear(5, 3), (7, 5)),
        "attention": (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0), (5, 8)),
    }


@pytest.mark.parametrize("name", layers())
def test_every_layer_that_is_planned_for_is_so_there(name, there, monkeypatch):
    monkeypatch.setattr("fed_dpsat.step.gradients.loop.remember", lambda loss_fn, reason: pytest.fail(reason))
    torch.manual_seed(0)
    module, shape = layers()[name]
    loss = ModelLoss(module, criterion=lambda outputs, targets: outputs.flatten(1).square().sum(1))
    inputs, targets = torch.randn(6, *shape), torch.zeros(6)
    inputs[4] = float("nan")
    found = {}
    for device in (torch.device("cpu"), there):
        placed = dataclasses.replace(loss, module=copy.deepcopy(module).to(device))
        batch = inputs.to(device), targets.to(device)
        clipping = FlatClipping(clip_norm=0.5)
        with exact(device):
            found[device] = clipped_gradient_sum(placed, trainable(placed.module), batch, clipping, engine="planned")
    (wanted, dropped), (total, also) = found.values()
    assert dropped == also == 1
    for key, g in wanted.items():
        torch.testing.assert_close(total[key].cpu(), g, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("engine", ["planned", "vmap"])
@pytest.mark.parametrize("name", ["tanh-cnn", pytest.param("resnet20-gn", marks=pytest.mark.slow)])
def test_sums_are_those_of_float64_and_no_example_exceeds_the_bound(name, engine, there):
    """Where float32 products were rounded to TF32, norms from Gram matrices would be off by a percent."""
    torch.manual_seed(0)
    module = plugins.load("model", name)((3, 16, 16), 4)
    inputs, targets = torch.randn(3, 3, 16, 16), torch.tensor([0, 3, 1])
    clipping, wide = FlatClipping(clip_norm=0.1), copy.deepcopy(module).double()
    wanted, _ = clipped_gradient_sum(
        ModelLoss(wide), trainable(wide), (inputs.double(), targets), clipping, engine="vmap"
    )
    loss = ModelLoss(module.to(there))
    with exact(there):
        batch = inputs.to(there), targets.to(there)
        found, _ = clipped_gradient_sum(loss, trainable(loss.module), batch, clipping, engine=engine)
        for i in range(3):
            one, _ = clipped_gradient_sum(
                loss, trainable(loss.module), (batch[0][i : i + 1], batch[1][i : i + 1]), clipping, engine=engine
            )
            assert float(global_norm(moved(one, CPU))) <= 0.1 * (1 + 1e-5)
    for key, g in wanted.items():
        torch.testing.assert_close(found[key].cpu().double(), g, rtol=1e-3, atol=1e-5)


# The pretended card has to notice.


def test_noise_that_stays_on_the_cpu_is_noticed(pretended, monkeypatch):
    def careless(self, clipped_sum, generator):
        return {n: g + torch.from_numpy(generator.standard_normal(g.shape)).float() for n, g in clipped_sum.items()}

    monkeypatch.setattr(GaussianMechanism, "_add_noise", careless)
    with pytest.raises(RuntimeError, match="tensors of two devices"):
        rounds(on_card(experiment_of(), pretended))


def test_a_batch_that_stays_on_the_cpu_is_noticed(pretended, monkeypatch):
    batch = Examples.batch
    monkeypatch.setattr(Examples, "batch", lambda self, indices, device=None: batch(self, indices))
    with pytest.raises(RuntimeError, match="tensors of two devices"):
        rounds(on_card(experiment_of(), pretended))


def test_draws_of_the_card_are_noticed(pretended, drawn, monkeypatch):
    rand_like = torch.rand_like
    monkeypatch.setattr(torch, "rand_like", lambda p, device=None: rand_like(p))
    found, wanted = both(experiment_of(optimizer="modelmix"), pretended, drawn)
    with pytest.raises(AssertionError, match="not close"):
        assert_close(found, wanted, pretended)


def test_channels_last_in_a_normalisation_is_noticed(pretended, monkeypatch):
    monkeypatch.setattr("fed_dpsat.step.gradients.formats.is_card", lambda device: False)
    with pytest.raises(RuntimeError, match="not contiguous"):
        rounds(on_card(experiment_of("cnn", engine="planned"), pretended))
