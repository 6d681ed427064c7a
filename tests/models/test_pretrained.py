"""Weights from a file fit or say what differs, and what is frozen is no parameter of the run."""

from __future__ import annotations

import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fed_dpsat.errors import SettingError
from fed_dpsat.models.mlp import mlp
from fed_dpsat.models.pretrained import head_names, load_weights, read_weights, trained_names
from fed_dpsat.models.ties import layers


def state(seed=0, classes=10):
    torch.manual_seed(seed)
    return mlp((1, 2, 2), classes, hidden=3).state_dict()


@pytest.fixture
def model():
    torch.manual_seed(1)
    return mlp((1, 2, 2), 10, hidden=3)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("kind", ["safetensors", "torch", "checkpoint", "run folder"])
def test_a_file_is_read_whatever_wrote_it(kind, tmp_path):
    path = start_from = tmp_path / "weights.pt"
    if kind == "safetensors":
        path = start_from = tmp_path / "weights.safetensors"
        save_file(state(), path)
    elif kind == "torch":
        torch.save(state(), path)
    else:
        if kind == "run folder":
            start_from, path = tmp_path, tmp_path / "checkpoint" / "model.pt"
            path.parent.mkdir()
        torch.save({"round": 3, "params": dict(state()), "server": {}, "cannot_resume": ""}, path)
    weights, digest = read_weights(str(start_from))
    assert same(weights, state())
    assert len(digest) == 64


def test_another_file_is_another_digest(tmp_path):
    digests = []
    for seed in (0, 1):
        torch.save(state(seed), tmp_path / "w.pt")
        digests.append(read_weights(str(tmp_path / "w.pt"))[1])
    assert digests[0] != digests[1]


class Evil:
    def __reduce__(self):
        return print, ("code of the file's ran",)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.write_text("weights"), "is not a file of weights"),
        (lambda path: path.write_bytes(pickle.dumps(Evil())), "is not a file of weights"),
        (lambda path: torch.save(torch.nn.Linear(2, 2), path), "it is no archive of tensors, or holds other objects"),
        (lambda path: torch.save({"model": state()}, path), "save model.state_dict.. alone"),
        (lambda path: torch.save([1, 2], path), "is not tensors by name"),
        (lambda path: torch.save({**state(), "1.bias": torch.full((3,), torch.nan)}, path), "1.bias hold NaN or inf"),
    ],
)
def test_what_is_no_file_of_weights_is_refused(make, says, tmp_path, capsys):
    path = tmp_path / "w.pt"
    make(path)
    with pytest.raises(SettingError, match=says):
        read_weights(str(path))
    assert "ran" not in capsys.readouterr().out


def test_a_damaged_safetensors_file_is_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(SettingError, match=r"w.safetensors' is not a file of weights"):
        read_weights(str(path))


def test_all_parameters_are_loaded(model):
    load_weights(model, state(), "w", new_head=False)
    assert same(model.state_dict(), state())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: w.pop("1.weight"), r"\(missing: 1.weight\); name the model it was saved from"),
        (lambda w: w.update(extra=torch.ones(1)), r"\(not in the model: extra\); name the model"),
        (
            lambda w: w.update({"1.weight": torch.ones(2, 2)}),
            r"\(shapes: 1.weight \[2, 2\], where the model has \[3, 4\]\); name the model",
        ),
        (
            lambda w: w.update(state(classes=5)),
            r"3.weight \[5, 3\], where the model has \[10, 3\], 3.bias \[5\], .*; set start_head='new' to begin with",
        ),
        (lambda w: w.pop("3.bias"), "set start_head='new'"),
        (
            lambda w: w.update({f"x{i}": torch.ones(1) for i in range(12)}),
            "not in the model: x0, x1, x2, x3, x4, x5, x6, x7 and 4 more",
        ),
    ],
)
def test_weights_of_another_model_say_what_differs(change, says, model):
    weights, before = dict(state()), {name: p.clone() for name, p in model.state_dict().items()}
    change(weights)
    with pytest.raises(SettingError, match=says):
        load_weights(model, weights, "w", new_head=False)
    assert same(model.state_dict(), before)


@pytest.mark.parametrize("classes", [5, 10, None])
def test_a_new_head_stays_as_it_was_initialised(classes, model):
    head = {name: p.clone() for name, p in model.state_dict().items() if name.startswith("3.")}
    weights = {n: p for n, p in state(classes=classes or 10).items() if classes or not n.startswith("3.")}
    load_weights(model, weights, "w", new_head=True)
    assert same({n: p for n, p in model.state_dict().items() if n in head}, head)
    assert same(
        {n: p for n, p in model.state_dict().items() if n not in head}, {n: state()[n] for n in ("1.weight", "1.bias")}
    )


def test_half_precision_is_loaded_into_the_models_type(model):
    load_weights(model, {name: p.half() for name, p in state().items()}, "w", new_head=False)
    assert same(model.state_dict(), {name: p.half().float() for name, p in state().items()})


class Body(nn.Module):
    """A parameter of its own, a layer without parameters, a buffer, a shared layer."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.first = nn.Linear(2, 2)
        self.norm = nn.GroupNorm(1, 2, affine=False)
        self.again = self.first
        self.register_buffer("place", torch.ones(2))
        self.head = nn.Linear(2, 3, bias=False)


def test_layers_are_counted_once_in_order():
    assert layers(Body()) == {"": ["scale"], "first": ["first.weight", "first.bias"], "head": ["head.weight"]}
    assert head_names(Body()) == ["head.weight"]


def test_a_buffer_may_be_missing_from_the_file():
    body, other = Body(), Body()
    load_weights(
        body,
        {n: p for n, p in other.state_dict().items() if n in dict(other.named_parameters(remove_duplicate=False))},
        "w",
        new_head=False,
    )
    assert torch.equal(body.first.weight, other.first.weight)


@pytest.mark.parametrize(
    ("train_layers", "last_layers", "names"),
    [
        ("all", 1, ["scale", "first.weight", "first.bias", "head.weight"]),
        ("head", 1, ["head.weight"]),
        ("head-then-all", 1, ["head.weight"]),
        ("bias", 1, ["first.bias", "head.weight"]),
        ("last", 1, ["head.weight"]),
        ("last", 2, ["first.weight", "first.bias", "head.weight"]),
        ("last", 3, ["scale", "first.weight", "first.bias", "head.weight"]),
    ],
)
def test_what_is_trained(train_layers, last_layers, names):
    assert trained_names(Body(), train_layers, last_layers) == names


def test_more_layers_than_there_are_is_refused():
    with pytest.raises(SettingError, match="last_layers=4 is not at most 3, the layers of the model; lower it"):
        trained_names(Body(), "last", 4)


def test_a_frozen_head_cannot_be_trained_alone():
    body = Body()
    body.head.requires_grad_(False)
    assert trained_names(body, "all", 1) == ["scale", "first.weight", "first.bias"]
    with pytest.raises(SettingError, match="train_layers='head' is not a choice that trains anything"):
        trained_names(body, "head", 1)


class Biases(nn.Module):
    """Biases of every kind, and what only has the name of one."""

    def __init__(self):
        super().__init__()
        self.q_bias = nn.Parameter(torch.zeros(2))
        self.position_bias_table = nn.Parameter(torch.zeros(3, 2))
        self.norm, self.conv = nn.LayerNorm(2), nn.Conv2d(1, 2, 3)
        self.attention, self.rnn = nn.MultiheadAttention(2, 1), nn.RNN(2, 2)
        self.head = nn.Linear(2, 3)


def test_biases_of_every_layer_and_the_head():
    assert trained_names(Biases(), "bias", 1) == [
        "q_bias", "norm.bias", "conv.bias", "attention.in_proj_bias", "attention.out_proj.bias", "rnn.bias_ih_l0",
        "rnn.bias_hh_l0", "head.weight", "head.bias",
    ]  # fmt: skip


def test_a_body_without_biases_is_refused():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2))
    with pytest.raises(SettingError, match=r"train_layers='bias' is not possible .* no bias; set train_layers=head"):
        trained_names(model, "bias", 1)
