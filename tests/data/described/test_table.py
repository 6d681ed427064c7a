import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from fed_dpsat.errors import DataError, SettingError

COLUMNS = (
    "columns = {age = {mean = 40, std = 10}, sex = {values = ['f', 'm']}, dose = {low = 0, high = 4}, "
    "income = {log = true, std = 2, missing = -1}}"
)
ROWS = [
    {"age": 50, "sex": "m", "dose": 1.0, "income": None, "site": "n", "y": "yes"},
    {"age": 40, "sex": "x", "dose": 4.0, "income": 0.0, "site": "s", "y": "no"},
]
CSV = "age,sex,dose,income,site,y\n50,m,1,,n,yes\n40,x,4.0,0,s,no\n"
LABELS = {"label_column": "y", "class_names": "no,yes"}


@pytest.fixture
def write_rows(tmp_path, write):
    """``write_rows(source, rows, csv)``: a train and a test file of a format, or a folder of datasets."""

    def write_rows(source: str, rows: list[dict], csv: str) -> None:
        import datasets

        if source == "disk":
            whole = datasets.Dataset.from_list(rows)
            datasets.DatasetDict({"train": whole, "test": whole}).save_to_disk(tmp_path / "d")
        for split in ("train", "test"):
            if source == "csv":
                write(f"{split}.csv", csv)
            elif source == "jsonl":
                write(f"{split}.jsonl", rows)
            elif source == "parquet":
                pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d" / f"{split}-0.parquet")

    return write_rows


@pytest.mark.parametrize("source", ["csv", "jsonl", "parquet", "disk"])
def test_each_format_gives_the_same_scaled_numbers_and_coded_categories(build, write_rows, source):
    write_rows(source, ROWS, CSV)
    data = build("table", COLUMNS, data_source=source, user_column="site", **LABELS)
    expected = [[1, 0, 1, 0, 0.25, -1, 1], [0, 0, 0, 1, 1, 0, 0]]  # age | f m other | dose | income, missing
    for split in (data.train, data.test):
        assert split.inputs.tolist() == expected
        assert split.labels.tolist() == [1, 0]
        assert split.columns["site"].tolist() == ["n", "s"]
        assert split.batch(torch.arange(2))[0].tolist() == expected
    assert data.class_names == ("no", "yes")


def test_values_that_are_not_declared_are_counted_once(build, write, caplog):
    for split in ("train", "test"):
        write(f"{split}.csv", CSV)
    for _ in range(2):
        build(
            "table",
            "columns = {sex = {values = ['f', 'm']}, site = {values = ['n', 's']}}",
            data_source="csv",
            **LABELS,
        )
    assert caplog.messages == ["column 'sex' has 2 values that are missing or not declared: they are \"other\""]


def test_codes_keep_numbers_and_categories_apart(build, write):
    for split in ("train", "test"):
        write(f"{split}.csv", CSV)
    inputs = build("table", COLUMNS + ", encoding = 'codes'", data_source="csv", **LABELS).train.inputs
    assert inputs["numbers"].tolist() == [[1, 0.25, -1, 1], [0, 1, 0, 0]]
    assert inputs["categories"].tolist() == [[1], [2]]
    assert inputs["categories"].dtype == torch.int64


def test_columns_of_a_file_are_those_of_the_arguments(build, write, tmp_path):
    for split in ("train", "test"):
        write(f"{split}.csv", CSV)
    file = tmp_path / "columns.toml"
    file.write_text('[age]\nmean = 40\nstd = 10\n[sex]\nvalues = ["f", "m"]\n')
    data = build("table", columns_file=str(file), data_source="csv", input_columns="sex, age", **LABELS)
    assert data.train.inputs.tolist() == [[0, 1, 0, 1], [0, 0, 1, 0]]
    file.write_text("[age]\nmean = 30\nstd = 10\n")
    data = build("table", columns_file=str(file), data_source="csv", **LABELS)
    assert data.train.inputs.tolist() == [[2], [1]], "another declaration is another cache"


@pytest.mark.parametrize(
    ("settings", "arguments", "labels", "names"),
    [
        ({"label_column": "k", "class_names": "0,1,2"}, "", [2, 0], ("0", "1", "2")),
        ({"label_column": "k", "class_names": "a,b,c"}, "", [2, 0], ("a", "b", "c")),
        ({"label_column": "k,j", "task": "multilabel"}, "", None, None),
        ({"label_column": "j,b", "task": "multilabel"}, "", [[1, 1], [0, 0]], ("j", "b")),
        ({"label_column": "l", "task": "multilabel", "class_names": "a,b"}, "", [[1, 1], [0, 0]], ("a", "b")),
        (
            {"label_column": "t", "task": "multilabel", "class_names": "a,b"},
            "label_separator = '|'",
            [[0, 1], [1, 1]],
            ("a", "b"),
        ),
        ({"label_column": "x", "task": "regression"}, "", [2.5, -1], ("x",)),
        ({"label_column": "x,k", "task": "regression"}, "", [[2.5, 2], [-1, 0]], ("x", "k")),
        (
            {"label_column": "k", "class_names": "0,1,2", "task": "mine.py:task"},
            "labels_like = 'classification'",
            [2, 0],
            None,
        ),
    ],
)
@pytest.mark.parametrize("source", ["jsonl", "parquet", "disk"])
def test_labels_are_those_of_the_task(build, write_rows, source, settings, arguments, labels, names):
    rows = [
        {"a": 1, "k": 2, "j": 1, "b": True, "l": ["b", "a"], "t": " b", "x": 2.5},
        {"a": 2, "k": 0, "j": 0, "b": False, "l": [], "t": "a| b", "x": -1.0},
    ]
    write_rows(source, rows, "")
    arguments = "columns = {a = {}}" + (f", {arguments}" if arguments else "")
    if labels is None:
        with pytest.raises(DataError, match=r"row 0: column 'k' is 2, not 0 or 1"):
            build("table", arguments, data_source=source, **settings)
        return
    data = build("table", arguments, data_source=source, **settings)
    assert data.train.labels.tolist() == labels
    assert names is None or data.class_names == names
    assert data.train.inputs.tolist() == [[1], [2]]


def test_the_scale_of_a_target_is_declared_and_metrics_have_its_units(build, write):
    for split in ("train", "test"):
        write(f"{split}.csv", "a,price\n1,200\n2,300\n")
    arguments = "columns = {a = {}, price = {mean = 250, std = 50}}"
    data = build("table", arguments, data_source="csv", task="regression", label_column="price")
    assert data.train.labels.tolist() == [200, 300]
    assert data.label_scale == ((250, 50),)
    assert data.train.inputs.tolist() == [[1], [2]], "a label is no input"


@pytest.mark.parametrize("source", ["csv", "jsonl", "parquet", "disk"])
def test_a_missing_column_is_an_error_that_lists_those_there_are(build, write_rows, source):
    write_rows(source, ROWS, CSV)
    with pytest.raises(DataError, match=r"no column 'bmi'; there are 'age', 'sex', 'dose', 'income', 'site', 'y'"):
        build("table", "columns = {bmi = {}}", data_source=source, **LABELS)


@pytest.mark.parametrize("source", ["csv", "jsonl", "parquet", "disk"])
def test_no_value_in_a_number_is_refused_by_file_and_row(build, write_rows, source):
    write_rows(source, ROWS[::-1], CSV.replace("1,,n", "1,nan,n"))
    row = 0 if source == "csv" else 1
    with pytest.raises(DataError, match=rf"d.*, row {row}: column 'income' is empty or NaN.*declare missing = 0"):
        build("table", "columns = {income = {}}", data_source=source, **LABELS)


@pytest.mark.parametrize(
    ("value", "column", "error"),
    [
        ("inf", "{}", "is inf, not a finite number"),
        ("1e300", "{}", r"is 1e\+300 after scaling"),
        ("-1", "{log = true}", r"is -1, which has no log\(1 \+ x\)"),
        ("old", "{}", "is 'old', which is no number; correct it, or declare its column as categories"),
        ("old", "{missing = 0}", "is 'old', which is no number; correct it"),
        ("\xff", "{}", "is not UTF-8"),
    ],
)
def test_a_value_that_is_no_number_is_refused_by_file_and_row(build, write, value, column, error):
    write("train.csv", b"x,y\n1,no\n%b,yes\n" % value.encode("latin-1"))
    write("test.csv", "x,y\n1,no\n")
    with pytest.raises(DataError, match=rf"train.csv, row 1: column 'x' {error}"):
        build("table", f"columns = {{x = {column}}}", data_source="csv", **LABELS)


def test_a_whole_number_is_no_place_if_a_class_has_such_a_name(build, write):
    write("train.csv", "x,y\n1,0\n1,10\n")
    write("test.csv", "x,y\n1,0\n1,1\n")
    with pytest.raises(DataError, match=r"test.csv, row 1: column 'y' has the label '1'"):
        build("table", "columns = {x = {}}", data_source="csv", label_column="y", class_names="10,0")
    write("test.csv", "x,y\n1,0\n")
    data = build("table", "columns = {x = {}}", data_source="csv", label_column="y", class_names="10,0")
    assert data.train.labels.tolist() == [1, 0]


@pytest.mark.parametrize("label", ["maybe", "", "2", "-1"])
def test_a_label_outside_its_declared_set_is_refused_by_file_and_row(build, write, label):
    write("train.csv", f"x,y\n1,no\n1,{label}\n")
    write("test.csv", "x,y\n1,no\n")
    with pytest.raises(
        DataError, match=rf"train.csv, row 1: .*label '{label}', which is not one of class_names \('no'"
    ):
        build("table", "columns = {x = {}}", data_source="csv", **LABELS)


@pytest.mark.parametrize(
    ("arguments", "settings", "error"),
    [
        ("columns = {age = {men = 3}}", {}, "'men' is no key of it"),
        ("columns = {age = {std = 0}}", {}, "with std above 0"),
        ("columns = {age = {low = 3}}", {}, "low and high, or mean and std"),
        ("columns = {age = {low = 3, high = 2}}", {}, "high above low"),
        ("columns = {age = {mean = true}}", {}, "a finite number"),
        ("columns = {age = {log = 1}}", {}, "true or false"),
        ("columns = {age = 3}", {}, "a declaration"),
        ("columns = {sex = {values = []}}", {}, "a list of values"),
        ("columns = {sex = {values = ['1', 1]}}", {}, "without repetition"),
        ("columns = {age = {}}", {"input_columns": "age,bmi"}, "all declared: 'bmi' is not"),
        ("columns = {age = {}, y = {}}", {"input_columns": "age,y"}, "without the label 'y'"),
        ("", {}, "a list of declared columns"),
        ("columns = {age = {}}", {"label_column": ""}, "the name of a column"),
        ("columns = {age = {}}", {"class_names": ""}, "not looked up in private rows"),
        ("columns = {age = {}}", {"class_names": "a,b,a"}, "without repetition"),
        ("columns = {age = {}}", {"label_column": "a,b"}, "'multilabel' takes several"),
        ("columns = {age = {}}", {"task": "causal-lm"}, "one of classification, multilabel, regression"),
        ("columns = {age = {missing = 0}}", {"label_column": "age", "task": "regression"}, "never missing"),
        ("columns = {age = {}}", {"data_source": "folder"}, "one of csv, jsonl, parquet, disk, hub"),
        ("columns = {age = {}}", {"columns_file": "no.toml"}, "possible with columns"),
        ("", {"columns_file": "no.toml"}, "a file that exists; name the TOML file"),
        ("columns = {age = {}}, encoding = 'hot'", {}, "one of one-hot, codes"),
        ("columns = {age = {}}, image_column = 'x'", {}, "it is input_columns now"),
        ("columns = {age = {}}, delimitr = 'x'", {}, "did you mean delimiter"),
        ("columns = {age = {}}, delimiter = 3", {}, "of type str"),
    ],
)
def test_a_wrong_declaration_is_refused_before_a_file_is_read(build, arguments, settings, error):
    with pytest.raises(SettingError, match=error):
        build("table", arguments, **{"data_source": "csv", **LABELS, **settings})


def test_classes_that_datasets_has_named_have_their_names(build, tmp_path):
    import datasets

    features = datasets.Features({"x": datasets.Value("int64"), "y": datasets.ClassLabel(names=["yes", "no"])})
    whole = datasets.Dataset.from_dict({"x": [1, 2], "y": [0, 1]}, features=features)
    datasets.DatasetDict({"train": whole, "test": whole.select([1])}).save_to_disk(tmp_path / "d" / "disk")
    for split in ("train", "test"):
        whole.to_parquet(tmp_path / "d" / f"{split}.parquet")
    for source, path in (("disk", "d/disk"), ("parquet", "d")):
        data = build("table", "columns = {x = {}}", data_source=source, data_path=str(tmp_path / path), **LABELS)
        assert data.train.labels.tolist() == [1, 0]
    hub = datasets.Dataset.from_dict({"x": [1], "y": [-1]}, features=features)
    datasets.DatasetDict({"train": hub, "test": hub}).save_to_disk(tmp_path / "d" / "unlabelled")
    with pytest.raises(DataError, match="has no label; give it one of class_names"):
        build("table", "columns = {x = {}}", data_source="disk", data_path=str(tmp_path / "d" / "unlabelled"), **LABELS)


@pytest.mark.parametrize("values", [["1", "2.5"], [True, False], [1, 2.5], [1, None]])
def test_numbers_of_json_may_be_texts_or_true(build, write, values):
    rows = [{"x": value, "y": "no"} for value in values]
    write("train.jsonl", rows)
    write("test.jsonl", rows)
    data = build("table", "columns = {x = {missing = 9}}", data_source="jsonl", **LABELS)
    assert data.train.inputs[:, 0].tolist() == [9 if value is None else float(value) for value in values]


def test_marks_and_line_ends_of_other_systems_are_no_part_of_a_value(build, write):
    write("train.csv", '\ufeffx,y\r\n1,no\r\n2,"ye\ns"\r\n')
    write("test.csv", 'x,y\n1,"no"\n')
    labels = {**LABELS, "class_names": '"ye\ns",no'}
    data = build("table", "columns = {x = {}}", data_source="csv", **labels)
    assert (data.train.inputs.tolist(), data.train.labels.tolist()) == ([[1], [2]], [1, 0])


def test_a_column_that_is_there_twice_is_refused(build, write):
    write("train.csv", "x,x,y\n1,2,no\n")
    write("test.csv", "x,y\n1,no\n")
    with pytest.raises(DataError, match=r"train.csv: column 'x' is there twice"):
        build("table", "columns = {x = {}}", data_source="csv", **LABELS)


def test_whole_numbers_with_gaps_are_the_same_categories(build, tmp_path):
    table = pa.table({"k": pa.array([1.0, None, 2.5, 3.0]), "y": ["no"] * 4})
    for split in ("train", "test"):
        pq.write_table(table, tmp_path / "d" / f"{split}.parquet")
    data = build("table", "columns = {k = {values = [1, 3]}}", data_source="parquet", **LABELS)
    assert data.train.inputs.argmax(1).tolist() == [0, 2, 2, 1]


def test_users_may_be_numbers_and_a_row_without_one_is_refused(build, write):
    rows = [{"x": 1, "y": "no", "u": 7}, {"x": 1, "y": "no", "u": 8}]
    write("train.jsonl", rows)
    write("test.jsonl", rows)
    ask = {"data_source": "jsonl", "user_column": "u", **LABELS}
    assert build("table", "columns = {x = {}}", **ask).train.columns["u"].tolist() == [7, 8]
    write("train.jsonl", [{**rows[0], "u": None}, rows[1]])
    with pytest.raises(DataError, match=r"train.jsonl, row 0: column 'u' names no user"):
        build("table", "columns = {x = {}}", **ask)


def test_rows_beyond_one_chunk_have_their_number_and_their_place(build, write):
    rows = [{"x": i, "y": "no", "u": f"user{i}"} for i in range(2500)]
    write("train.jsonl", rows)
    write("test.jsonl", rows[:1])
    ask = {"data_source": "jsonl", "user_column": "u", **LABELS}
    data = build("table", "columns = {x = {}}", **ask)
    np.testing.assert_array_equal(data.train.inputs[:, 0], np.arange(2500))
    assert data.train.columns["u"][2100] == "user2100"
    write("train.jsonl", [*rows[:2100], {"x": None, "y": "no", "u": "z"}])
    with pytest.raises(DataError, match=r"train.jsonl, row 2100"):
        build("table", "columns = {x = {}}", **ask)


def test_a_broken_file_is_an_error_with_its_name(build, write):
    write("test.csv", CSV)
    write("train.csv", CSV + "1,2\n")
    with pytest.raises(DataError, match=r"train.csv: not a readable CSV.*Expected 6 columns, got 2"):
        build("table", COLUMNS, data_source="csv", **LABELS)
    write("test.jsonl", json.dumps(ROWS[0]))
    write("train.jsonl", "{")
    with pytest.raises(DataError, match=r"train.jsonl: not a readable JSON lines"):
        build("table", COLUMNS, data_source="jsonl", **LABELS)
    write("test.parquet", b"no")
    write("train.parquet", b"no")
    with pytest.raises(DataError, match=r"test.parquet: not a readable Parquet"):
        build("table", COLUMNS, data_source="parquet", **LABELS)
