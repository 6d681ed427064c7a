"""A run on features as a user sees it: settings, hash, account, equal bits with workers and after a kill; presets."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fed_dpsat.cli import app
from fed_dpsat.data import features
from fed_dpsat.errors import SettingError
from fed_dpsat.plugins import builtin
from fed_dpsat.run.reading import load_run
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.settings.presets import preset, presets
from fed_dpsat.simulation import resume, simulate
from fed_dpsat.step.gradients.plan import plan_table

PRESETS = sorted((Path(__file__).parents[2] / "presets").glob("*.toml"))


@pytest.fixture
def config(tmp_path):
    def made(**changes):
        settings = {"num_clients": 3, "num_rounds": 2, "noise_multiplier": 1.0, "accountant": "rdp"}
        settings |= {"features": "scattering", "features_norm": "group", "cache_dir": str(tmp_path / "cache")}
        return RunConfig(**(settings | changes))

    return made


def test_a_run_folder_and_the_account_name_the_public_extractor(config, tmp_path):
    run = simulate(config(), tmp_path / "run", progress=False)
    written = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    assert written["features"] == "scattering"
    assert len(written["features_sha256"]) == 64
    said = f"the public extractor of features, scattering (SHA-256 {written['features_sha256'][:16]})"
    assert any(public.startswith(said) for public in run.summary["declared_public"])
    assert f"Declared public: {said}" in CliRunner().invoke(app, ["ledger", str(tmp_path / "run")]).stdout
    assert run.model()[1].in_features == 81 * 4


def test_a_run_without_features_declares_no_extractor(config, tmp_path):
    run = simulate(config(features="", features_norm=""), tmp_path / "run", progress=False)
    assert not any("extractor" in public for public in run.summary["declared_public"])
    assert "Declared" not in CliRunner().invoke(app, ["ledger", str(tmp_path / "run")]).stdout


def test_a_resumed_run_reads_the_cache_and_ends_with_the_same_bits(config, tmp_path, same_bits, monkeypatch):
    whole = simulate(config(), tmp_path / "whole", progress=False)
    monkeypatch.setattr(features, "_parts", lambda *_: pytest.fail("computed again"))

    def killed(record):
        if record["round"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(config(), tmp_path / "cut", on_round=killed, progress=False)
    resume(tmp_path / "cut", progress=False)
    assert same_bits(load_run(tmp_path / "cut").model().state_dict(), whole.model().state_dict())


@pytest.mark.slow
def test_workers_map_the_same_cache(config, tmp_path, same_bits):
    alone = simulate(config(), tmp_path / "alone", progress=False)
    together = simulate(config(workers=2), tmp_path / "together", progress=False)
    assert same_bits(alone.model().state_dict(), together.model().state_dict())


def test_data_and_list_show_features(config, tmp_path):
    arguments = ["--set", "features=scattering", "--set", f"cache_dir={tmp_path}"]
    said = CliRunner().invoke(app, ["data", *arguments]).stdout
    assert "inputs are features of a public extractor, SHA-256 " in said
    assert "float16  [81, 2, 2]" in said
    listed = json.loads(CliRunner().invoke(app, ["list", "features", "--json"]).stdout)
    assert listed["features"].keys() == builtin("features").keys() == {"scattering"}


def test_a_linear_model_on_features_has_its_fast_gradients(config):
    from fed_dpsat.client.build import Experiment

    experiment = Experiment.build(config())
    rows, reason = plan_table(experiment.loss_fn.module, experiment.made_up_inputs(8))
    assert reason == ""
    assert [row.strategy for row in rows] == ["product"]


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_is_a_configuration_that_its_name_describes(path):
    settings, text = RunConfig.load(path), path.read_text()
    assert f"-epsilon-{settings.target_epsilon:g}" in path.stem
    assert f"-{settings.num_clients}-client" in path.stem
    assert f"fed-dpsat run --preset {path.stem} " in text
    assert settings.delta == 1e-5


def test_presets_are_listed_and_found_by_name():
    assert presets().keys() == {path.stem for path in PRESETS}
    name = "fashion-mnist-1-client-epsilon-2"
    assert preset(name).name == f"{name}.toml"
    said = json.loads(CliRunner().invoke(app, ["list", "presets", "--json"]).stdout)
    assert said["preset"][name].startswith("Fashion-MNIST at epsilon 2: one client")
    with pytest.raises(SettingError, match="--preset='fashion-mnist-epsilon-2' is not a preset; did you mean fashion"):
        preset("fashion-mnist-epsilon-2")


def test_a_preset_runs_with_settings_of_ones_own(tmp_path):
    changes = ["dataset=digits", "num_rounds=1", "num_clients=2", f"cache_dir={tmp_path}", "local_steps=1"]
    arguments = [part for change in changes for part in ("--set", change)]
    name = "fashion-mnist-10-clients-epsilon-1"
    result = CliRunner().invoke(app, ["run", "--preset", name, *arguments, "--out", str(tmp_path / "run"), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["features"] == "scattering"
    both = CliRunner().invoke(app, ["run", "a.toml", "--preset", name])
    assert both.exit_code == 2
    assert "give one of the two" in both.output
