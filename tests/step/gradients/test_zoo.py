"""Networks of other libraries at a tiny size: one pass over the batch, equal to a loop over single examples."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fed_dpsat.params import trainable
from fed_dpsat.step.clipping import FlatClipping
from fed_dpsat.step.draws import Draws
from fed_dpsat.step.gradients.per_example import ModelLoss, clipped_gradient_sum

BATCH, LENGTH, WORDS, PAD, CLASSES = 6, 7, 23, 0, 3
KEY = bytes(range(16))
ATTENTIONS = ("sdpa", "eager")


def library(name, *parts):
    """``name`` and its modules ``parts``, or a skip."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = pytest.importorskip(name, reason=f"{name} is not installed", exc_type=Exception)
        for part in parts:
            found = pytest.importorskip(f"{name}.{part}", reason=f"{name}.{part} is not there", exc_type=Exception)
    return found


class Texts(nn.Module):
    """Logits of ``network`` for tokens ``[B, T]``, whose attention leaves out what is padded."""

    def __init__(self, network, *, masked=True, **others):
        super().__init__()
        self.network, self.masked, self.others = network, masked, others

    def forward(self, tokens):
        mask = {"attention_mask": (tokens != PAD).long()} if self.masked else {}
        return self.network(input_ids=tokens, **mask, **self.others).logits


class Images(nn.Module):
    """Logits of a network of transformers for images."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(pixel_values=x).logits


class Sequences(nn.Module):
    """A network over the embedded tokens, and a head for the mean."""

    def __init__(self, network, decodes=False):
        super().__init__()
        self.words, self.network, self.head = nn.Embedding(WORDS, 8), network, nn.Linear(8, CLASSES)
        self.decodes = decodes

    def forward(self, tokens):
        x, padded = self.words(tokens), tokens == PAD
        if self.decodes:
            causal = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], dtype=x.dtype)
            out = self.network(x, x.flip(1), tgt_mask=causal, memory_key_padding_mask=padded.flip(1))
        else:
            out = self.network(x, src_key_padding_mask=padded)
        return self.head(out.mean(1))


def of_next(logits, tokens):
    """The mean cross-entropy of each next token."""
    losses = functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return losses.view(len(tokens), -1).mean(1)


# torchvision


def torchvision_vit(p, attention):
    vit = library("torchvision", "models.vision_transformer").VisionTransformer
    return vit(
        image_size=8,
        patch_size=4,
        num_layers=2,
        num_heads=2,
        hidden_dim=8,
        mlp_dim=16,
        dropout=p,
        attention_dropout=p,
        num_classes=CLASSES,
    )


def torchvision_swin(p, attention):
    swin = library("torchvision", "models.swin_transformer").SwinTransformer
    return swin(
        patch_size=[2, 2],
        embed_dim=8,
        depths=[2, 1],
        num_heads=[2, 4],
        window_size=[2, 2],
        mlp_ratio=2.0,
        dropout=p,
        attention_dropout=p,
        stochastic_depth_prob=p,
        num_classes=CLASSES,
    )


def torchvision_swin_v2(p, attention):
    swin = library("torchvision", "models.swin_transformer")
    return swin.SwinTransformer(
        patch_size=[2, 2],
        embed_dim=8,
        depths=[2, 1],
        num_heads=[2, 4],
        window_size=[2, 2],
        mlp_ratio=2.0,
        dropout=p,
        attention_dropout=p,
        stochastic_depth_prob=p,
        num_classes=CLASSES,
        block=swin.SwinTransformerBlockV2,
        downsample_layer=swin.PatchMergingV2,
    )


def torchvision_convnext(p, attention):
    convnext = library("torchvision", "models.convnext")
    blocks = [convnext.CNBlockConfig(8, 12, 1), convnext.CNBlockConfig(12, None, 2)]
    return convnext.ConvNeXt(blocks, stochastic_depth_prob=p, layer_scale=0.5, num_classes=CLASSES)


# timm


def timm_vit(p, attention, **others):
    vit = library("timm", "models.vision_transformer").VisionTransformer
    model = vit(
        img_size=8,
        patch_size=4,
        embed_dim=8,
        depth=2,
        num_heads=2,
        mlp_ratio=2,
        num_classes=CLASSES,
        drop_rate=p,
        pos_drop_rate=p,
        proj_drop_rate=p,
        attn_drop_rate=p,
        drop_path_rate=p,
        **others,
    )
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = attention == "sdpa"
    return model


def timm_vit_registers(p, attention):
    return timm_vit(p, attention, reg_tokens=2, init_values=0.3, qk_norm=True, class_token=False, global_pool="avg")


def timm_deit(p, attention):
    deit = library("timm", "models.deit").VisionTransformerDistilled
    model = deit(
        img_size=8,
        patch_size=4,
        embed_dim=8,
        depth=2,
        num_heads=2,
        mlp_ratio=2,
        num_classes=CLASSES,
        drop_rate=p,
        attn_drop_rate=p,
        drop_path_rate=p,
    )
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = attention == "sdpa"
    return model


def timm_convnext(p, attention):
    convnext = library("timm", "models.convnext").ConvNeXt
    return convnext(
        depths=(1, 1, 1, 1),
        dims=(4, 8, 8, 12),
        num_classes=CLASSES,
        drop_rate=p,
        drop_path_rate=p,
        ls_init_value=0.5,
        kernel_sizes=3,
        conv_mlp=attention == "eager",
    )


def timm_mixer(p, attention):
    mixer = library("timm", "models.mlp_mixer").MlpMixer
    return mixer(
        img_size=8,
        patch_size=4,
        num_blocks=2,
        embed_dim=8,
        num_classes=CLASSES,
        drop_rate=p,
        proj_drop_rate=p,
        drop_path_rate=p,
    )


# transformers


def made(kind, config, attention):
    transformers = library("transformers")
    config = getattr(transformers, config.pop("class"))(**config)
    config._attn_implementation = attention
    return getattr(transformers, kind)(config)


def of_bert(p, name, **others):
    return {
        "class": name, "vocab_size": WORDS, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 16, "max_position_embeddings": 16, "hidden_dropout_prob": p,
        "attention_probs_dropout_prob": p, "num_labels": CLASSES, "pad_token_id": PAD, **others,
    }  # fmt: skip


def bert(p, attention):
    return Texts(made("BertForSequenceClassification", of_bert(p, "BertConfig"), attention))


def roberta(p, attention):
    return Texts(made("RobertaForSequenceClassification", of_bert(p, "RobertaConfig", type_vocab_size=1), attention))


def distilbert(p, attention):
    config = {
        "class": "DistilBertConfig", "vocab_size": WORDS, "dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 16,
        "max_position_embeddings": 16, "dropout": p, "attention_dropout": p, "seq_classif_dropout": p,
        "num_labels": CLASSES, "pad_token_id": PAD,
    }  # fmt: skip
    return Texts(made("DistilBertForSequenceClassification", config, attention))


def gpt2(p, attention, tied=True):
    config = {
        "class": "GPT2Config", "vocab_size": WORDS, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16,
        "resid_pdrop": p, "embd_pdrop": p, "attn_pdrop": p, "tie_word_embeddings": tied, "bos_token_id": 1,
        "eos_token_id": 1, "use_cache": False,
    }  # fmt: skip
    return Texts(made("GPT2LMHeadModel", config, attention), use_cache=False)


def gpt2_untied(p, attention):
    return gpt2(p, attention, tied=False)


def gpt2_unmasked(p, attention):
    model = gpt2(p, attention)
    model.masked = False
    return model


def llama(p, attention, tied=False):
    config = {
        "class": "LlamaConfig", "vocab_size": WORDS, "hidden_size": 8, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 16, "max_position_embeddings": 16,
        "attention_dropout": p, "tie_word_embeddings": tied, "use_cache": False, "pad_token_id": None,
    }  # fmt: skip
    return Texts(made("LlamaForCausalLM", config, attention), use_cache=False)


def llama_tied(p, attention):
    return llama(p, attention, tied=True)


def llama_unmasked(p, attention):
    model = llama(p, attention)
    model.masked = False
    return model


def transformers_vit(p, attention):
    config = {
        "class": "ViTConfig", "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 16, "image_size": 8, "patch_size": 4, "hidden_dropout_prob": p,
        "attention_probs_dropout_prob": p, "num_labels": CLASSES,
    }  # fmt: skip
    return Images(made("ViTForImageClassification", config, attention))


class T5(nn.Module):
    """The encoder, and a head for the mean."""

    def __init__(self, p, attention):
        super().__init__()
        config = {
            "class": "T5Config", "vocab_size": WORDS, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 2,
            "num_heads": 2, "dropout_rate": p, "relative_attention_num_buckets": 8, "pad_token_id": PAD,
        }  # fmt: skip
        self.network, self.head = made("T5EncoderModel", config, attention), nn.Linear(8, CLASSES)

    def forward(self, tokens):
        out = self.network(input_ids=tokens, attention_mask=(tokens != PAD).long())
        return self.head(out.last_hidden_state.mean(1))


# torch


def encoder(p, attention, norm_first=False):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=p, batch_first=True, norm_first=norm_first)
    return Sequences(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))


def encoder_first(p, attention):
    return encoder(p, attention, norm_first=True)


def decoder(p, attention):
    layer = nn.TransformerDecoderLayer(8, 2, 16, dropout=p, batch_first=True)
    return Sequences(nn.TransformerDecoder(layer, 2), decodes=True)


# peft


def adapted(p, attention, **settings):
    peft = library("peft")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["query", "value"], lora_dropout=p, **settings)
    model = peft.get_peft_model(made("BertForSequenceClassification", of_bert(p, "BertConfig"), attention), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return Texts(model)


def lora(p, attention):
    return adapted(p, attention)


def rslora(p, attention):
    return adapted(p, attention, use_rslora=True)


def dora(p, attention):
    return adapted(p, attention, use_dora=True)


IMAGES = (
    torchvision_vit, torchvision_swin, torchvision_swin_v2, torchvision_convnext, timm_vit, timm_vit_registers,
    timm_deit, timm_convnext, timm_mixer, transformers_vit,
)  # fmt: skip
CLASSIFIERS = (bert, roberta, distilbert, T5, encoder, encoder_first, decoder, lora, rslora, dora)
MODELS = (gpt2, gpt2_untied, gpt2_unmasked, llama, llama_tied, llama_unmasked)
ZOO = {make.__name__: make for make in (*IMAGES, *CLASSIFIERS, *MODELS)}


def setting(name, p, attention):
    """The loss in float64, the examples."""
    torch.manual_seed(0)
    module = ZOO[name](p, attention).double()
    torch.manual_seed(2)
    if ZOO[name] in IMAGES:
        side = 32 if "convnext" in name else 8
        x = torch.randn(BATCH, 3, side, side).double()
    else:
        x = torch.randint(1, WORDS, (BATCH, LENGTH))
        if ZOO[name] in CLASSIFIERS:
            for i in range(BATCH):
                x[i, LENGTH - i // 2 :] = PAD
    if ZOO[name] in MODELS:
        return ModelLoss(module, of_next), x, x
    return ModelLoss(module), x, torch.arange(BATCH) % CLASSES


@pytest.fixture
def one_pass(monkeypatch):
    """A pass per example fails, with its reason."""

    def refuse(loss_fn, reason):
        raise AssertionError(f"a pass per example: {reason}")

    monkeypatch.setattr("fed_dpsat.step.gradients.loop.remember", refuse)


def alone(loss, x, y):
    """Gradients ``[B, d]`` of each example by itself, by ordinary autograd, and the names."""
    names = {name: p for name, p in loss.module.named_parameters() if p.requires_grad}
    rows = []
    for i in range(len(x)):
        value = loss.criterion(loss.module(x[i : i + 1]), y[i : i + 1]).sum()
        found = torch.autograd.grad(value, list(names.values()), materialize_grads=True, allow_unused=True)
        rows.append(torch.cat([g.flatten() for g in found]))
    return torch.stack(rows)


def together(found):
    return torch.cat([g.flatten() for g in found.values()])


@pytest.mark.by_default("*-sdpa")
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", ZOO)
def test_clipped_sums_are_those_of_single_examples(name, attention, one_pass):
    loss, x, y = setting(name, 0.0, attention)
    rows = alone(loss, x, y)
    norms = rows.norm(dim=1)
    bound = float(norms.median())
    expected = (rows * (bound / norms).clamp(max=1)[:, None]).sum(0)
    found, dropped = clipped_gradient_sum(loss, trainable(loss.module), (x, y), FlatClipping(clip_norm=bound))
    assert not dropped
    assert float((together(found) - expected).norm() / expected.norm()) < 1e-8


@pytest.mark.by_default(
    "torchvision_vit-eager",
    "timm_vit-sdpa",
    "gpt2-sdpa",
    "bert-*",
    "lora-sdpa",
    "T5-eager",
    "encoder-sdpa",
    "decoder-eager",
)
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", ZOO)
def test_with_dropout_a_sum_is_that_of_its_examples_one_by_one(name, attention, one_pass):
    loss, x, y = setting(name, 0.3, attention)
    loss.module.train()
    ids, params = np.array([10, 3, 4, 5, 90, 7]), trainable(loss.module)

    def total(some, bound=1e-2):
        drawn, rule = Draws(key=KEY, ids=ids[some]), FlatClipping(clip_norm=bound)
        return together(clipped_gradient_sum(loss, params, (x[some], y[some]), rule, draws=drawn)[0])

    whole = total(slice(None))
    one_by_one = sum(total(slice(i, i + 1)) for i in range(BATCH))
    assert math.isclose(float((whole - one_by_one).norm() / whole.norm()), 0, abs_tol=1e-8)
    loss.module.eval()
    assert float((total(slice(None)) - whole).norm() / whole.norm()) > 1e-3
