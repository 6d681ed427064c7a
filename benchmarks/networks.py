"""Networks that people fine-tune, with a batch each and the loss they are trained with: ``NETWORKS``.

=========================================== ================================================================
images, 3x32x32, 10 classes                 ``vit``, ``timm-vit-tiny``, ``deit``, ``swin-t``, ``convnext-atto``
one class of a text                         ``minilm``, ``minilm-dropout``, ``minilm-lora``, ``lstm``, ``gru``
the next token of a text                    ``gpt2``, ``llama`` (transformers), ``gpt`` (plain PyTorch)
any other name, also those of a library     images, as ``fed-dpsat run --set model=NAME`` builds it
=========================================== ================================================================

Weights are new and tokens random. Networks of transformers have no dropout here but for ``minilm-dropout``. The head of
a language model shares the table of its embedding. Libraries are imported when a network of theirs is built.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fed_dpsat import plugins
from fed_dpsat.step.gradients.loss import cross_entropy

SHAPE, CLASSES = (3, 32, 32), 10
WORDS, MINILM_WORDS, GPT_WORDS = 5000, 30522, 10000


@dataclass(frozen=True)
class Problem:
    """A network, its losses ``[B]`` of outputs and targets, and one batch."""

    module: nn.Module
    criterion: Callable[[Any, Tensor], Tensor]
    inputs: Tensor
    targets: Tensor

    @property
    def is_of_images(self) -> bool:
        """Whether a batch has a memory format to choose."""
        return self.inputs.ndim == 4


def next_token(logits: Tensor, tokens: Tensor) -> Tensor:
    """``logits[B, T, V], tokens[B, T] -> losses[B]``: the mean over the positions of an example."""
    losses = functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return losses.view(len(tokens), -1).mean(1)


class OfTokens(nn.Module):
    """``tokens[B, T] -> logits`` of a network of transformers; token 0 is padding where there is a mask.

    With ``spelled_out`` each example has its own row of position numbers, which are otherwise one row for the batch.
    Opacus needs that.
    """

    def __init__(self, network: nn.Module, masked: bool) -> None:
        super().__init__()
        self.network, self.masked, self.spelled_out = network, masked, False

    def forward(self, tokens: Tensor) -> Tensor:
        """A network without a mask is one that predicts the next token, and keeps no cache."""
        more: dict[str, Any] = {"attention_mask": (tokens != 0).long()} if self.masked else {"use_cache": False}
        if self.spelled_out:
            more["position_ids"] = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        logits: Tensor = self.network(input_ids=tokens, **more).logits
        return logits


class Recurrent(nn.Module):
    """An embedding of 128, one recurrent layer of 256, and a head on its last output."""

    def __init__(self, layer: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 128)
        self.layer = layer(128, 256, batch_first=True)
        self.head = nn.Linear(256, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        """``tokens[B, T] -> logits[B, 10]``."""
        logits: Tensor = self.head(self.layer(self.embedding(tokens))[0][:, -1])
        return logits


class Block(nn.Module):
    """Causal attention and two linear layers, both after a LayerNorm and beside a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``x[B, T, width] -> [B, T, width]``."""
        batch, length, width = x.shape
        q, k, v = self.qkv(self.before(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        moved: Tensor = x + self.narrow(functional.gelu(self.wide(self.between(x))))
        return moved


class GPT(nn.Module):
    """Blocks, six of 256 by default, whose head is the table of the embedding: 7.3 M parameters."""

    def __init__(self, length: int, width: int = 256, depth: int = 6, heads: int = 8, words: int = GPT_WORDS) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.positions = nn.Parameter(0.02 * torch.randn(1, length, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, words, bias=False)
        nn.init.normal_(self.words.weight, std=0.02)
        self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """``tokens[B, T] -> logits[B, T, V]``."""
        logits: Tensor = self.head(self.norm(self.blocks(self.words(tokens) + self.positions[:, : tokens.shape[1]])))
        return logits


def images(module: nn.Module, size: int) -> Problem:
    """``module`` on random images."""
    torch.manual_seed(1)
    return Problem(module, cross_entropy, torch.randn(size, *SHAPE), torch.randint(CLASSES, (size,)))


def _texts(module: nn.Module, size: int, length: int, words: int, classes: int) -> Problem:
    torch.manual_seed(1)
    tokens = torch.randint(1, words, (size, length))
    return Problem(module, cross_entropy, tokens, torch.randint(classes, (size,)))


def _next_tokens(module: nn.Module, size: int, length: int, words: int) -> Problem:
    torch.manual_seed(1)
    tokens = torch.randint(1, words, (size, length))
    return Problem(module, next_token, tokens, tokens)


def named(name: str, **arguments: Any) -> nn.Module:
    """The network ``name`` of settings, for these images."""
    made: nn.Module = plugins.load("model", name)(SHAPE, CLASSES, **arguments)
    return made


def _vit(size: int, length: int) -> Problem:
    sizes = {"patch_size": 4, "num_layers": 6, "num_heads": 3, "hidden_dim": 192, "mlp_dim": 768}
    return images(named("torchvision:VisionTransformer", **sizes), size)


def _timm_vit(size: int, length: int) -> Problem:
    return images(named("timm:vit_tiny_patch16_224", patch_size=4), size)


def _deit(size: int, length: int) -> Problem:
    return images(named("timm:deit_tiny_patch16_224", patch_size=4), size)


def _swin(size: int, length: int) -> Problem:
    return images(named("torchvision:swin_t"), size)


def _convnext(size: int, length: int) -> Problem:
    return images(named("timm:convnext_atto"), size)


def _transformers() -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    return transformers


def _bert(dropout: float = 0.0) -> nn.Module:
    library = _transformers()
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    config = library.BertConfig(vocab_size=MINILM_WORDS, num_labels=2, **sizes, **rates)
    made: nn.Module = library.BertForSequenceClassification(config)
    return made


def _minilm(size: int, length: int) -> Problem:
    return _texts(OfTokens(_bert(), masked=True), size, length, MINILM_WORDS, 2)


def _minilm_dropout(size: int, length: int) -> Problem:
    return _texts(OfTokens(_bert(dropout=0.1), masked=True), size, length, MINILM_WORDS, 2)


def _minilm_lora(size: int, length: int) -> Problem:
    import peft

    adapters = peft.LoraConfig(r=8, target_modules=["query", "value"], modules_to_save=["classifier"])
    adapted = peft.get_peft_model(_bert(), adapters)
    return _texts(OfTokens(adapted, masked=True), size, length, MINILM_WORDS, 2)


def _gpt2(size: int, length: int) -> Problem:
    library = _transformers()
    sizes = {"n_embd": 256, "n_layer": 6, "n_head": 8, "n_positions": max(128, length)}
    rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2}
    network = library.GPT2LMHeadModel(library.GPT2Config(vocab_size=WORDS, **sizes, **rates))
    return _next_tokens(OfTokens(network, masked=False), size, length, WORDS)


def _llama(size: int, length: int) -> Problem:
    library = _transformers()
    sizes = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4}
    more = {"intermediate_size": 704, "max_position_embeddings": max(128, length), "tie_word_embeddings": True}
    network = library.LlamaForCausalLM(library.LlamaConfig(vocab_size=WORDS, **sizes, **more))
    return _next_tokens(OfTokens(network, masked=False), size, length, WORDS)


def _gpt(size: int, length: int) -> Problem:
    return _next_tokens(GPT(length), size, length, GPT_WORDS)


def _lstm(size: int, length: int) -> Problem:
    return _texts(Recurrent(nn.LSTM), size, length, WORDS, CLASSES)


def _gru(size: int, length: int) -> Problem:
    return _texts(Recurrent(nn.GRU), size, length, WORDS, CLASSES)


NETWORKS: dict[str, Callable[[int, int], Problem]] = {
    "vit": _vit,
    "timm-vit-tiny": _timm_vit,
    "deit": _deit,
    "swin-t": _swin,
    "convnext-atto": _convnext,
    "minilm": _minilm,
    "minilm-dropout": _minilm_dropout,
    "minilm-lora": _minilm_lora,
    "gpt2": _gpt2,
    "llama": _llama,
    "gpt": _gpt,
    "lstm": _lstm,
    "gru": _gru,
}
"""Problems by the names of these benchmarks, of a batch size and a number of tokens, which images have not."""
