"""``transformers:FOLDER``: the network for a task that the ``config.json`` of a folder describes, without weights.

Texts have the network of their task: ``AutoModelForTokenClassification`` for a class for each position,
``AutoModelForCausalLM`` for the next token, ``AutoModelForMaskedLM`` for hidden ones. All other tasks, several classes
and numbers among them, have that of classification:

=============== ======================================= ==========================================================
one example     the network                             its input
=============== ======================================= ==========================================================
``(T,)``        ``AutoModelForSequenceClassification``  numbers of tokens; ``pad_token_id`` of the folder is padding
``(C, H, W)``   ``AutoModelForImageClassification``     pixels
=============== ======================================= ==========================================================
"""

from __future__ import annotations

import copy
import difflib
import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fed_dpsat.errors import ModelError
from fed_dpsat.models.libraries import check_arguments, imported, unknown

NO_PADDING = -1
"""No number of a token: the network reads its last position."""


class Classifier(nn.Module):
    """``x[B, T]`` (numbers of tokens) or ``x[B, C, H, W]``, or both as named tensors, ``-> logits[B, num_classes]``.

    Each position of a text that holds ``pad_token_id`` is masked. Parameters have the names that they have in
    ``network``, after ``network.``.
    """

    def __init__(self, network: nn.Module, *, pad_token_id: int | None = None) -> None:
        super().__init__()
        self.network = network
        self.pad_token_id = pad_token_id

    def forward(self, inputs: Tensor | Mapping[str, Tensor] | None = None, **named: Tensor) -> Tensor:
        if isinstance(inputs, Mapping):
            named = {**inputs, **named}
        elif inputs is not None and self.pad_token_id is not None:
            tokens = inputs.long()
            named = {"input_ids": tokens, "attention_mask": tokens.ne(self.pad_token_id)}
        elif inputs is not None:
            named = {"pixel_values": inputs}
        logits: Tensor = self.network(**named).logits
        return logits

    def own_weights(self, weights: Mapping[str, Tensor], *, new_head: bool) -> tuple[dict[str, Tensor], list[str]]:
        """``weights`` of a file that transformers wrote, by the names that they have here; those of other heads.

        transformers itself renames them, also those of the body alone. Without ``new_head`` a tensor that this network
        does not have stays among them.
        """
        if any(name.startswith("network.") for name in weights):  # of a run of this project
            return dict(weights), []
        network: Any = self.network
        with torch.random.fork_rng(devices=[]), quiet():
            loaded, found = type(network).from_pretrained(
                None,
                config=copy.deepcopy(network.config),
                state_dict=dict(weights),
                dtype=torch.float32,
                attn_implementation=network.config._attn_implementation,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        missing, surplus = set(found["missing_keys"]), sorted(found["unexpected_keys"])
        renamed = {name: value for name, value in loaded.state_dict().items() if name not in missing}
        absent = {name: shape for name, shape, _ in found["mismatched_keys"]}
        left_out = surplus if new_head else []
        absent |= {name: (0,) for name in surplus if not new_head}
        renamed |= {name: torch.empty(shape, device="meta") for name, shape in absent.items()}
        return {f"network.{name}": value for name, value in renamed.items()}, left_out

    def head_names(self) -> list[str]:
        """The parameters that are not of the body."""
        body = self.network.base_model_prefix
        if not hasattr(self.network, str(body)):
            return []
        return [name for name, _ in self.named_parameters() if not name.startswith(f"network.{body}.")]

    def keeps_head(self) -> bool:
        """Whether the network gives tokens."""
        network: Any = self.network
        return network.get_output_embeddings() is not None

    def optional_names(self) -> list[str]:
        """The pooler, which networks with another head do not have."""
        return [name for name, _ in self.named_parameters() if f".{self.network.base_model_prefix}.pooler." in name]


class Masked(Classifier):
    """As ``Classifier``, but it hides tokens from the network and gives ``(logits[B, T, V], hidden[B, T])``.

    Each token is chosen with a chance of 15 %; 80 % of those become ``mask_token``, 10 % a token drawn from
    ``vocabulary_size``, and 10 % stay. Source: Devlin et al. 2019, arXiv 1810.04805, section 3.1.
    """

    CHOSEN, REPLACED, RANDOM = 0.15, 0.8, 0.1

    def __init__(self, network: nn.Module, *, mask_token: int, vocabulary_size: int) -> None:
        super().__init__(network)
        self.mask_token, self.vocabulary_size = mask_token, vocabulary_size

    def forward(  # type: ignore[override]  # two tensors
        self, inputs: Tensor | Mapping[str, Tensor] | None = None, **named: Tensor
    ) -> tuple[Tensor, Tensor]:
        named = {**inputs, **named} if isinstance(inputs, Mapping) else named
        tokens, there = named["input_ids"], named["attention_mask"]
        chance, kind = (torch.rand(tokens.shape, device=tokens.device) for _ in range(2))
        other = (torch.rand(tokens.shape, device=tokens.device) * self.vocabulary_size).long()
        hidden = (chance < self.CHOSEN) & there.bool()
        seen = tokens.where(~(hidden & (kind < self.REPLACED)), self.mask_token)
        seen = seen.where(~(hidden & (kind >= 1 - self.RANDOM)), other)
        return super().forward(None, **{**named, "input_ids": seen}), hidden


def factory(folder: str) -> Callable[..., nn.Module]:
    """``(input_shape, num_classes, task, ...) -> Classifier``; ``ModelError`` without a ``config.json``."""
    model = f"transformers:{folder}"
    transformers = imported("transformers", model, "text")
    if not (Path(folder) / "config.json").is_file():
        raise _no_folder(model, folder)

    def make(
        input_shape: tuple[int, ...],
        num_classes: int,
        task: str = "classification",
        vocabulary_size: int = 0,
        padding: int = NO_PADDING,
        mask_token: int = -1,
        **arguments: Any,
    ) -> nn.Module:
        """A network for ``task`` in the initial weights of transformers.

        ``vocabulary_size``, ``padding`` and ``mask_token`` are those of texts in a data set; 0 and -1 without one.
        """
        check_arguments(model, arguments)
        attention = arguments.pop("attn_implementation", None)
        config, unused = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, return_unused_kwargs=True, **arguments
        )
        if unused:
            wrong, known = min(unused), config.to_dict()
            near = difflib.get_close_matches(wrong, known, n=3) or sorted(known)
            raise ModelError(f"model={model!r} takes no {wrong!r}; did you mean {', '.join(near)}?")
        config.use_cache = False
        if task not in LANGUAGE:
            config.num_labels = num_classes
        if vocabulary_size:
            _check_vocabulary(model, config.get_text_config(), vocabulary_size, folder)
            config.get_text_config().pad_token_id = padding  # networks that read the last token look for it
        auto = _auto(transformers, model, config, input_shape, task)
        with quiet():
            network = auto.from_config(config, dtype=torch.float32, attn_implementation=attention)
        if len(input_shape) != 1 or vocabulary_size:
            if task != "masked-lm":
                return Classifier(network)
            if mask_token < 0:
                raise ModelError(
                    f"model={model!r}: task='masked-lm' needs a token that hides others, and the tokenizer of the "
                    "data set has none; set tokenizer to one with a mask token, or task='causal-lm'"
                )
            return Masked(network, mask_token=mask_token, vocabulary_size=vocabulary_size)
        text = network.config.get_text_config()
        if text.pad_token_id is None:  # after the embedding is made, which would take the last row for padding
            text.pad_token_id = NO_PADDING
        return Classifier(network, pad_token_id=text.pad_token_id)

    return make


LANGUAGE = {"causal-lm": "AutoModelForCausalLM", "masked-lm": "AutoModelForMaskedLM"}
OF_TEXT = {**LANGUAGE, "token-classification": "AutoModelForTokenClassification"}
"""The classes that make the network of a task; those of other tasks make classifiers."""


def _check_vocabulary(model: str, config: Any, vocabulary_size: int, folder: str) -> None:
    if vocabulary_size > (known := getattr(config, "vocab_size", vocabulary_size)):
        raise ModelError(
            f"model={model!r}: the tokenizer of the data set has {vocabulary_size} tokens, more than the {known} of "
            f"the network; set tokenizer={folder!r}, or model_args='vocab_size = {vocabulary_size}' for new weights"
        )


def _auto(transformers: Any, model: str, config: Any, input_shape: tuple[int, ...], task: str) -> Any:
    """The class that makes the network; sizes of ``config`` are those of the data."""
    if len(input_shape) == 3:
        channels, height, width = input_shape
        vision = getattr(config, "vision_config", config)
        vision.num_channels = channels
        vision.image_size = height if height == width else (height, width)
        auto, what = transformers.AutoModelForImageClassification, "images"
    elif len(input_shape) == 1:
        (length,) = input_shape
        most = getattr(config, "max_position_embeddings", None) or length
        if length > most:
            raise ModelError(
                f"model={model!r}: texts of {length} tokens are longer than its {most} positions; shorten them, or set "
                f"model_args='max_position_embeddings = {length}'"
            )
        name = OF_TEXT.get(task, "AutoModelForSequenceClassification")
        auto, what = getattr(transformers, name), "texts"
    else:
        raise ModelError(
            f"model={model!r}: input_shape={input_shape} is neither (T,), numbers of tokens, nor (C, H, W), an image"
        )
    if type(config) not in auto._model_mapping:
        raise ModelError(
            f"model={model!r}: transformers has no network for task={task!r} of {what} for "
            f"model_type={config.model_type!r}, and input_shape={input_shape} is that of {what}; name another folder"
        )
    return auto


def _no_folder(model: str, folder: str) -> ModelError:
    path = Path(folder)
    beside = {p.parent.name: p.parent for p in path.parent.glob("*/config.json")} if folder else {}
    if near := [str(beside[name]) for name in difflib.get_close_matches(path.name, beside, n=4)]:
        return unknown(model, folder, near, "a folder with a config.json")
    return ModelError(
        f"model={model!r}: {folder!r} is not a folder with a config.json, and nothing is downloaded; write one with "
        "config.save_pretrained(folder) or model.save_pretrained(folder)"
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Without the reports of transformers on what it loads and misses: the errors of this project say that."""
    reports = importlib.import_module("transformers.utils.logging")
    level, bar = reports.get_verbosity(), reports.is_progress_bar_enabled()
    reports.set_verbosity_error()
    reports.disable_progress_bar()
    try:
        yield
    finally:
        reports.set_verbosity(level)
        if bar:
            reports.enable_progress_bar()
