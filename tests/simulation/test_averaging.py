"""An average of the released models: measured beside the last one, the same bits after a kill, exported."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from fed_dpsat.cli import app
from fed_dpsat.client.known_noise import KnownNoise
from fed_dpsat.errors import SettingError
from fed_dpsat.run.folder import RunFolder
from fed_dpsat.run.reading import load_run
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.simulation import resume, simulate
from fed_dpsat.step.averaging import mean_of

CONFIG = RunConfig(num_clients=3, num_rounds=4, noise_multiplier=1.0, accountant="rdp", lr=2.0)


@pytest.mark.by_default("ema")
@pytest.mark.parametrize("kind", ["ema", "last-k"])
def test_the_average_is_measured_beside_the_model_and_changes_nothing_of_it(kind, tmp_path, same_bits):
    plain = simulate(CONFIG, tmp_path / "plain", progress=False)
    run = simulate(dataclasses.replace(CONFIG, averaging=kind), tmp_path / "run", progress=False)
    assert same_bits(run.model().state_dict(), plain.model().state_dict())
    assert run["epsilon"] == plain["epsilon"]
    assert run["averaged_test_accuracy"] == run.rounds[-1]["averaged_test_accuracy"]
    assert run["averaged_test_loss"] != run["test_loss"]
    assert "averaged_test_accuracy" not in plain.summary
    averaged = run.model(averaged=True)
    assert not same_bits(averaged.state_dict(), run.model().state_dict())
    assert "average of models" in CliRunner().invoke(app, ["resume", str(tmp_path / "run")]).stdout


def test_the_last_k_is_the_mean_of_the_checkpoints(tmp_path):
    kept = []

    def keep(record):
        kept.append(RunFolder(tmp_path / "run", resume=True).load_checkpoint().params)

    config = dataclasses.replace(CONFIG, averaging="last-k", averaging_models=3)
    run = simulate(config, tmp_path / "run", on_round=keep, progress=False)
    wanted = mean_of(kept[-3:])
    assert all(torch.equal(p, wanted[name]) for name, p in run.model(averaged=True).named_parameters())


@pytest.mark.by_default("last-k")
@pytest.mark.parametrize("kind", ["ema", "last-k"])
def test_a_killed_run_ends_with_the_same_bits_of_the_average(kind, tmp_path, same_bits):
    config = dataclasses.replace(CONFIG, averaging=kind)
    whole = simulate(config, tmp_path / "whole", progress=False)

    def killed(record):
        if record["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(config, tmp_path / "cut", on_round=killed, progress=False)
    resume(tmp_path / "cut", progress=False)
    cut = load_run(tmp_path / "cut")
    assert same_bits(cut.model(averaged=True).state_dict(), whole.model(averaged=True).state_dict())
    assert cut.rounds == whole.rounds


def test_export_writes_the_average(tmp_path, same_bits):
    run = simulate(dataclasses.replace(CONFIG, averaging="ema"), tmp_path / "run", progress=False)
    result = CliRunner().invoke(app, ["export", str(tmp_path / "run"), str(tmp_path / "out"), "--averaged"])
    assert result.exit_code == 0, result.output
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert same_bits(written, dict(run.model(averaged=True).state_dict()))


def test_a_run_without_an_average_has_none_to_export(tmp_path):
    run = simulate(CONFIG, tmp_path / "run", progress=False)
    with pytest.raises(SettingError, match=r"averaged=True is not possible: .* has no average; leave it out"):
        run.model(averaged=True)


def test_clients_that_send_averages_are_charged_as_before(tmp_path, same_bits):
    config = dataclasses.replace(CONFIG, local_steps=3)
    plain = simulate(config, tmp_path / "plain", progress=False)
    run = simulate(dataclasses.replace(config, local_averaging="last-k"), tmp_path / "run", progress=False)
    assert run["epsilon"] == plain["epsilon"]
    assert not same_bits(run.model().state_dict(), plain.model().state_dict())


@pytest.mark.slow
def test_a_stack_of_clients_sends_the_averages_that_they_send_alone(tmp_path):
    config = dataclasses.replace(CONFIG, local_steps=3, local_averaging="ema")
    alone = simulate(config, tmp_path / "alone", progress=False).model()
    stacked = simulate(dataclasses.replace(config, stack_clients=3), tmp_path / "stacked", progress=False).model()
    for a, b in zip(alone.parameters(), stacked.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_the_noise_of_an_average_is_not_known():
    plain = dataclasses.replace(CONFIG, optimizer="dp-sgd")
    assert KnownNoise.of(plain).unknown is None
    assert "local_averaging='ema'" in str(KnownNoise.of(dataclasses.replace(plain, local_averaging="ema")).unknown)


def test_rounds_without_an_evaluation_have_no_values(tmp_path):
    config = dataclasses.replace(CONFIG, averaging="ema", evaluate_every=3)
    simulate(config, tmp_path / "run", progress=False)
    lines = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    assert [line["averaged_test_accuracy"] is None for line in lines] == [False, True, True, False, False]
