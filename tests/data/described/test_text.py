import json
import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from fed_dpsat.data.described import encode_text
from fed_dpsat.errors import DataError, SettingError

ROWS = [{"text": "ab c", "label": "good"}, {"text": "é", "label": "bad"}]
LABELS = {"label_column": "label", "class_names": "bad,good", "data_source": "jsonl"}


@pytest.fixture
def texts(build, write):
    """``texts(rows, arguments, **settings)``: the training split of JSON lines."""

    def texts(rows: list, arguments: str = "", **settings):
        write("train.jsonl", [row if isinstance(row, dict) else {"text": row} for row in rows])
        write("test.jsonl", [row if isinstance(row, dict) else {"text": row} for row in rows])
        ask = {"data_source": "jsonl", "task": "causal-lm", **settings}
        return build("text", arguments, **ask).train

    return texts


@pytest.fixture
def tokenizer(tmp_path):
    """A ``tokenizer.json``: [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, [MASK] 4, hello 5, wor 6, ##ld 7."""
    tokenizers = pytest.importorskip("tokenizers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "wor", "##ld"]
    model = tokenizers.models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    file = tmp_path / "tokenizer.json"
    made.save(str(file))
    return str(file)


PAD = "pad_token = '[PAD]', mask_token = '[MASK]'"


def tokens(split) -> list[list[int]]:
    text = split.inputs["input_ids"]
    return [text.values[a:b].tolist() for a, b in zip(text.offsets, text.offsets[1:], strict=False)]


@pytest.mark.parametrize("source", ["csv", "jsonl", "parquet", "disk"])
def test_each_format_gives_the_same_bytes(build, write, tmp_path, source):
    import datasets

    for split in ("train", "test"):
        write(f"{split}.csv", 'text,label\n"ab c",good\n"é",bad\n')
        write(f"{split}.jsonl", ROWS)
        pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "d" / f"{split}.parquet")
    whole = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": whole, "test": whole}).save_to_disk(tmp_path / "disk")
    path = tmp_path / ("disk" if source == "disk" else "d")
    data = build("text", **{**LABELS, "data_source": source, "data_path": str(path)})
    assert tokens(data.train) == [list(b"ab c"), list("é".encode())]
    assert data.train.inputs["input_ids"].values.dtype == torch.uint8, "a byte costs a byte"
    assert data.train.labels.tolist() == [1, 0]
    assert data.train.inputs["input_ids"].vocabulary_size == 260
    inputs, _ = data.test.batch(torch.arange(2))
    assert inputs["input_ids"][:, :5].tolist() == [[*b"ab c", 256], [*"é".encode(), 256, 256, 256]]
    assert inputs["attention_mask"][:, :5].tolist() == [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]


def test_special_bytes_are_inside_the_length(texts):
    assert tokens(texts(["abc", "", "a"], "add_special_tokens = true", max_length=4)) == [
        [258, 97, 98, 259],
        [258, 259],
        [258, 97, 259],
    ]


def test_several_columns_are_joined(texts, tokenizer):
    rows = [{"a": "hello", "b": "world hello"}]
    assert tokens(texts(rows, input_columns="a,b")) == [list(b"hello\nworld hello")]
    assert tokens(texts(rows, "text_separator = ' | '", input_columns="a,b")) == [list(b"hello | world hello")]
    ask = {"input_columns": "a,b", "tokenizer": tokenizer}
    assert tokens(texts(rows, PAD, **ask)) == [[2, 5, 3, 6, 7, 5, 3]]
    with pytest.raises(SettingError, match="one or two"):
        texts([{"a": "x", "b": "x", "c": "x"}], PAD, **{**ask, "input_columns": "a,b,c"})


def test_a_tokenizer_of_the_library_and_its_numbers(texts, tokenizer):
    split = texts(["hello world", "", "other"], PAD, tokenizer=tokenizer, task="masked-lm")
    assert tokens(split) == [[2, 5, 6, 7, 3], [2, 3], [2, 1, 3]]
    text = split.inputs["input_ids"]
    assert (text.vocabulary_size, text.padding, text.mask_token, text.values.dtype) == (8, 0, 4, torch.int16)
    assert tokens(texts(["hello world"], PAD + ", add_special_tokens = false", tokenizer=tokenizer)) == [[5, 6, 7]]


@pytest.mark.slow
def test_a_folder_of_transformers_says_its_own_tokens(texts, tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    made = transformers.PreTrainedTokenizerFast(tokenizer_file=tokenizer, pad_token="[PAD]", mask_token="[MASK]")
    made.save_pretrained(tmp_path / "folder")
    text = texts(["hello world"], tokenizer=str(tmp_path / "folder")).inputs["input_ids"]
    assert (text.values.tolist(), text.padding, text.mask_token) == ([2, 5, 6, 7, 3], 0, 4)


def test_another_tokenizer_file_is_another_cache_and_the_same_one_is_not_loaded_again(texts, tokenizer, monkeypatch):
    rows = ["hello"]
    texts(rows, PAD, tokenizer=tokenizer)
    changed = json.loads(Path(tokenizer).read_text())
    changed["model"]["vocab"] |= {"wor": 5, "hello": 6}
    Path(tokenizer).write_text(json.dumps(changed))
    assert tokens(texts(rows, PAD, tokenizer=tokenizer)) == [[2, 6, 3]]


@pytest.mark.parametrize(
    ("arguments", "settings", "error"),
    [
        ("", {}, r"one with a pad token; name a token of it .*: pad_token = '\[PAD\]' in dataset_args"),
        ("pad_token = '[NAD]'", {}, "a token of the tokenizer"),
        ("pad_token = '[PAD]'", {"task": "masked-lm"}, "one with a mask token"),
        (PAD, {"max_length": 2}, "above the 2 special tokens"),
        (PAD, {"tokenizer": "nowhere"}, "nothing is downloaded"),
        (PAD, {"tokenizer": __file__}, "a readable fast tokenizer"),
        ("errors = 'ignore'", {}, "strict or replace"),
        ("add_special_tokens = 'yes'", {}, "of type bool"),
        ("pad_token = 0", {}, "of type str"),
        ("", {"task": "classification", "label_column": "text", "class_names": "a"}, "without the label 'text'"),
    ],
)
def test_a_wrong_tokenizer_or_argument_is_refused(texts, tokenizer, arguments, settings, error):
    with pytest.raises(SettingError, match=error):
        texts(["hello"], arguments, **{"tokenizer": tokenizer, **settings})


def test_texts_that_are_cut_or_empty_are_counted_once(texts, caplog):
    rows = ["a" * 256, "a" * 257, "", "a" * 10_000_000]
    with caplog.at_level(logging.WARNING, "fed_dpsat"):
        assert [len(row) for row in tokens(texts(rows))] == [256, 256, 0, 256]
    assert caplog.messages == ["of 8 texts, 4 have more than max_length=256 tokens and are cut there, and 2 have none"]


@pytest.mark.slow
def test_a_text_of_ten_million_characters_is_cut_before_it_is_tokenized(texts, tokenizer, caplog):
    with caplog.at_level(logging.WARNING, "fed_dpsat"):
        long, spaces, word, short = tokens(
            texts(
                ["hello " * 1_700_000, " " * 999_995 + "world", "a" * 1_000_000, "hello"],
                PAD,
                tokenizer=tokenizer,
                max_length=8,
            )
        )
    assert long == [2, 5, 5, 5, 5, 5, 5, 3]
    assert spaces == [2, 6, 7, 3], "what a tokenizer leaves out is not what fills a text"
    assert word == [2, 1, 3]
    assert short == [2, 5, 3]
    assert "2 have more than max_length=8" in caplog.text


def test_invalid_utf8_is_refused_by_file_and_row_or_replaced(build, write, tmp_path):
    write("train.csv", b"text\nok\n\xff\xfe!\n")
    write("test.csv", "text\nok\n")
    ask = {"data_source": "csv", "task": "causal-lm"}
    with pytest.raises(DataError, match=r"train.csv, row 1: column 'text' is not UTF-8 .*errors = 'replace'"):
        build("text", **ask)
    assert tokens(build("text", "errors = 'replace'", **ask).train)[1] == list("��!".encode())
    write("train.jsonl", b'{"text": "ok"}\n{"text": "\xff"}\n')
    write("test.jsonl", '{"text": "ok"}\n')
    with pytest.raises(DataError, match=r"train.jsonl, row 1: column 'text' is not UTF-8"):
        build("text", **{**ask, "data_source": "jsonl"})
    claimed = pa.StringArray.from_buffers(2, pa.py_buffer(np.array([0, 1, 2], np.int32)), pa.py_buffer(b"a\xff"))
    for split in ("train", "test"):
        pq.write_table(pa.table({"text": claimed}), tmp_path / "d" / f"{split}.parquet")
    with pytest.raises(DataError, match=r"test.parquet, row 1: column 'text' is not UTF-8"):
        build("text", **{**ask, "data_source": "parquet"})


@pytest.mark.slow
@pytest.mark.parametrize("source", ["csv", "jsonl", "parquet"])
def test_a_text_may_have_ten_million_characters_in_each_format(build, write, tmp_path, source):
    long = "é" * 10_000_000
    for split in ("train", "test"):
        write(f"{split}.csv", f"text\n{long}\nb\n" if split == "train" else "text\nb\n")
        write(f"{split}.jsonl", [{"text": long if split == "train" else ""}, {"text": "b"}])
        pq.write_table(pa.table({"text": [long, "b"]}), tmp_path / "d" / f"{split}.parquet")
    train = build("text", data_source=source, task="causal-lm", max_length=4).train
    assert tokens(train) == [list("éé".encode()), [98]]


def test_a_row_without_a_text_and_a_column_of_numbers_are_refused(texts):
    with pytest.raises(DataError, match=r"row 1: column 'text' has no text; correct it, or write an empty one"):
        texts(["a", {"text": None}])
    with pytest.raises(DataError, match=r"no column 'body'; there are 'text'"):
        texts(["a"], input_columns="body")


@pytest.mark.parametrize(
    ("given", "expected", "labels"),
    [
        ("bytes", [list(b"hello world")], [1, *[-100] * 5, 0, *[-100] * 4]),
        ("special", [[258, *b"hello world", 259]], [-100, 1, *[-100] * 5, 0, *[-100] * 5]),
        ("library", [[2, 5, 6, 7, 3]], [-100, 1, 0, -100, -100]),
    ],
)
def test_the_first_token_of_a_word_has_its_label(texts, tokenizer, given, expected, labels):
    rows = [
        {"words": ["hello", "world"], "tags": ["b", "a"]},
        {"words": [], "tags": []},
        {"words": ["world"], "tags": ["a"]},
    ]
    settings = {"tokenizer": tokenizer} if given == "library" else {}
    arguments = {"bytes": "", "special": "add_special_tokens = true", "library": PAD}[given]
    columns = {"input_columns": "words", "label_column": "tags", "class_names": "a,b"}
    split = texts(rows, arguments, task="token-classification", **columns, **settings)
    assert tokens(split)[:1] == expected
    _, targets = split.batch(torch.tensor([0]))
    assert targets[0, : len(labels)].tolist() == labels
    assert targets[0, len(labels) :].eq(-100).all()
    _, last = split.batch(torch.tensor([2]))
    assert last[last >= 0].tolist() == [0]
    short = texts(rows, arguments, task="token-classification", max_length=4, **columns, **settings)
    assert short.batch(torch.tensor([0]))[1].tolist() == [[*labels[:3], -100]]


@pytest.mark.parametrize("alone", [True, False])
def test_words_of_a_list_are_words_to_a_tokenizer_of_bytes(texts, tmp_path, alone):
    tokenizers = pytest.importorskip("tokenizers")
    letters = ["[PAD]", *"\u0120ab", "\u0120a", "\u0120b"]
    vocabulary = {token: i for i, token in enumerate(letters)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("\u0120", "a"), ("\u0120", "b")]))
    of_bytes = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    steps = [tokenizers.pre_tokenizers.Digits(), of_bytes]
    made.pre_tokenizer = of_bytes if alone else tokenizers.pre_tokenizers.Sequence(steps)
    made.save(str(tmp_path / "bytes.json"))
    columns = {"input_columns": "words", "label_column": "tags", "class_names": "x,y"}
    ask = {"task": "token-classification", "tokenizer": str(tmp_path / "bytes.json"), **columns}
    rows = [{"words": ["a", "b"], "tags": ["x", "y"]}]
    assert tokens(texts(rows, "pad_token = '[PAD]'", **ask)) == [[4, 5]], "and not a and b of one word"


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"words": ["a", "b"], "tags": ["a"]}, "has 2 words and 1 labels"),
        ({"words": ["a", ""], "tags": ["a", "a"]}, "each word, which is not empty, one label"),
        ({"words": ["a"], "tags": ["c"]}, "has the label 'c', which is not one of class_names"),
        ({"words": ["a"], "tags": [None]}, "has no label; give it one of"),
        ({"words": None, "tags": []}, "has no list"),
    ],
)
def test_words_and_labels_that_do_not_fit_are_refused_by_file_and_row(texts, row, error):
    rows = [{"words": ["a"], "tags": ["a"]}, {"words": [], "tags": []}, row]
    with pytest.raises(DataError, match=rf"jsonl, row 2: .*{error}"):
        texts(rows, task="token-classification", input_columns="words", label_column="tags", class_names="a,b")


def test_the_label_of_a_language_model_is_the_text(texts):
    assert texts(["abc"]).labels is None
    assert texts(["abc"]).batch(torch.tensor([0]))[1][0, :4].tolist() == [97, 98, 99, -100]


def test_a_folder_of_files_or_lines(build, write):
    write("train/good/1.txt", "one\n\ntwo\r\n")
    write("train/bad/deep/2.txt", "three")
    write("train/.hidden/3.txt", "no")
    write("train/bad/notes.md", "no")
    write("test/good/1.txt", "")
    ask = {"data_source": "folder", "class_names": "bad,good", "user_column": "file"}
    train = build("text", **ask).train
    assert [bytes(row) for row in tokens(train)] == [b"three", b"one\n\ntwo\r\n"]
    assert train.labels.tolist() == [0, 1]
    assert train.columns["file"].tolist() == ["bad/deep/2.txt", "good/1.txt"]
    write("test/good/1.txt", "line")
    train = build("text", "per_line = true", **ask).train
    assert [bytes(row) for row in tokens(train)] == [b"three", b"one", b"two"]
    assert train.labels.tolist() == [0, 1, 1]
    write("train/good/1.txt", b"one\n\n\xff")
    with pytest.raises(DataError, match=r"good/1.txt, row 2: column 'text' is not UTF-8"):
        build("text", "per_line = true", **ask)
    write("train/good/1.txt", "one")
    write("train/4.txt", "in no class")
    with pytest.raises(DataError, match=r"train/4.txt is in no folder of a class"):
        build("text", **ask)


def test_files_of_a_language_model_need_no_classes(build, write):
    write("train-1.txt", "abc")
    write("train-2.txt", "de")
    write("test.txt", "f")
    data = build("text", data_source="folder", task="causal-lm")
    assert [bytes(row) for row in tokens(data.train)] == [b"abc", b"de"]
    assert [bytes(row) for row in tokens(data.test)] == [b"f"]


def test_a_warm_start_maps_the_cache_and_makes_no_token(build, write, monkeypatch):
    for split in ("train", "test"):
        write(f"{split}.jsonl", [{"text": str(i) * (i % 50)} for i in range(3000)])
    ask = {"data_source": "jsonl", "task": "causal-lm"}
    train = build("text", **ask).train
    first = train.inputs["input_ids"]
    assert [bytes(row).decode() for row in tokens(train)] == [str(i) * (i % 50) for i in range(3000)]

    def forbidden(*args):
        raise DataError("tokenized a second time")

    monkeypatch.setattr(encode_text.TextEncoder, "begin", forbidden)
    second = build("text", **ask).train.inputs["input_ids"]
    assert torch.equal(second.values, first.values)
    assert (second.padding, second.vocabulary_size) == (first.padding, first.vocabulary_size)
    assert "_values.npy" in Path("/proc/self/maps").read_text()
    with pytest.raises(DataError, match="a second time"):
        build("text", max_length=9, **ask)
