"""Libraries that are extras, and small networks of transformers on disk."""

import pytest
import torch

REASON = 'pip install "fed_dpsat[text,vision]" to run these tests'
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 50,
    "max_position_embeddings": 32,
}
GPT2 = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 50, "n_positions": 32}
NO_MARKS = {"bos_token_id": 1, "eos_token_id": 2}
CONFIGS = {
    "bert": ("BertConfig", SMALL),
    "roberta": ("RobertaConfig", SMALL),
    "distilbert": ("DistilBertConfig", {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 48, "vocab_size": 50}),
    "gpt2": ("GPT2Config", GPT2 | NO_MARKS),
    "llama": ("LlamaConfig", SMALL | {"num_key_value_heads": 2} | NO_MARKS),
    "vit": (
        "ViTConfig",
        {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48, "patch_size": 4},
    ),
    "resnet": ("ResNetConfig", {"hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8, "layer_type": "basic"}),
}


@pytest.fixture
def timm():
    return pytest.importorskip("timm", reason=REASON)


@pytest.fixture
def torchvision():
    return pytest.importorskip("torchvision")


@pytest.fixture
def transformers(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("transformers", reason=REASON)


@pytest.fixture
def folder(transformers, tmp_path):
    """``folder("bert")``: a folder with the configuration of a small network of that kind."""

    def make(kind):
        name, settings = CONFIGS[kind]
        getattr(transformers, name)(**settings).save_pretrained(tmp_path / kind)
        return tmp_path / kind

    return make


@pytest.fixture
def texts():
    """``texts(B, T, pad)``: numbers of tokens from 5 to 49 as float32, the first of them padded from its half on."""

    def make(batch, length, pad=None):
        tokens = torch.randint(5, 50, (batch, length), generator=torch.Generator().manual_seed(1)).float()
        if pad is not None:
            tokens[0, length // 2 :] = pad
        return tokens

    return make
