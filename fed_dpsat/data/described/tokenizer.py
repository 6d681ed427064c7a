"""Tokenizers of ``tokenizers`` and transformers, from a folder or a ``tokenizer.json`` on this machine."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fed_dpsat.data.described.tokens import Tokenized, Tokens, check_room
from fed_dpsat.errors import SettingError

FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "config.json",
)  # fmt: skip
"""What a folder of transformers may have; config.json names the kind of an old one."""
USUAL_PADDING = ("[PAD]", "<pad>", "<|endoftext|>", "</s>")
"""Tokens of vocabularies that can fill the ends of texts, for an error to name."""

CHARACTERS = 16
"""Of a long text, this many for each of ``max_length`` tokens are tokenized first: a text is cut at a space there."""


def tokenizer_files(tokenizer: str) -> list[Path]:
    """The files of a tokenizer. Raises ``SettingError`` if there are none."""
    path = Path(tokenizer).expanduser()
    found = [path] if path.is_file() else [path / name for name in FILES if (path / name).is_file()]
    if not found or found[0].name == "config.json":
        remedy = "give the folder, or the file; nothing is downloaded"
        raise SettingError("tokenizer", tokenizer, "'bytes', a folder with a tokenizer, or a tokenizer.json", remedy)
    return found


def digest(tokenizer: str) -> str:
    """SHA-256 of all files of a tokenizer."""
    whole = hashlib.sha256()
    for file in tokenizer_files(tokenizer):
        whole.update(hashlib.sha256(file.read_bytes()).digest())
    return whole.hexdigest()


@dataclass(frozen=True, kw_only=True, eq=False)
class LibraryTokens(Tokens):
    """A tokenizer of ``tokenizers`` that cuts at ``max_length``; two columns are a pair to it."""

    backend: Any
    max_length: int
    add_special_tokens: bool
    vocabulary_size: int
    padding: int
    mask_token: int

    def texts(self, columns: Sequence[Any]) -> Tokenized:
        if len(columns) > 2:
            raise SettingError("input_columns", f"{len(columns)} columns", "one or two", "a tokenizer joins pairs")
        rows = (
            columns[0].to_pylist() if len(columns) == 1 else list(zip(*(c.to_pylist() for c in columns), strict=True))
        )
        return self._joined(self._encoded(rows), lambda encoding: [])

    def words(self, rows: Sequence[Sequence[str]]) -> Tokenized:
        _set_spaces(self.backend)
        kept = [list(row[: self.max_length + 1]) for row in rows]  # a word has a token or more
        found = self.backend.encode_batch(kept, is_pretokenized=True, add_special_tokens=self.add_special_tokens)
        return self._joined(found, lambda encoding: _begins(encoding.word_ids))

    def _encoded(self, rows: list[Any]) -> list[Any]:
        """Encodings of all rows; of a long text only as much is tokenized as fills ``max_length``."""
        size = CHARACTERS * self.max_length + 1024
        found: list[Any] = [None] * len(rows)
        left = list(range(len(rows)))
        while left:
            parts = [_begin(rows[i], size) for i in left]
            encodings = self.backend.encode_batch_fast(
                [p for p, _ in parts], add_special_tokens=self.add_special_tokens
            )
            again = []
            for i, encoding, (_, whole) in zip(left, encodings, parts, strict=True):
                found[i] = encoding
                if not whole and not encoding.overflowing:
                    again.append(i)
            left, size = again, 4 * size
        return found

    def _joined(self, encodings: Sequence[Any], begins: Callable[[Any], Sequence[int]]) -> Tokenized:
        ids = [encoding.ids for encoding in encodings]
        kind = np.int16 if self.vocabulary_size <= 2**15 else np.int32
        return Tokenized(
            values=np.fromiter((token for row in ids for token in row), dtype=kind),
            lengths=np.array([len(row) for row in ids], dtype=np.int64),
            cut=sum(bool(encoding.overflowing) for encoding in encodings),
            words=np.array([word for encoding in encodings for word in begins(encoding)], dtype=np.int64),
        )


def library_tokens(
    tokenizer: str, *, max_length: int, add_special_tokens: bool, pad_token: str, mask_token: str, pairs: bool
) -> LibraryTokens:
    """The tokenizer of a folder or file. Raises ``SettingError`` for one without a pad token, or one that is too short.

    No token is added to the vocabulary: a model has no row for it.
    """
    backend, own_pad, own_mask = _loaded(tokenizer)
    backend.no_padding()
    special = backend.num_special_tokens_to_add(pairs) if add_special_tokens else 0
    check_room(max_length, special)
    backend.enable_truncation(max_length)
    padding = _number(backend, "pad_token", pad_token or own_pad)
    if padding < 0:
        usual = next((token for token in USUAL_PADDING if backend.token_to_id(token) is not None), "TOKEN")
        raise SettingError(
            "tokenizer",
            tokenizer,
            "one with a pad token",
            f"name a token of it for the ends of texts, which a mask hides: pad_token = '{usual}' in dataset_args",
        )
    return LibraryTokens(
        backend=backend,
        max_length=max_length,
        add_special_tokens=add_special_tokens,
        vocabulary_size=max(backend.get_vocab().values()) + 1,
        padding=padding,
        mask_token=_number(backend, "mask_token", mask_token or own_mask),
    )


def _loaded(tokenizer: str) -> tuple[Any, str, str]:
    """The tokenizer, its pad token and its mask token, or "" for none."""
    path = Path(tokenizer).expanduser()
    try:
        if path.is_file():
            from tokenizers import Tokenizer

            backend = Tokenizer.from_file(str(path))
            return backend, (backend.padding or {}).get("pad_token", ""), ""
        from transformers import AutoTokenizer

        found: Any = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        return found.backend_tokenizer, found.pad_token or "", found.mask_token or ""
    except ImportError as error:
        raise SettingError("tokenizer", tokenizer, "usable here", f'pip install "fed_dpsat[text]" ({error})') from error
    except Exception as error:  # tokenizers raises Exception itself, transformers OSError, ValueError and others
        said = str(error).partition("\n")[0]
        raise SettingError("tokenizer", tokenizer, "a readable fast tokenizer", f"save it again ({said})") from error


def _number(backend: Any, setting: str, token: str) -> int:
    number = backend.token_to_id(token) if token else -1
    if number is None:
        raise SettingError(setting, token, "a token of the tokenizer", "name one of its vocabulary")
    return int(number)


def _begin(row: str | tuple[str, str], size: int) -> tuple[str | tuple[str, str], bool]:
    """At most ``size`` characters of a text, or of both of a pair, up to a space; and whether it is all."""
    if isinstance(row, tuple):
        (first, first_whole), (second, second_whole) = _begin(row[0], size), _begin(row[1], size)
        return (str(first), str(second)), first_whole and second_whole
    if len(row) <= size:
        return row, True
    return row[: row.rfind(" ", 0, size) + 1] or row[:size], False


def _set_spaces(backend: Any) -> None:
    """Let a tokenizer of bytes see a word of a list as a word after a space, as transformers demands of it."""
    steps = backend.pre_tokenizer
    for step in steps if type(steps).__name__ == "Sequence" else [steps]:
        if getattr(step, "add_prefix_space", None) is False:
            step.add_prefix_space = True


def _begins(word_ids: Sequence[int | None]) -> list[int]:
    """The word that begins at each token, or -1."""
    before = [None, *word_ids[:-1]]
    return [-1 if word is None or word == last else word for word, last in zip(word_ids, before, strict=True)]
