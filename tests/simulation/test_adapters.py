"""Runs with an adapter: it alone and the head travel, and a resumed run has the same bits."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fed_dpsat.accounting.event import PrivacyEvent
from fed_dpsat.client.assignment import Assignment
from fed_dpsat.client.build import Experiment
from fed_dpsat.client.evaluation import evaluate
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.simulation import simulate

pytest.importorskip("peft", reason='pip install "fed_dpsat[text]" to run these tests')

LORA = RunConfig(
    model="mlp", adapter="lora", adapter_rank=2, adapter_targets="1", num_clients=3, num_rounds=3, local_steps=2,
    noise_multiplier=1.0, delta=1e-3, momentum=0.5, sample_rate=0.1,
)  # fmt: skip
FFA = dataclasses.replace(LORA, adapter="ffa-lora")
A, B, HEAD = "1.lora_A.default.weight", "1.lora_B.default.weight", ["3.weight", "3.bias"]


def saved(folder):
    return torch.load(folder / "checkpoint" / "model.pt", weights_only=True)["params"]


def bits(params):
    return {name: p.numpy().tobytes() for name, p in params.items()}


@pytest.mark.parametrize(("config", "names"), [(LORA, [A, B, *HEAD]), (FFA, [B, *HEAD])])
def test_the_adapter_and_the_head_alone_are_parameters_of_a_run(config, names, tmp_path):
    summary, experiment = simulate(config, tmp_path / "run"), Experiment.build(config)
    params = saved(tmp_path / "run")
    assert list(params) == names
    count = 2 * 128 + (2 * 64 if config is LORA else 0) + 128 * 10 + 10
    assert summary["trained_parameters"] == count
    assert summary["bytes_per_client"] == {"down": 4 * count, "up": 4 * count}
    assert summary["adapter"] == config.adapter
    assert all(not torch.equal(p, params[name]) for name, p in experiment.trained(1).items())
    again = evaluate(experiment.loss_fn.module, params, experiment.dataset.test, experiment.task)
    assert again.accuracy == pytest.approx(summary["test_accuracy"])


@pytest.mark.parametrize("config", [LORA, pytest.param(FFA, marks=pytest.mark.slow)])
def test_a_resumed_run_has_the_same_bits(config, tmp_path):
    def interrupt(record):
        if record["round"] == 2:
            raise KeyboardInterrupt

    simulate(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        simulate(config, tmp_path / "cut", on_round=interrupt)
    simulate(dataclasses.replace(config, resume=True), tmp_path / "cut")
    assert bits(saved(tmp_path / "cut")) == bits(saved(tmp_path / "whole"))


def test_the_frozen_matrix_is_drawn_from_the_seed_of_the_run():
    """Each process of a run builds the same; another seed draws another one, and the body does not depend on it."""
    one, again, other = (Experiment.build(dataclasses.replace(FFA, seed=seed)) for seed in (0, 0, 1))
    drawn = [dict(e.loss_fn.module.named_parameters())[A] for e in (one, again, other)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert one.contents["model"] == again.contents["model"] != other.contents["model"]
    plain = Experiment.build(RunConfig(model="mlp", num_clients=3, noise_multiplier=1.0))
    assert torch.equal(dict(one.loss_fn.module.named_parameters())["1.base_layer.weight"], plain.trained(1)["1.weight"])


@pytest.mark.parametrize(("config", "count"), [(LORA, 1674), (FFA, 1546)])
def test_noise_is_that_of_the_adapter_and_the_head(config, count):
    """With no example in the batch, a step is noise alone, on each parameter of the run and on no other."""
    config = dataclasses.replace(config, optimizer="dp-sgd", momentum=0.0, sample_rate=1e-9, local_steps=1, lr=1.0)
    experiment, event = Experiment.build(config), PrivacyEvent(noise_multiplier=1e-9, sample_rate=1e-9, steps=1)
    start = experiment.trained(1)
    result = experiment.client_round(0, Assignment(round=1, event=event), start, None)
    moved = torch.cat([(result.params[name] - p).flatten() for name, p in start.items()])
    assert len(moved) == count
    assert float(moved.std()) == pytest.approx(0.5 / len(experiment.partitions[0]), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"engine": "vmap"}, {"engine": "opacus"}, {"stack_clients": 3}])
def test_other_ways_train_the_same(changes, tmp_path):
    simulate(LORA, tmp_path / "planned")
    simulate(dataclasses.replace(LORA, **changes), tmp_path / "other")
    for name, p in saved(tmp_path / "planned").items():
        torch.testing.assert_close(saved(tmp_path / "other")[name], p, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_workers_train_what_this_process_trains(tmp_path, ray_cluster):
    for name, workers in (("here", 0), ("there", 2)):
        simulate(dataclasses.replace(FFA, workers=workers), tmp_path / name)
    assert bits(saved(tmp_path / "here")) == bits(saved(tmp_path / "there"))
