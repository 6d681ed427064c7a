"""Settings: TOML, overrides and Flower's run config are one thing, and a bad one is one clear line."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
import tomllib
from pathlib import Path

import pytest

from fed_dpsat.errors import SettingError, warn_once
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.settings.flat import ELSEWHERE, SPECS
from fed_dpsat.settings.paths import beside

GOOD = {"target_epsilon": 3.0}


def test_overrides_win_over_the_file(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("target_epsilon = 3.0\nlr = 1.0\nnum_rounds = 5\n")
    config = RunConfig.load(file, ["lr=4", "dataset=cifar10", "private = true"])
    assert (config.lr, config.num_rounds, config.dataset) == (4.0, 5, "cifar10")
    assert isinstance(config.lr, float)


def test_a_wrong_name_is_the_same_error_in_python_as_on_the_command_line():
    with pytest.raises(SettingError) as in_python:
        RunConfig(num_round=3, **GOOD)
    with pytest.raises(SettingError) as on_the_command_line:
        RunConfig.load(None, ["num_round=3"])
    assert str(in_python.value) == str(on_the_command_line.value)
    assert "num_round=3 is not a setting; did you mean num_rounds" in str(in_python.value)
    with pytest.raises(SettingError, match=r"lrr=1 is not a setting; did you mean lr\?"):
        dataclasses.replace(RunConfig(**GOOD), lrr=1)
    assert list(inspect.signature(RunConfig).parameters) == [f.name for f in dataclasses.fields(RunConfig)]


def test_the_resolved_file_is_the_same_config():
    config = RunConfig(**GOOD, data_path='C:\\a "quoted" path', delta=1e-7)
    assert RunConfig(**tomllib.loads(config.to_toml())) == config


def test_infinity_survives_the_file():
    config = RunConfig(private=False, clip_norm=math.inf)
    assert RunConfig(**tomllib.loads(config.to_toml())).clip_norm == math.inf


def test_every_setting_says_what_it_is():
    assert all(spec.metadata["doc"] for spec in dataclasses.fields(RunConfig))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("lrr=1", ["lrr=1", "did you mean lr"]),
        ("lr=fast", ["lr='fast'", "float"]),
        ("lr=true", ["lr=True", "float"]),
        ("lr=nan", ["lr=nan", "at least 0"]),
        ("num_rounds=1.5", ["num_rounds=1.5", "int"]),
        ("num_rounds=0", ["num_rounds=0", "at least 1"]),
        ("private=1", ["private=1", "bool"]),
        ("sample_rate=0", ["sample_rate=0", "above 0 and at most 1"]),
        ("sample_rate=1.2", ["sample_rate=1.2", "at most 1"]),
        ("noise_multiplier=-1", ["noise_multiplier=-1", "at least 0"]),
        ("noise_multiplier=nan", ["noise_multiplier=nan"]),
        ("clip_norm=0", ["clip_norm=0", "above 0"]),
        ("accountant=pdl", ["accountant='pdl'", "did you mean pld"]),
        ("ascent_memory=none", ["ascent_memory='none'", "client, zero"]),
        ("workers=-1", ["workers=-1", "at least 0"]),
        ("gpus_per_worker=2", ["gpus_per_worker=2", "at most 1"]),
        ("lr", ["--set='lr'", "key=value"]),
    ],
)
def test_bad_settings_name_key_value_bound_and_remedy(override, words):
    with pytest.raises(SettingError) as caught:
        RunConfig.load(None, ["target_epsilon=3.0", override])
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert "\n" not in text


def test_the_most_rounds_one_client_can_take_part_in():
    config = RunConfig(**GOOD, num_rounds=100, local_steps=4)
    assert config.rounds_per_client == 100
    sometimes = dataclasses.replace(config, clients_per_round=2)
    assert sometimes.rounds_per_client == 100  # chance may pick one client every time
    assert dataclasses.replace(sometimes, max_rounds_per_client=25).rounds_per_client == 25


@pytest.mark.parametrize("noise", [{"target_epsilon": 3.0}, {"noise_multiplier": 1.5}])
def test_private_false_alone_turns_noise_off_and_says_so_in_one_line(noise, caplog):
    warn_once.cache_clear()
    config = dataclasses.replace(RunConfig(**noise), private=False)
    assert (config.noise_multiplier, config.target_epsilon) == (0.0, 0.0)
    ((name, value),) = noise.items()
    said = f"private=false: this run adds no noise, and its epsilon is inf; {name}={value:g} has no effect"
    assert [record.message for record in caplog.records] == [said]
    assert dataclasses.replace(config, seed=1) == RunConfig(private=False, seed=1)
    assert len(caplog.records) == 1


def test_passes_over_the_data_are_steps():
    config = RunConfig(**GOOD, local_epochs=2, sample_rate=0.3, num_rounds=10)
    assert config.steps_per_round == 7  # 2 / 0.3, rounded up
    assert config.total_steps == 70


BESIDE = {
    **dict.fromkeys(("data_path", "test_path", "columns_file", "start_from", "client_table", "tokenizer"), "here/it"),
    **dict.fromkeys(("cache_dir", "out", "statistics_from"), "here/it"),
    **dict.fromkeys(("dataset", "partition", "model", "task", "optimizer", "clipping", "strategy"), "here/it.py:make"),
    **{"features": "here/it.py:make", "features_args": "weights = 'here/it.py:make'"},
    "base_optimizer": "disk+here/it.py:make",
    "loggers": "tensorboard,here/it.py:make",
    "partition_args": "partition_id_to_size_fn = 'here/it.py:make', alpha = 1.0",
}


def test_relative_paths_in_a_file_are_relative_to_it(tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path)
    lines = [f'{name} = "{value}"\n' for name, value in BESIDE.items()]
    (tmp_path / "deep" / "mine.toml").write_text("target_epsilon = 3.0\n" + "".join(lines))
    for path in (Path("deep/mine.toml"), tmp_path / "deep" / "mine.toml"):
        found = RunConfig.load(path, ["optimizer=here/it.py:make"])
        for name, value in BESIDE.items():
            deep = value.replace("here/it", f"{tmp_path}/deep/here/it")
            assert getattr(found, name) == ("here/it.py:make" if name == "optimizer" else deep)
    assert found.with_absolute_paths().optimizer == f"{tmp_path}/here/it.py:make"


def test_every_setting_that_a_plug_in_or_a_file_fills_says_so():
    declared = {name for name, spec in SPECS.items() if spec.metadata["path"]}
    assert declared == BESIDE.keys() | {"attack", "noise_mechanism"}
    named = {n for n, s in SPECS.items() if s.type == "str" and re.search(r"file|folder|attribute", s.metadata["doc"])}
    assert named <= declared | {"data_source", "test_share", "input_columns", "label_column", "user_column",
                                "class_names"}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "placed"),
    [
        ("transformers:minilm", "transformers:/x/minilm"),
        ("transformers:/there", "transformers:/there"),
        ("timm:vit_tiny", "timm:vit_tiny"),
        ("package.module:make", "package.module:make"),
        ("../net.py:make", "/net.py:make"),
        ("linear", "linear"),
        ("Net (from Python)", "Net (from Python)"),
    ],
)
def test_a_name_has_a_path_only_if_it_names_a_file(model, placed):
    assert beside({"model": model, "data_path": 3}, Path("/x"), SPECS.values()) == {"model": placed, "data_path": 3}


def test_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = RunConfig(**GOOD, data_path="data").with_absolute_paths()
    assert config.data_path == str(tmp_path / "data")
    assert config.cache_dir.startswith("/")
    assert config.tokenizer == "bytes", "the one tokenizer that is no path"
    config = RunConfig(**GOOD, tokenizer="bert", columns_file="c.toml", test_path="t").with_absolute_paths()
    assert (config.tokenizer, config.columns_file, config.test_path) == tuple(
        str(tmp_path / name) for name in ("bert", "c.toml", "t")
    )


def test_names_of_flower_and_opacus_lead_to_ours():
    with pytest.raises(SettingError, match=r"max_grad_norm=1\.0 is not a setting; it is clip_norm"):
        RunConfig(max_grad_norm=1.0, **GOOD)
    assert {name for hint in ELSEWHERE.values() for name in re.findall(r"\b[a-z]+_\w+|^\w+", hint)} <= SPECS.keys()
    assert not ELSEWHERE.keys() & SPECS.keys()
