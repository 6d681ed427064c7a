"""A policy file: flat, checked when it is read, and in the words of the settings that it bounds."""

from __future__ import annotations

import dataclasses

import pytest

from fed_dpsat.accounting.event import PrivacyEvent
from fed_dpsat.client.assignment import Assignment
from fed_dpsat.device.journal import Refusal
from fed_dpsat.device.policy import Policy, PolicyError
from fed_dpsat.settings.config import RunConfig


def test_paths_are_beside_the_file(device):
    policy = Policy.load(device.policy_path)
    assert policy.folder == str(device.path / "device")
    assert policy.class_names == ("dark", "light")
    assert policy.optimizers == ("dp-sgd", "dp-sat", "dp-sat-momentum")


@pytest.mark.parametrize(("name", "placed"), [("own.py:data", "{}/own.py:data"), ("data:examples", "data:examples")])
def test_a_function_in_a_file_is_beside_the_policy_too(device, name, placed):
    text = device.policy_path.read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("data_path")]
    device.policy_path.write_text(text.replace(line, f'data_path = "{name}"'))
    assert Policy.load(device.policy_path).data_path == placed.format(device.path)


def test_bounds_are_named_after_settings():
    settings = {spec.name for spec in dataclasses.fields(RunConfig)} | {"epsilon", "parameters"}
    for spec in dataclasses.fields(Policy):
        kind, _, name = spec.name.partition("_")
        assert kind not in ("largest", "least") or name in settings


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"largest_epsilon": "inf"}, "largest_epsilon=inf is not above 0 and finite; inf is not a budget"),
        ({"largest_epsilon": "0.0"}, "largest_epsilon=0.0 is not"),
        ({"largest_epsilon": "nan"}, "largest_epsilon=nan is not"),
        ({"largest_delta": "1.0"}, "largest_delta=1.0 is not in"),
        ({"least_noise_multiplier": "0"}, "least_noise_multiplier=0.0 is not in"),
        ({"least_noise_multiplier": "nan"}, "least_noise_multiplier=nan"),
        ({"largest_clip_norm": "inf"}, "largest_clip_norm=inf"),
        ({"largest_sample_rate": "1.5"}, "largest_sample_rate=1.5"),
        ({"least_sample_rate": "0.6"}, "least_sample_rate=0.6"),
        ({"largest_local_steps": "0"}, "largest_local_steps=0"),
        ({"threads": "0"}, "threads=0"),
        ({"models": "[]"}, r"models=\(\) is not a list with a name"),
        ({"models": '"linear"'}, r"models='linear' is not a list; write \[...\]"),
        ({"models": "[1]"}, "models=1 is not of type str"),
        ({"release_counts": "1"}, "release_counts=1 is not of type bool"),
        ({"largest_epsilonn": "1.0"}, "largest_epsilonn is not a key of a policy; did you mean largest_epsilon?"),
        ({"client": "-1"}, "client=-1 is not at least 0"),
        (
            {"noise_distributions": '["cauchy"]'},
            r"noise_distributions=\('cauchy',\) is not a list of gaussian, laplace",
        ),
        ({"noise_distributions": "[]"}, r"noise_distributions=\(\) is not a list of"),
    ],
)
def test_what_makes_no_sense_is_told_with_its_key(device, changes, says):
    device.write(**changes)
    with pytest.raises(PolicyError, match=says):
        Policy.load(device.policy_path)


def test_a_missing_key_and_a_missing_file_are_told(device):
    device.policy_path.write_text("client = 1")
    with pytest.raises(PolicyError, match="folder is missing: folder of ledger, journal and log"):
        Policy.load(device.policy_path)
    with pytest.raises(PolicyError, match="No such file"):
        Policy.load(device.path / "none.toml")
    device.policy_path.write_text("client = = 1")
    with pytest.raises(PolicyError, match=r"policy .*policy.toml: Invalid"):
        Policy.load(device.policy_path)


def test_an_admitted_run_keeps_no_path_or_cohort_of_the_servers(device, settings):
    theirs = {
        **settings, "data_path": "/etc", "cache_dir": "/etc", "client_table": "/etc/passwd", "out": "/etc",
        "num_clients": 1000, "clients_per_round": 7, "partition": "evil:partition", "workers": 9,
        "physical_batch_size": 10**9, "threads_per_client": 10**6, "resume": True,
        "device": "cuda", "gpus_per_worker": 0.5, "tokenizer": "/etc", "columns_file": "/etc", "test_path": "/etc",
        "input_columns": "secret", "label_column": "secret", "user_column": "secret", "class_names": "secret",
    }  # fmt: skip
    config = device.policy.admit(7, theirs)
    assert "/etc" not in "".join(str(value) for value in config.settings().values())
    assert (config.num_clients, config.clients_per_round, config.workers, config.resume) == (1, 0, 0, False)
    assert (config.physical_batch_size, config.threads_per_client) == (1024, 1)
    assert (config.device, config.gpus_per_worker) == ("cpu", 0.0)
    assert config.noise_source == "system"
    assert "evil" not in config.partition
    assert "secret" not in "".join(str(value) for value in config.settings().values())


def test_a_server_does_not_choose_another_librarys_engine(device, settings):
    for engine in ("auto", "planned", "vmap"):
        assert device.policy.admit(7, {**settings, "engine": engine}).engine == engine
    with pytest.raises(
        Refusal, match=r"engine='opacus' is not allowed on this device; choose one of auto, planned, vmap"
    ):
        device.policy.admit(7, {**settings, "engine": "opacus"})


LAPLACE = {"noise_distribution": "laplace", "clipping": "l1", "optimizer": "zeroth-order"}


def test_laplace_noise_is_for_devices_that_permit_it(device):
    settings = {**RunConfig(**LAPLACE, dataset="pixels", noise_source="system", noise_multiplier=2.0, delta=1e-4,
                            sample_rate=0.5).settings()}  # fmt: skip
    device.write(clippings='["l1"]', optimizers='["zeroth-order", "dp-sgd"]')
    with pytest.raises(Refusal, match="noise_distribution='laplace' is not allowed on this device; choose one of gau"):
        Policy.load(device.policy_path).admit(7, settings)
    device.write(
        clippings='["l1"]', optimizers='["zeroth-order", "dp-sgd"]', noise_distributions='["gaussian", "laplace"]'
    )
    assert Policy.load(device.policy_path).admit(7, settings).noise_distribution == "laplace"
    gaussian, laplace = (
        Assignment(round=1, event=PrivacyEvent(noise_multiplier=2.0, sample_rate=0.5, steps=1, kind=kind))
        for kind in ("poisson_gaussian", "poisson_laplace")
    )
    reason = device.ask(gaussian, changes=LAPLACE).error.reason
    assert "kind='poisson_gaussian' is not allowed on this device; choose one of poisson_laplace" in reason
    assert device.ask(laplace, changes=LAPLACE).has_content()
