"""Exports are loaded with the library that they are for, and compute what the model of the run does."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from fed_dpsat.cli import app
from fed_dpsat.client.build import Experiment
from fed_dpsat.client.evaluation import predict
from fed_dpsat.data.dataset import Dataset, Examples
from fed_dpsat.data.sequences import Sequences
from fed_dpsat.errors import RunError, SettingError
from fed_dpsat.models.mlp import mlp
from fed_dpsat.models.pretrained import load_weights, read_weights
from fed_dpsat.run.export import export_run
from fed_dpsat.run.finished import read_run
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.simulation import simulate

CONFIG = RunConfig(num_clients=3, num_rounds=2, noise_multiplier=1.0, delta=1e-3, lr=8.0, sample_rate=0.1)
TEXTS = {"dataset": f"{__name__}:texts", "start_head": "new"}
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def texts():
    """Texts of 6 or 12 tokens below 50; the class is that of the first token."""

    def split(count, seed):
        tokens = torch.randint(1, 50, (count, 12), generator=torch.Generator().manual_seed(seed)).float()
        tokens[::3, 6:] = 0
        return Examples(inputs=tokens, labels=(tokens[:, 0] > 25).long(), mean=(0.0,) * 12, std=(1.0,) * 12)

    return Dataset(name="texts", train=split(60, 0), test=split(20, 1), class_names=("low", "high"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """``folder("bert")``: a folder of a small network with a head for something else."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers", reason='pip install "fed_dpsat[text]" to run these tests')
    gpt2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "bos_token_id": 1, "eos_token_id": 2}
    made = {
        "bert": lambda: transformers.BertForMaskedLM(
            transformers.BertConfig(vocab_size=50, max_position_embeddings=16, **SIZES)
        ),
        "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, **gpt2)),
        "vit": lambda: transformers.ViTForImageClassification(
            transformers.ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=3, **SIZES)
        ),
    }

    def make(kind):
        torch.manual_seed(5)
        made[kind]().save_pretrained(tmp_path / kind)
        return str(tmp_path / kind)

    return make


@pytest.fixture
def trained(folder, tmp_path):
    """``trained("bert", ...)``: the run folder of a small network that begins from its weights."""

    def run(kind, **changes):
        path = folder(kind)
        given = {"model": f"transformers:{path}", "start_from": path, "start_head": "new"}
        config = dataclasses.replace(CONFIG, **{**given, **(TEXTS if kind != "vit" else {}), **changes})
        simulate(config, tmp_path / "run")
        return tmp_path / "run"

    return run


def inputs_of(experiment):
    return experiment.dataset.test.batch(torch.arange(20), torch.device("cpu"))[0]


def logits_of(run):
    """Of the model of ``run`` for 20 test examples, and the inputs."""
    experiment, checkpoint = read_run(run, again="")
    found = torch.cat(
        [logits for logits, _ in predict(experiment.loss_fn.module, checkpoint.params, experiment.dataset.test)]
    )
    return found[:20], inputs_of(experiment)


def of_library(network, x):
    named = {"pixel_values": x} if x.ndim == 4 else {"input_ids": x.long()}
    if x.ndim == 2:
        named["attention_mask"] = x.ne(network.config.pad_token_id).long()
    with torch.no_grad():
        return network.eval()(**named).logits


def automatic(transformers, x):
    return (
        transformers.AutoModelForImageClassification if x.ndim == 4 else transformers.AutoModelForSequenceClassification
    )


CASES = [
    ("bert", {"adapter": "lora"}),
    ("gpt2", {"adapter": "lora", "adapter_rank": 2}),
    pytest.param("vit", {"adapter": "ffa-lora", "adapter_targets": "q_proj, v_proj"}, marks=pytest.mark.slow),
]


@pytest.mark.by_default("gpt2-*")
@pytest.mark.parametrize(("kind", "changes"), CASES)
def test_peft_loads_an_adapter_over_the_weights_that_it_began_from(kind, changes, trained, tmp_path):
    import transformers

    peft = pytest.importorskip("peft")
    run, out = trained(kind, **changes), tmp_path / "out"
    assert export_run(run, out) == ["adapter_config.json", "adapter_model.safetensors", "config.json", "run.toml"]
    expected, x = logits_of(run)
    config = transformers.AutoConfig.from_pretrained(out)
    torch.manual_seed(9)  # what the file does not have is drawn anew, such as the pooler of BERT
    base = automatic(transformers, x).from_pretrained(tmp_path / kind, config=config, ignore_mismatched_sizes=True)
    without = of_library(base, x)
    adapted = of_library(peft.PeftModel.from_pretrained(base, out), x)
    torch.testing.assert_close(adapted, expected, rtol=1e-5, atol=1e-5)
    assert float((without - expected).abs().max()) > 1e-4
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tmp_path / kind)


def test_peft_loads_an_adapter_of_a_network_that_gives_tokens(trained, tmp_path):
    """The head is that of the file: no file of the adapter has it."""
    import transformers

    peft = pytest.importorskip("peft")
    changes = {"adapter": "lora", "task": "causal-lm", "dataset": f"{__name__}:tokens", "start_head": "loaded"}
    run, out = trained("gpt2", **changes), tmp_path / "out"
    export_run(run, out)
    assert json.loads((out / "adapter_config.json").read_text())["modules_to_save"] == []
    expected, x = logits_of(run)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2")
    with torch.no_grad():
        found = peft.PeftModel.from_pretrained(base, out).eval()(**x).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def tokens():
    """Texts of 12 tokens, as sequences."""

    def split(count, seed):
        values = torch.randint(1, 50, (count * 12,), generator=torch.Generator().manual_seed(seed))
        offsets = torch.arange(count + 1) * 12
        text = Sequences(values=values, offsets=offsets, max_length=12, vocabulary_size=50)
        return Examples(inputs={"input_ids": text}, labels=None)

    return Dataset(name="tokens", train=split(60, 0), test=split(20, 1), class_names=())


@pytest.mark.by_default("gpt2-*", "bert-changes0")
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        *CASES,
        ("bert", {"adapter": "lora", "start_from": "", "start_head": "loaded"}),
        ("vit", {"train_layers": "bias"}),
    ],
)
def test_transformers_loads_a_whole_network(kind, changes, trained, tmp_path):
    import transformers

    run, out = trained(kind, **changes), tmp_path / "out"
    assert export_run(run, out, merge="adapter" in changes) == ["config.json", "model.safetensors", "run.toml"]
    expected, x = logits_of(run)
    network, found = automatic(transformers, x).from_pretrained(out, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    torch.testing.assert_close(of_library(network, x), expected, rtol=1e-5, atol=1e-5)
    names = ("low", "high") if kind != "vit" else tuple("0123456789")
    assert network.config.id2label == dict(enumerate(names))
    assert network.config.architectures == [type(network).__name__]


@pytest.mark.slow
def test_a_run_begins_from_an_export(trained, tmp_path):
    run = trained("bert", adapter="lora")
    export_run(run, tmp_path / "out", merge=True)
    expected, x = logits_of(run)
    config = dataclasses.replace(
        CONFIG, model=f"transformers:{tmp_path / 'out'}", start_from=str(tmp_path / "out"), dataset=TEXTS["dataset"]
    )
    with torch.no_grad():
        found = Experiment.build(config).loss_fn.module.eval()(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"adapter": "lora", "adapter_targets": "1"}])
def test_any_other_model_is_a_file_of_its_tensors(changes, tmp_path):
    if changes:
        pytest.importorskip("peft")
    config = dataclasses.replace(CONFIG, model="mlp", **changes)
    simulate(config, tmp_path / "run")
    assert export_run(tmp_path / "run", tmp_path / "out", merge=bool(changes)) == ["model.safetensors", "run.toml"]
    expected, x = logits_of(tmp_path / "run")
    model = mlp((1, 8, 8), 10)
    load_weights(model, read_weights(str(tmp_path / "out" / "model.safetensors"))[0], "out", new_head=False)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert (tmp_path / "out" / "run.toml").read_bytes() == (tmp_path / "run" / "config.toml").read_bytes()


@pytest.mark.slow
def test_a_network_that_transformers_cannot_build_is_a_file_of_its_tensors(folder, tmp_path):
    """Its configuration says BatchNorm, and the run has GroupNorm."""
    import transformers

    config = transformers.ResNetConfig(hidden_sizes=[16], depths=[1], embedding_size=16, layer_type="basic")
    config.save_pretrained(tmp_path / "resnet")
    simulate(dataclasses.replace(CONFIG, model=f"transformers:{tmp_path / 'resnet'}", norm="group"), tmp_path / "run")
    assert export_run(tmp_path / "run", tmp_path / "out") == ["model.safetensors", "run.toml"]
    experiment, checkpoint = read_run(tmp_path / "run", again="")
    saved = read_weights(str(tmp_path / "out" / "model.safetensors"))[0]
    assert saved.keys() == experiment.loss_fn.module.state_dict().keys()
    assert all(torch.equal(saved[name], p) for name, p in checkpoint.params.items())


def test_peft_loads_an_adapter_of_any_other_model(tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    base = two_layers((1, 8, 8), 10)
    torch.save(base.state_dict(), tmp_path / "base.pt")
    given = {"model": f"{__name__}:two_layers", "start_from": str(tmp_path / "base.pt"), "adapter": "lora"}
    simulate(dataclasses.replace(CONFIG, **given, adapter_targets="first"), tmp_path / "run")
    expected, x = logits_of(tmp_path / "run")
    files = export_run(tmp_path / "run", tmp_path / "out")
    assert files == ["adapter_config.json", "adapter_model.safetensors", "run.toml"]
    with torch.no_grad():
        found = peft.PeftModel.from_pretrained(base, tmp_path / "out")(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def two_layers(input_shape, num_classes):
    layers = {"flat": nn.Flatten(), "first": nn.Linear(64, 8), "tanh": nn.Tanh(), "head": nn.Linear(8, num_classes)}
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    return model


def test_the_command_lists_the_files_and_refuses_in_one_line(tmp_path):
    simulate(CONFIG, tmp_path / "run")
    arguments = ["export", str(tmp_path / "run"), str(tmp_path / "new" / "out")]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    names = ("model.safetensors", "run.toml")
    assert json.loads(done.stdout) == {"files": [str(tmp_path / "new" / "out" / name) for name in names]}
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2
    assert "out' is not new or empty; name another one" in again.output


@pytest.mark.parametrize(
    ("changes", "merge", "says"),
    [
        ({}, True, r"merge=True is not possible: .*run has no adapter; leave out --merge"),
        (
            {"adapter": "lora", "adapter_targets": "1"},
            False,
            r"merge=False is not possible: the base of .*run is in no file \(start_from=''\); add --merge",
        ),
        ({"personal_layers": "head"}, False, "a run with one model: personal_layers='head' stay with its clients"),
    ],
)
def test_what_is_in_no_file_is_refused(changes, merge, says, tmp_path):
    if "adapter" in changes:
        pytest.importorskip("peft")
    simulate(dataclasses.replace(CONFIG, model="mlp", **changes), tmp_path / "run")
    with pytest.raises(SettingError, match=says):
        export_run(tmp_path / "run", tmp_path / "out", merge=merge)
    assert not (tmp_path / "out").exists()


def test_a_name_that_peft_takes_for_others_is_refused(tmp_path):
    """peft looks for the ends of names: 3, the head, is the end of 1.3 too."""
    pytest.importorskip("peft")
    model = nested((1, 8, 8), 10)
    torch.save(model.state_dict(), tmp_path / "base.pt")
    given = {"model": f"{__name__}:nested", "start_from": str(tmp_path / "base.pt"), "adapter": "lora"}
    simulate(dataclasses.replace(CONFIG, **given, adapter_targets="1.3"), tmp_path / "run")
    with pytest.raises(SettingError, match=r"merge=False is not possible: no file of peft can have 1.3 alone; add"):
        export_run(tmp_path / "run", tmp_path / "out")
    export_run(tmp_path / "run", tmp_path / "merged", merge=True)


def nested(input_shape, num_classes):
    inner = nn.Sequential(nn.Identity(), nn.Identity(), nn.Identity(), nn.Linear(64, 8))
    return nn.Sequential(nn.Flatten(), inner, nn.Tanh(), nn.Linear(8, num_classes))


def test_frozen_layers_that_are_drawn_anew_are_refused(tmp_path, monkeypatch):
    """As by another version of torch: the run's own are in no file."""
    simulate(dataclasses.replace(CONFIG, model="mlp", train_layers="head"), tmp_path / "run")
    monkeypatch.setattr("fed_dpsat.data.federated.derive_seed", lambda seed, *, purpose: 7)
    with pytest.raises(RunError, match="the frozen layers of its model are other ones when they are built again"):
        export_run(tmp_path / "run", tmp_path / "out")
