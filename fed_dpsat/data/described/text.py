"""Texts, from CSV, JSON lines, Parquet, folders and ``datasets``."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

from fed_dpsat.data.dataset import Dataset, Examples
from fed_dpsat.data.sequences import Sequences
from fed_dpsat.errors import SettingError
from fed_dpsat.settings.data import BYTES

OF_THE_TEXT = ("causal-lm", "masked-lm")
"""The tasks whose label is the text itself."""


def text(
    data_source: str,
    data_path: str,
    cache_dir: str,
    test_path: str = "",
    test_share: float = 0.0,
    input_columns: str = "",
    label_column: str = "",
    user_column: str = "",
    class_names: str = "",
    columns_file: str = "",
    tokenizer: str = BYTES,
    max_length: int = 256,
    seed: int = 0,
    task: str = "classification",
    columns: dict[str, Any] | None = None,
    add_special_tokens: bool | None = None,
    pad_token: str = "",
    mask_token: str = "",
    text_separator: str = "\n",
    errors: str = "strict",
    label_separator: str = ";",
    labels_like: str = "",
    **where: Any,
) -> Dataset:
    """Your own texts, from CSV, JSON lines, Parquet, a folder or datasets, as tokens.

    ``input_columns`` is "text" if it is empty, and the labels of a folder are its folders. The inputs are "input_ids";
    the labels those of ``task``, a class for each first token of a word, or None if the label is the text. Special
    tokens are those that the tokenizer adds; the byte tokenizer adds them only if ``add_special_tokens`` is true.
    ``where`` are arguments of ``Place``, and ``labels_like`` is the task whose
    labels a task of your own takes.

    Raises ``SettingError`` for a declaration, and ``DataError`` with file and row for what is not as declared.
    """
    from fed_dpsat.data.described.columns import declared
    from fed_dpsat.data.described.encode_text import TextEncoder
    from fed_dpsat.data.described.labels import OF_WORDS, Labels
    from fed_dpsat.data.described.load import both_splits, examples, load, sha256_of
    from fed_dpsat.data.described.place import Place, check_types
    from fed_dpsat.data.described.tokenizer import digest, library_tokens
    from fed_dpsat.data.described.tokens import ByteTokens
    from fed_dpsat.data.names import split_names

    check_types(str, pad_token=pad_token, mask_token=mask_token, text_separator=text_separator)
    check_types(str, label_separator=label_separator, labels_like=labels_like)
    check_types(bool, add_special_tokens=add_special_tokens or False)
    if errors not in ("strict", "replace"):
        raise SettingError("errors", errors, "strict or replace", "set it in dataset_args")
    settings = {"data_source": data_source, "data_path": data_path, "test_path": test_path, "content": "text"}
    place = Place.of(where, test_share=test_share, seed=seed, **settings)
    names = split_names(input_columns) or ("text",)
    special = tokenizer != BYTES if add_special_tokens is None else add_special_tokens
    if tokenizer == BYTES:
        make: Any = partial(ByteTokens, add_special_tokens=special, separator=text_separator)
    else:
        asked: Any = {"pad_token": pad_token, "mask_token": mask_token, "pairs": len(names) > 1}
        make = partial(library_tokens, tokenizer, add_special_tokens=special, **asked)
    labels = None
    of_task = labels_like or task
    if of_task not in OF_THE_TEXT:
        column = label_column or ("label" if data_source == "folder" else "")
        labels = Labels.of(
            of_task, column, class_names, declared(columns, columns_file), label_separator, of_words=True
        )
        if labels.task == OF_WORDS and len(names) > 1:
            raise SettingError("input_columns", input_columns, "one column of words", f"task={task!r} has one")
        if both := set(names) & set(labels.columns):
            raise SettingError("input_columns", input_columns, f"without the label {min(both)!r}", "name only inputs")
    encoder = TextEncoder(columns=names, labels=labels, tokens=partial(make, max_length=max_length), errors=errors)
    made_by = tokenizer if tokenizer == BYTES else digest(tokenizer)
    decided = {
        "columns": names,
        "labels": dataclasses.asdict(labels) if labels else None,
        "tokenizer": made_by,
        "max_length": max_length,
        "tokens": [special, pad_token, mask_token, text_separator, errors],
    }
    arrays = load(
        "text",
        place,
        wanted=encoder.wanted,
        encoder=encoder,
        decided=decided,
        user_column=user_column,
        cache_dir=cache_dir,
        libraries=() if tokenizer == BYTES else ("tokenizers", "transformers"),
    )
    encoder.report(max_length)
    vocabulary_size, padding, mask = arrays["tokens"].tolist()
    if task == "masked-lm" and mask < 0:
        remedy = "set mask_token = '[MASK]', or the one of this tokenizer, in dataset_args"
        raise SettingError("tokenizer", tokenizer, "one with a mask token, which task='masked-lm' needs", remedy)

    def split(name: str) -> Examples:
        offsets = arrays[f"{name}_offsets"]
        tokens = Sequences(
            values=arrays[f"{name}_values"],
            offsets=offsets,
            max_length=max_length,
            vocabulary_size=vocabulary_size,
            padding=padding,
            mask_token=mask,
        )
        of: Any = arrays.get(f"{name}_labels")
        if labels and labels.task == OF_WORDS:
            of = Sequences(values=of, offsets=offsets, max_length=max_length, vocabulary_size=len(labels.class_names))
        return examples(arrays, name, user_column, inputs={"input_ids": tokens}, labels=of)

    numbers = dataclasses.asdict(labels)["numbers"] if labels else {}
    return Dataset(
        name="text",
        declared=sha256_of(len(names), special, pad_token, mask_token, text_separator, numbers),
        tokenizer=made_by,
        **(labels.of_dataset if labels else {}),
        **both_splits(place, split),
    )
