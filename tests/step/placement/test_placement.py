"""Which device a run gets, and what moves."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fed_dpsat.errors import SettingError
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.simulation import simulate
from fed_dpsat.step import generators, placement

CONFIG = RunConfig(private=False, num_clients=2, num_rounds=1)


@pytest.fixture
def cards(monkeypatch):
    def are(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return are


@pytest.mark.parametrize(
    ("seen", "settings", "device", "share"),
    [
        (0, {}, "cpu", 0.0),
        (1, {}, "cuda", 0.0),
        (1, {"workers": 2}, "cpu", 0.0),  # Ray gives them no card
        (1, {"workers": 2, "gpus_per_worker": 0.5}, "cuda", 0.5),
        (0, {"workers": 2, "gpus_per_worker": 0.5}, "cpu", 0.0),
    ],
)
def test_auto_is_decided_once_and_then_a_setting_like_any_other(seen, settings, device, share, cards):
    cards(seen)
    found = placement.decided(dataclasses.replace(CONFIG, device="auto", **settings))
    assert (found.device, found.gpus_per_worker) == (device, share)
    assert placement.decided(found) == found


def test_the_cpu_is_always_there(cards):
    cards(0)
    assert placement.decided(CONFIG) is CONFIG
    assert placement.described("cpu") == "cpu"


@pytest.mark.parametrize(("seen", "device"), [(0, "cuda"), (0, "cuda:0"), (2, "cuda:2")])
def test_a_card_that_is_not_there_costs_nothing(seen, device, cards, tmp_path):
    cards(seen)
    with pytest.raises(
        SettingError, match=rf"device='{device}' is not there: torch .* sees {seen} cards .* device=cpu"
    ):
        simulate(dataclasses.replace(CONFIG, device=device), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_decision_is_in_the_run_folder(cards, tmp_path):
    cards(0)
    simulate(dataclasses.replace(CONFIG, device="auto"), tmp_path)
    assert 'device = "cpu"' in (tmp_path / "config.toml").read_text()
    assert '"device": "cpu"' in (tmp_path / "environment.json").read_text()


def test_on_the_cpu_nothing_is_copied():
    params, state = {"w": torch.ones(2)}, {"slot": {"w": torch.ones(2)}}
    assert placement.moved(params, placement.CPU)["w"] is params["w"]
    assert placement.moved_state(state, params, placement.CPU)["slot"]["w"] is state["slot"]["w"]
    module = torch.nn.Linear(1, 1)
    assert placement.module_on(module, placement.CPU) is module


def test_scalars_of_a_state_stay_unless_they_are_parameters(pretended):
    state = {"count": {"step": torch.tensor(3)}, "momentum": {"scale": torch.tensor(1.0), "w": torch.ones(2)}}
    found = placement.moved_state(state, ("scale", "w"), pretended)
    assert found["count"]["step"].device == placement.CPU
    assert {t.device for t in found["momentum"].values()} == {pretended}


def test_tf32_is_off_on_a_card_and_as_it_was_afterwards(pretended):
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32, cudnn.deterministic, torch.get_float32_matmul_precision()
    assert before == (True, False, "highest")  # torch's defaults, which round the inputs of convolutions
    torch.set_float32_matmul_precision("high")
    try:
        with generators.training_on(pretended):
            assert (cudnn.allow_tf32, cudnn.deterministic) == (False, True)
            assert torch.get_float32_matmul_precision() == "highest"
        assert (cudnn.allow_tf32, cudnn.deterministic) == before[:2]
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before[2])


def test_generators_of_both_are_forked_seeded_and_rewound(card, pretended):
    def draws():
        return torch.rand(3).tolist(), torch.rand(3, device=pretended).cpu().tolist()

    before = torch.get_rng_state().tolist(), card.state.tolist()
    with generators.training_on(pretended):
        placement.seed(pretended, 5)
        states, first = placement.generator_states(pretended), draws()
        assert draws() != first
        placement.rewind(pretended, states)
        assert draws() == first
    assert (torch.get_rng_state().tolist(), card.state.tolist()) == before
