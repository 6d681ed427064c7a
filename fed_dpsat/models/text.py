"""Small networks of texts: a GPT and a GRU, with an output for each text or, in tasks of tokens, for each position."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from fed_dpsat.errors import ModelError

OF_POSITIONS = ("causal-lm", "token-classification")


class Text(nn.Module):
    """``input_ids[B, T], attention_mask[B, T] -> [B, num_classes]``, or ``[B, T, num_classes]`` with ``each``.

    ``body`` maps embeddings ``[B, T, width]`` to states ``[B, T, width]`` of which each depends on no later position.
    One output for a text is that of the mean state of its tokens.
    """

    def __init__(self, vocabulary_size: int, width: int, num_classes: int, body: nn.Module, *, each: bool) -> None:
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(vocabulary_size, width), body, nn.Linear(width, num_classes)
        self.each = each

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.body(self.embedding(input_ids))
        if not self.each:
            there = attention_mask[..., None].to(states)
            states = (states * there).sum(1) / there.sum(1).clamp(min=1)
        outputs: Tensor = self.head(states)
        return outputs


class Block(nn.Module):
    """A pre-norm transformer block with causal attention: ``x[B, T, width]``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norm_1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = parts.permute(2, 0, 3, 1, 4)  # [B, heads, T, width / heads] each
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        grown: Tensor = x + self.mlp(self.norm_2(x))
        return grown


class Transformer(nn.Module):
    """Learned positions and ``layers`` blocks, with a norm at the end: ``x[B, T, width]``."""

    def __init__(self, width: int, layers: int, heads: int, max_length: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(0.02 * torch.randn(max_length, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        states: Tensor = self.norm(self.blocks(x + self.positions[: x.shape[1]]))
        return states


class Recurrent(nn.Module):
    """``layers`` of a GRU: ``x[B, T, width]``."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.gru = nn.GRU(width, width, num_layers=layers, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        states: Tensor = self.gru(x)[0]
        return states


def gpt(
    input_shape: tuple[int, ...],
    num_classes: int,
    vocabulary_size: int,
    task: str = "classification",
    width: int = 128,
    layers: int = 2,
    heads: int = 4,
) -> nn.Module:
    """A GPT of 2 layers, 128 wide: 472,069 parameters for bytes of texts of up to 64 (next byte).

    ``ModelError`` for data that are no texts, and for a ``width`` that is no multiple of ``heads``.
    """
    (max_length,) = _text_shape("gpt", input_shape, vocabulary_size)
    if layers < 1 or heads < 1 or width < heads or width % heads:
        raise ModelError(f"model='gpt': width={width} is no multiple of heads={heads}, or layers={layers} is below 1")
    body = Transformer(width, layers, heads, max_length)
    return Text(vocabulary_size, width, num_classes, body, each=task in OF_POSITIONS)


def gru(
    input_shape: tuple[int, ...],
    num_classes: int,
    vocabulary_size: int,
    task: str = "classification",
    width: int = 128,
    layers: int = 1,
) -> nn.Module:
    """A GRU of 1 layer, 128 wide: 166,149 parameters for bytes (next byte).

    ``ModelError`` for data that are no texts.
    """
    _text_shape("gru", input_shape, vocabulary_size)
    if layers < 1 or width < 1:
        raise ModelError(f"model='gru': width={width} or layers={layers} is below 1")
    return Text(vocabulary_size, width, num_classes, Recurrent(width, layers), each=task in OF_POSITIONS)


def _text_shape(model: str, input_shape: tuple[int, ...], vocabulary_size: int) -> tuple[int]:
    if vocabulary_size < 1 or len(input_shape) != 1:
        raise ModelError(
            f"model={model!r} is for texts, and the data set has input_shape={input_shape}; use mlp, or dataset=text"
        )
    return (input_shape[0],)


MODELS: dict[str, Callable[..., nn.Module]] = {"gpt": gpt, "gru": gru}
