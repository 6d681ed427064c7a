"""Layers are counted by tensors, whatever names those have: a tied head is trained, loaded and kept as a whole."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_model
from torch import nn

from fed_dpsat.accounting.event import PrivacyEvent
from fed_dpsat.client.assignment import Assignment
from fed_dpsat.client.build import Experiment
from fed_dpsat.client.personal import personal_names
from fed_dpsat.errors import ModelError, SettingError
from fed_dpsat.models.pretrained import load_weights, read_weights, trained_names
from fed_dpsat.models.ties import check_memory, layers, named_tensors
from fed_dpsat.params import trainable
from fed_dpsat.settings.config import RunConfig


class Tied(nn.Module):
    """64 -> 10 -> 4 -> 10: the head has the weight of the layer before the last, and a bias of its own."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 10)
        self.inp = nn.Linear(10, 4, bias=False)
        self.out = nn.Linear(4, 10)
        self.inp.weight = nn.Parameter(torch.randn(4, 10))
        self.out = Transposed(self.inp.weight)

    def forward(self, x):
        return self.out(torch.tanh(self.inp(torch.tanh(self.first(x.flatten(1))))))


class Transposed(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = weight
        self.bias = nn.Parameter(torch.zeros(10))

    def forward(self, x):
        return x @ self.weight + self.bias


WHOLE = ["inp.weight", "out.bias"]


def test_a_tied_tensor_is_of_both_layers_by_its_first_name():
    assert layers(Tied()) == {"first": ["first.weight", "first.bias"], "inp": ["inp.weight"], "out": WHOLE}
    assert named_tensors(Tied())["out.weight"] == "inp.weight"


@pytest.mark.parametrize(
    ("train_layers", "count", "names"),
    [
        ("head", 1, WHOLE),
        ("head-then-all", 1, WHOLE),
        ("last", 2, WHOLE),
        ("last", 3, ["first.weight", "first.bias", *WHOLE]),
    ],
)
def test_a_tied_head_is_trained_as_a_whole(train_layers, count, names):
    assert trained_names(Tied(), train_layers, count) == names


def test_a_run_trains_all_of_a_tied_head_and_nothing_else():
    config = RunConfig(noise_multiplier=1.0, num_clients=2, train_layers="head", optimizer="dp-sgd")
    experiment = Experiment.build(config, model=Tied())
    start, assignment = (
        experiment.trained(1),
        Assignment(round=1, event=PrivacyEvent(noise_multiplier=1.0, sample_rate=0.5, steps=1)),
    )
    assert sum(p.numel() for p in start.values()) == 50
    after = experiment.client_round(0, assignment, start, None).params
    assert list(after) == WHOLE
    assert all((after[name] != start[name]).all() for name in WHOLE)


def test_a_weight_that_is_parametrised_is_of_its_layer():
    normed = nn.Sequential(nn.Linear(3, 3), nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
    whole = [name for name, _ in normed.named_parameters() if name.startswith("1.")]
    assert trained_names(normed, "head", 1) == whole
    assert len(whole) == 3
    assert personal_names(trainable(normed), "head", named_tensors(normed)) == set(whole)
    assert trained_names(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), "head", 1) == [
        "bias", "parametrizations.weight.original0", "parametrizations.weight.original1",
    ]  # fmt: skip


@pytest.mark.parametrize("named", ["head", "out", "out.weight, out.bias", "inp, out.bias"])
def test_a_personal_head_takes_its_tied_tensor_along(named):
    assert personal_names(trainable(Tied()), named, named_tensors(Tied())) == set(WHOLE)
    config = RunConfig(noise_multiplier=1.0, num_clients=2, personal_layers=named)
    assert Experiment.build(config, model=Tied()).shared().keys() == {"first.weight", "first.bias"}


def test_a_head_that_is_not_trained_is_not_the_personal_one():
    frozen = Tied()
    frozen.out.bias.requires_grad_(False)
    frozen.inp.weight.requires_grad_(False)
    assert personal_names({"a.weight": torch.ones(1), **trainable(frozen)}, "first", named_tensors(frozen)) == {
        "first.weight", "first.bias",
    }  # fmt: skip


def weights():
    torch.manual_seed(5)
    return Tied().state_dict()


@pytest.mark.parametrize("left_out", [None, "out.weight", "inp.weight"])
def test_one_name_of_a_tied_tensor_is_enough_in_a_file(left_out):
    module, given = Tied(), {name: p.clone() for name, p in weights().items() if name != left_out}
    load_weights(module, given, "w", new_head=False)
    assert torch.equal(module.inp.weight, weights()["inp.weight"])
    assert module.out.weight is module.inp.weight


def test_what_safetensors_saves_of_a_tied_model_is_loaded(tmp_path):
    torch.manual_seed(5)
    save_model(Tied(), str(tmp_path / "w.safetensors"))
    module = Tied()
    load_weights(module, read_weights(str(tmp_path / "w.safetensors"))[0], "w", new_head=False)
    assert all(torch.equal(p, weights()[name]) for name, p in module.state_dict().items())


def test_two_values_for_one_tensor_are_refused_and_nothing_is_loaded():
    module, given = Tied(), {**weights(), "out.weight": torch.ones(4, 10)}
    before = {name: p.clone() for name, p in module.state_dict().items()}
    with pytest.raises(
        SettingError, match=r"in which inp\.weight and out\.weight are one tensor; leave one of them out"
    ):
        load_weights(module, given, "w", new_head=False)
    assert all(torch.equal(p, before[name]) for name, p in module.state_dict().items())


def test_a_tensor_that_is_missing_is_named_once():
    given = {name: p for name, p in weights().items() if name not in ("inp.weight", "out.weight")}
    with pytest.raises(SettingError, match=r"\(missing: inp\.weight\); name the model"):
        load_weights(Tied(), given, "w", new_head=False)


def test_a_new_head_that_would_lose_what_the_file_has_is_refused():
    module = Tied()
    before = {name: p.clone() for name, p in module.state_dict().items()}
    with pytest.raises(
        SettingError, match=r"start_head='new' .* shares out\.weight with inp\.weight: .*start_head='loaded'"
    ):
        load_weights(module, weights(), "w", new_head=True)
    assert all(torch.equal(p, before[name]) for name, p in module.state_dict().items())


def test_a_tie_elsewhere_leaves_a_new_head_possible():
    class Body(Tied):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(10, 3)

    torch.manual_seed(1)
    module = Body()
    kept = module.head.weight.clone()
    load_weights(
        module, {**weights(), "head.weight": torch.ones(3, 10), "head.bias": torch.ones(3)}, "w", new_head=True
    )
    assert torch.equal(module.head.weight, kept)
    assert torch.equal(module.out.weight, weights()["inp.weight"])


class SharedHead(nn.Module):
    def __init__(self):
        super().__init__()
        shared = nn.Linear(3, 3)
        self.steps = nn.Sequential(shared, nn.Linear(3, 3), shared)


class ListedAgain(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 2)
        self.listed = nn.ModuleList([self.body])


@pytest.mark.parametrize("made", [SharedHead, ListedAgain])
def test_a_layer_under_two_names_of_which_one_is_last_is_refused(made):
    with pytest.raises(ModelError, match=r"a layer under two names.*register it once, or the head last"):
        trained_names(made(), "head", 1)
    assert len(trained_names(made(), "all", 0)) == 4
    assert len(trained_names(made(), "last", 2)) == 4


def test_two_parameters_in_one_memory_are_refused():
    module = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3))
    check_memory(module)
    module[1].weight.data = module[0].weight.data
    with pytest.raises(ModelError, match=r"0\.weight and 1\.weight are two parameters in one memory"):
        Experiment.build(RunConfig(noise_multiplier=1.0), model=module)
    flat = torch.zeros(18)
    apart = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    apart[0].weight.data, apart[1].weight.data = flat[:9].view(3, 3), flat[9:].view(3, 3)
    check_memory(apart)


def test_the_tied_name_of_what_is_sent_does_not_count_in_the_fingerprint():
    def of(value, **changes):
        module = Tied()
        with torch.no_grad():
            for p in module.parameters():
                p.fill_(value)
        return Experiment.build(RunConfig(noise_multiplier=1.0, **changes), model=module).fingerprint

    assert of(0.0) == of(1.0)
    assert of(0.0, train_layers="head") != of(1.0, train_layers="head")


def test_a_run_with_a_tied_head_is_dp_sgd_of_one_tensor():
    """Both uses in one gradient, by the planned engine and by vmap."""
    torch.manual_seed(0)
    module = Tied()
    assignment, found = Assignment(round=1, event=PrivacyEvent(noise_multiplier=1.0, sample_rate=0.5, steps=1)), []
    for engine in ("planned", "vmap"):
        config = RunConfig(noise_multiplier=1.0, num_clients=2, train_layers="head", optimizer="dp-sgd", engine=engine)
        experiment = Experiment.build(config, model=module)
        found.append(experiment.client_round(0, assignment, experiment.trained(1), None).params)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("module", [nn.LazyLinear(10), nn.LazyBatchNorm1d(affine=False)])
def test_a_module_that_does_not_know_its_shapes_is_refused_in_one_line(module):
    with pytest.raises(ModelError, match=r"^Sequential does not know the shape of 1\.\w+ .*call it once on an example"):
        check_memory(nn.Sequential(nn.Flatten(), module))
