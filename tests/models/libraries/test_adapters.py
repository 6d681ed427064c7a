"""Adapters of peft: what is trained beside the head, what is refused, and gradients that equal a loop over examples."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn

from fed_dpsat.errors import SettingError
from fed_dpsat.models.libraries.adapters import add_adapter, remove_adapter
from fed_dpsat.models.pretrained import trained_names
from fed_dpsat.params import trainable
from fed_dpsat.plugins import build
from fed_dpsat.step.clipping import FlatClipping
from fed_dpsat.step.gradients.per_example import ModelLoss, clipped_gradient_sum
from fed_dpsat.step.gradients.plan import plan_table

pytest.importorskip("peft", reason='pip install "fed_dpsat[text]" to run these tests')

LENGTH, CLASSES = 8, 3
TEXT, IMAGE = (LENGTH,), (1, 8, 8)
HEAD = ["network.classifier.weight", "network.classifier.bias"]


@pytest.fixture
def make(folder):
    """``make("bert", "lora", targets="query")``: a small network with an adapter of rank 2 and scale 2."""

    def of(kind, adapter="", targets="", shape=TEXT, seed=0, **given):
        torch.manual_seed(seed)
        settings = {"input_shape": shape, "num_classes": CLASSES, **given}
        model = build("model", f"transformers:{folder(kind)}", settings)
        if adapter:
            add_adapter(model, adapter, rank=2, alpha=4, targets=targets)
        return model

    return of


def moved(model):
    """``model`` with B away from zero, so that A has gradients."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_B." in name:
                p.normal_(std=0.3)
    return model


def examples(shape, count=5):
    generator = torch.Generator().manual_seed(1)
    if shape == TEXT:
        x = torch.randint(5, 50, (count, LENGTH), generator=generator).float()
        x[0, LENGTH // 2 :] = 0
        return x
    return torch.rand(count, *shape, generator=generator)


@pytest.mark.parametrize(("adapter", "parts"), [("lora", ["lora_A", "lora_B"]), ("ffa-lora", ["lora_B"])])
def test_the_adapter_and_the_head_are_all_that_is_trained(make, adapter, parts):
    model = make("bert", adapter)
    layers = [f"network.bert.encoder.layer.0.attention.self.{name}" for name in ("query", "value")]
    names = [f"{layer}.{part}.default.weight" for layer in layers for part in parts]
    assert list(trainable(model)) == names + HEAD
    count = sum(p.numel() for p in trainable(model).values())
    assert count == len(names) * 2 * 32 + 32 * CLASSES + CLASSES


def test_targets_are_ends_of_names(make):
    model = make("bert", "lora", "attention.output.dense, key")
    found = {name.split(".lora_")[0].rpartition("layer.0.")[2] for name in trainable(model) if "lora" in name}
    assert found == {"attention.output.dense", "attention.self.key"}


def test_a_head_of_two_layers_is_trained_as_a_whole(make):
    head = [name for name in trainable(make("roberta", "lora")) if "lora" not in name]
    assert [name.removeprefix("network.classifier.") for name in head] == [
        "dense.weight", "dense.bias", "out_proj.weight", "out_proj.bias",
    ]  # fmt: skip


@pytest.mark.parametrize(("kind", "task"), [("gpt2", "causal-lm"), ("llama", "causal-lm"), ("bert", "masked-lm")])
def test_the_head_of_a_network_that_gives_tokens_stays(make, kind, task):
    """It is pre-trained, and as large as the vocabulary; that of GPT-2 is its embedding."""
    given = {"task": task, "vocabulary_size": 50, "mask_token": 1}
    assert all(".lora_" in name for name in trainable(make(kind, "lora", **given)))
    if kind != "llama":  # which has no biases
        model = make(kind, **given)
        assert {name.rpartition(".")[2] for name in trained_names(model, "bias", 1)} == {"bias"}


def test_the_network_computes_what_it_did_before(make):
    plain, adapted = make("bert").eval(), make("bert", "lora").eval()
    assert torch.equal(plain(examples(TEXT)), adapted(examples(TEXT)))


def test_a_message_is_below_a_hundredth_of_the_network(transformers, tmp_path):
    """Of the size of MiniLM, without its numbers."""
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    transformers.BertConfig(**sizes).save_pretrained(tmp_path)
    with torch.device("meta"):
        model = build("model", f"transformers:{tmp_path}", {"input_shape": (64,), "num_classes": 2})
        whole = sum(p.numel() for p in model.parameters())
        add_adapter(model, "lora", rank=8, alpha=16)
    sent = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert whole == 22_713_986
    assert sent == 6 * 2 * 8 * (384 + 384) + 2 * 384 + 2
    assert sent < 0.01 * whole


CASES = [
    ("bert", "lora", "", TEXT),
    ("bert", "ffa-lora", "", TEXT),
    ("bert", "bias", "", TEXT),
    ("gpt2", "lora", "", TEXT),
    ("vit", "lora", "q_proj, v_proj", IMAGE),
    ("vit", "bias", "", IMAGE),
    ("convolution", "lora", "0, 2", IMAGE),
]


@pytest.mark.parametrize(("kind", "what", "targets", "shape"), CASES)
def test_clipped_sums_equal_a_loop_over_single_examples(make, kind, what, targets, shape):
    """In float64, one example at a time; the engine plans every layer."""
    model = _of(make, kind, what, targets, shape)
    x, y = examples(shape), torch.arange(5) % CLASSES
    assert plan_table(model, x, kernels="torch")[1] == ""
    double = copy.deepcopy(model).double()
    leaves = {name: p for name, p in double.named_parameters() if p.requires_grad}
    rows = []
    for i in range(len(x)):
        loss = nn.functional.cross_entropy(double(x[i : i + 1].double()), y[i : i + 1])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(leaves.values()))]))
    norms = torch.stack(rows).norm(dim=1)
    bound = float(norms.median())
    expected = sum(row * min(1.0, bound / float(norm)) for row, norm in zip(rows, norms, strict=True))
    found, dropped = clipped_gradient_sum(
        ModelLoss(model), trainable(model), (x, y), FlatClipping(clip_norm=bound), engine="planned"
    )
    assert not dropped
    assert found.keys() == leaves.keys()
    torch.testing.assert_close(
        torch.cat([g.flatten() for g in found.values()]).double(), expected, rtol=1e-4, atol=1e-6
    )


def _of(make, kind, what, targets, shape):
    if kind == "convolution":
        model = convolution()
        add_adapter(model, what, rank=2, alpha=4, targets=targets)
        return moved(model)
    if what != "bias":
        return moved(make(kind, what, targets, shape)).eval()
    model = make(kind, shape=shape)
    names = trained_names(model, "bias", 1)
    for name, p in model.named_parameters():
        p.requires_grad_(name in names)
    return model.eval()


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_merged_adapter_computes_the_same(make, kind):
    model, plain, x = moved(make(kind, "lora")).eval(), make(kind).eval(), examples(TEXT)
    before = model(x)
    remove_adapter(model, merge=True)
    assert model.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-6)
    assert float((plain(x) - before).detach().abs().max()) > 1e-4


def convolution():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def test_other_modules_have_adapters_by_name():
    model, x = convolution(), examples(IMAGE)
    before = model(x)
    add_adapter(model, "lora", rank=2, alpha=2, targets="0, 2")
    assert torch.equal(model(x), before)
    parts = [f"{layer}.{part}.default.weight" for layer in (0, 2) for part in ("lora_A", "lora_B")]
    assert list(trainable(model)) == [*parts, "4.weight", "4.bias"]
    adapted = moved(model)(x)
    remove_adapter(model, merge=True)
    assert list(dict(model.named_parameters())) == ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"]
    torch.testing.assert_close(model(x), adapted, rtol=1e-5, atol=1e-5)


def test_networks_of_timm_have_adapters(timm):
    arguments = "patch_size = 4, embed_dim = 16, depth = 1, num_heads = 2"
    given = {"input_shape": IMAGE, "num_classes": CLASSES}
    model = build("model", "timm:vit_tiny_patch16_224", given, arguments)
    add_adapter(model, "ffa-lora", rank=2, alpha=4, targets="qkv")
    assert list(trainable(model)) == ["blocks.0.attn.qkv.lora_B.default.weight", "head.weight", "head.bias"]


def test_a_head_that_is_frozen_stays_frozen():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].requires_grad_(False)
    add_adapter(model, "ffa-lora", rank=1, alpha=1, targets="0")
    assert list(trainable(model)) == ["0.lora_B.default.weight"]


@pytest.mark.parametrize(
    ("kind", "targets", "shape", "says"),
    [
        ("bert", "query, valu", TEXT, "no 'valu'; did you mean value"),
        ("bert", "foo", TEXT, "no 'foo'; linear layers and convolutions are query, key, value, dense"),
        ("bert", "classifier", TEXT, "classifier is of the head, which has no adapter"),
        ("roberta", "dense", TEXT, "classifier.dense is of the head"),
        ("bert", "encoder", TEXT, "bert.encoder is a BertEncoder, not a linear layer"),
        ("vit", "", IMAGE, "adapter_targets='' is not possible for model_type='vit', for which peft has no targets"),
    ],
)
def test_targets_that_cannot_be_are_refused(make, kind, targets, shape, says):
    with pytest.raises(SettingError, match=says):
        make(kind, "lora", targets, shape)


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 2)


class Shared(nn.Module):
    """A layer under two names, and two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.first, self.one, self.other, self.head = (nn.Linear(4, 4) for _ in range(4))
        self.again, self.other.weight = self.first, self.one.weight
        self.last = nn.Linear(4, 2)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.middle, self.head = nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight


@pytest.mark.parametrize(
    ("model", "targets", "says"),
    [
        (Attending, "out_proj", "out_proj is in a MultiheadAttention, which reads its weight itself"),
        (Attending, "linear1", "linear1 is in a TransformerEncoderLayer, which reads its weight itself"),
        (Attending, "self_attn", "is a MultiheadAttention, not a linear layer"),
        (Shared, "first", "first stands under two names"),
        (Shared, "one", "one shares its weight with another layer"),
        (Tied, "middle", "adapter='lora' is not possible with a head that shares head.weight with embedding.weight"),
        (Tied, "", "with a head that shares"),
        (lambda: nn.Sequential(nn.Linear(4, 2)), "", "for Sequential, for which peft has no .*no layer can have one"),
        (
            lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 2)),
            "0",
            "a weight of its own",
        ),
        (lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.Linear(4, 2)), "0", "adapter_rank=2 is not possible"),
    ],
)
def test_layers_that_would_compute_something_else_are_refused(model, targets, says):
    with pytest.raises(SettingError, match=says):
        add_adapter(model(), "lora", rank=2, alpha=2, targets=targets)


def test_without_the_refusal_an_adapter_has_no_effect(monkeypatch):
    """The wrong version: torch reads the weight of ``out_proj`` and never calls the adapter."""
    monkeypatch.setattr("fed_dpsat.models.libraries.adapters.READERS", ())
    torch.manual_seed(0)
    model = Attending().eval()
    add_adapter(model, "lora", rank=2, alpha=2, targets="out_proj")
    before = model.layer(torch.ones(1, 3, 8))
    moved(model)
    assert torch.equal(model.layer(torch.ones(1, 3, 8)), before)


def test_a_second_adapter_is_refused(make):
    model = make("bert", "lora")
    with pytest.raises(SettingError, match="possible for a model that has adapters"):
        add_adapter(model, "lora", rank=2, alpha=2)


def test_without_peft_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        SettingError, match=r"adapter='lora' is not possible without peft; pip install .fed_dpsat\[text\]"
    ):
        add_adapter(nn.Sequential(nn.Linear(2, 2)), "lora", rank=1, alpha=1)
