"""Classifiers of transformers: padding counts for nothing, no example decides for another, and files are loaded."""

import copy
import importlib
import pickle

import pytest
import torch
from torch.func import functional_call, grad, vmap

from fed_dpsat.errors import ModelError, SettingError
from fed_dpsat.models.pretrained import head_names, load_weights, read_weights, trained_names
from fed_dpsat.plugins import build
from fed_dpsat.step.gradients.skipped import ask_no_batch
from fed_dpsat.testing import check_model

TEXTS = ("bert", "roberta", "distilbert", "gpt2", "llama")
LENGTH = 12


def make(folder, shape=(LENGTH,), arguments="", classes=4, seed=0):
    torch.manual_seed(seed)
    return build("model", f"transformers:{folder}", {"input_shape": shape, "num_classes": classes}, arguments)


@pytest.mark.parametrize("kind", TEXTS)
def test_texts_have_one_row_of_logits_each(kind, folder, texts):
    model, x = make(folder(kind)).eval(), texts(3, LENGTH)
    assert model(x).shape == (3, 4)
    torch.testing.assert_close(model(x), torch.cat([model(row) for row in x.split(1)]))
    torch.testing.assert_close(model({"input_ids": x.long()}), model(x))
    torch.testing.assert_close(model(input_ids=x.long()), model(x))


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
def test_padding_counts_for_nothing(kind, folder, texts):
    model = make(folder(kind)).eval()
    x = texts(2, LENGTH, pad=model.pad_token_id)
    torch.testing.assert_close(model(x)[:1], model(x[:1, : LENGTH // 2]))
    whole = texts(2, LENGTH)
    assert not torch.allclose(model(x)[:1], model(whole)[:1])


def test_a_network_without_padding_reads_its_last_token(folder, texts):
    model, x = make(folder("llama")).eval(), texts(2, LENGTH)
    assert model.network.model.embed_tokens.padding_idx is None
    other = x.clone()
    other[:, -1] = 7
    assert not torch.allclose(model(x), model(other))
    padded = make(folder("llama"), arguments="pad_token_id = 0").eval()
    torch.testing.assert_close(padded(torch.cat([x, torch.zeros(2, 3)], dim=1)), padded(x))


@pytest.mark.parametrize("kind", TEXTS)
def test_gradients_of_padded_texts_equal_a_loop(kind, folder, texts):
    """``vmap`` fails if a number is read off the batch, as transformers' own mask does."""
    model = make(folder(kind)).eval().double()
    x = texts(3, LENGTH, pad=max(0, model.pad_token_id))
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params, x):
        return functional_call(model, params, (x[None],))[0, 0]

    ask_no_batch()
    together = vmap(grad(loss), in_dims=(None, 0))(params, x)
    for i, row in enumerate(x):
        alone = grad(loss)(params, row)
        for name, g in alone.items():
            torch.testing.assert_close(together[name][i], g, rtol=1e-8, atol=1e-10)


def test_without_the_repair_the_mask_of_transformers_reads_the_batch(folder, texts, monkeypatch):
    """The wrong version of the test above."""
    masks = importlib.import_module("transformers.masking_utils")
    monkeypatch.setattr(masks, "is_tracing", getattr(masks.is_tracing, "of_transformers", masks.is_tracing))
    model = make(folder("bert")).eval()
    params = {name: p.detach() for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="data-dependent"):
        vmap(lambda x: functional_call(model, params, (x[None],))[0])(texts(3, LENGTH, pad=0))


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_texts_conform(kind, folder):
    path = folder(kind)
    check_model(lambda: make(path, classes=10), inputs=torch.randint(50, (4, LENGTH)).float())


def test_images_have_the_channels_and_size_of_the_data(folder):
    path = folder("vit")
    assert make(path, (1, 8, 8))(torch.zeros(2, 1, 8, 8)).shape == (2, 4)
    check_model(lambda: make(path, (1, 8, 8), classes=10), input_shape=(1, 8, 8))


def test_a_copy_and_a_pickle_compute_the_same(folder, texts):
    model, x = make(folder("bert")).eval(), texts(2, LENGTH)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))


def test_arguments_reach_the_configuration(folder):
    assert len(make(folder("bert"), arguments="num_hidden_layers = 2").network.bert.encoder.layer) == 2
    with pytest.raises(ModelError, match="takes no 'num_hidden_layer'; did you mean num_hidden_layers"):
        make(folder("bert"), arguments="num_hidden_layer = 2")


def test_a_wrong_folder_leads_to_near_ones(folder):
    path = folder("bert")
    with pytest.raises(ModelError, match=r"'.*brt' is not a folder with a config.json; did you mean .*bert"):
        make(path.parent / "brt")
    with pytest.raises(ModelError, match=r"'bert-base-uncased' is not a folder .* nothing is downloaded"):
        make("bert-base-uncased")


@pytest.mark.parametrize(
    ("kind", "shape", "message"),
    [
        ("bert", (40,), "texts of 40 tokens are longer than its 32 positions; shorten them"),
        ("bert", (3, 8, 8), "of images for model_type='bert'"),
        ("vit", (8,), "of texts for model_type='vit'"),
        ("bert", (3, 8), r"input_shape=\(3, 8\) is neither"),
    ],
)
def test_data_that_do_not_fit_are_refused(kind, shape, message, folder):
    with pytest.raises(ModelError, match=message):
        make(folder(kind), shape)


def saved(transformers, path, name, classes=4):
    """A network of transformers with other weights, and the folder that it is saved in."""
    config = transformers.AutoConfig.from_pretrained(path, num_labels=classes)
    torch.manual_seed(5)
    network = getattr(transformers, name)(config)
    network.save_pretrained(path / name)
    return network, str(path / name)


def test_a_whole_file_is_loaded(transformers, folder, texts):
    path = folder("roberta")
    network, start_from = saved(transformers, path, "RobertaForSequenceClassification")
    model = make(path)
    assert load_weights(model, read_weights(start_from)[0], start_from, new_head=False) == []
    x = texts(2, LENGTH).long()
    assert torch.equal(model.eval()(x), network.eval()(input_ids=x, attention_mask=torch.ones_like(x)).logits)


@pytest.mark.parametrize(
    ("kind", "name", "classes", "says"),
    [
        (
            "bert",
            "BertModel",
            4,
            r"missing: network.classifier.weight, network.classifier.bias\); set start_head='new'",
        ),
        ("bert", "BertForSequenceClassification", 7, r"network.classifier.weight \[7, 32\].*; set start_head='new'"),
        ("roberta", "RobertaForMaskedLM", 4, "not in the model: network.lm_head.*; set start_head='new'"),
        ("gpt2", "GPT2LMHeadModel", 4, r"missing: network.score.weight\); set start_head='new'"),
        ("llama", "LlamaForCausalLM", 4, "not in the model: network.lm_head.weight.*; set start_head='new'"),
    ],
)
def test_a_file_of_another_head_gives_the_body(kind, name, classes, says, transformers, folder):
    path = folder(kind)
    network, start_from = saved(transformers, path, name, classes)
    weights, model = read_weights(start_from)[0], make(path)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(SettingError, match=says):
        load_weights(model, weights, start_from, new_head=False)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    load_weights(model, weights, start_from, new_head=True)
    head = set(head_names(model))
    body = dict(network.base_model.named_parameters())
    for name, p in model.named_parameters():
        wanted = before[name] if name in head else body[name.split(".", 2)[2]]
        assert torch.equal(p, wanted), name


def test_the_body_of_another_size_is_refused(transformers, folder):
    path = folder("bert")
    _, start_from = saved(transformers, path, "BertModel")
    model = make(path, arguments="intermediate_size = 64")
    with pytest.raises(SettingError, match=r"shapes: .*layer.0.intermediate.dense.weight \[48, 32\]"):
        load_weights(model, read_weights(start_from)[0], start_from, new_head=True)


def test_what_a_run_saved_is_loaded_under_its_own_names(folder):
    path = folder("bert")
    model, other = make(path), make(path, seed=1)
    load_weights(model, other.state_dict(), "w", new_head=False)
    assert all(torch.equal(p, other.state_dict()[name]) for name, p in model.state_dict().items())


def test_loading_leaves_the_generator_alone(transformers, folder):
    path = folder("bert")
    _, start_from = saved(transformers, path, "BertModel")
    model = make(path)
    before = torch.get_rng_state()
    load_weights(model, read_weights(start_from)[0], start_from, new_head=True)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_head_that_is_trained_alone_is_the_last_layer(folder):
    assert trained_names(make(folder("roberta")), "head", 1) == [
        "network.classifier.out_proj.weight", "network.classifier.out_proj.bias",
    ]  # fmt: skip
