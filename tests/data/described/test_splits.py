import numpy as np
import pytest
import torch

from fed_dpsat.errors import DataError, SettingError

ASK = {"data_source": "csv", "label_column": "y", "class_names": "a,b"}
X = "columns = {x = {}}"


def rows(*numbers, split=None):
    head, last = ("x,y,split\n", f",{split}") if split else ("x,y\n", "")
    return head + "".join(f"{number},a{last}\n" for number in numbers)


def values(data):
    return data.train.inputs[:, 0].tolist(), data.test.inputs[:, 0].tolist()


@pytest.mark.parametrize(
    ("files", "arguments", "expected"),
    [
        ({"train.csv": [1], "test.csv": [2]}, "", ([1], [2])),
        ({"train-1.csv": [1], "train-2.csv": [3], "test-1.csv": [2]}, "", ([1, 3], [2])),
        ({"train/b.csv": [3], "train/a.csv": [1], "test/a.csv": [2]}, "", ([1, 3], [2])),
        ({"train.csv": [1], "test.csv": [2], "validation.csv": [9], ".train.csv": [9]}, "", ([1], [2])),
        ({"train.csv": [1], "dev.csv": [2], "test.csv": [9]}, "test_split = 'dev'", ([1], [2])),
    ],
)
def test_names_of_files_and_folders_say_the_split(build, write, files, arguments, expected):
    for name, numbers in files.items():
        write(name, rows(*numbers))
    assert values(build("table", ", ".join(filter(None, (X, arguments))), **ASK)) == expected


def test_another_path_is_the_test_split(build, write, tmp_path):
    train, test = write("all.csv", rows(1, 2)), write("more.csv", rows(3))
    assert values(build("table", X, **{**ASK, "data_path": str(train), "test_path": str(test)})) == ([1, 2], [3])
    with pytest.raises(DataError, match=r"more.csv is in data_path and in test_path"):
        build("table", X, test_path=str(test), **ASK)
    with pytest.raises(DataError, match=r"test_path='nowhere' does not exist; set test_path to a file or folder"):
        build("table", X, test_path="nowhere", **ASK)


def test_the_same_files_in_other_splits_are_another_cache(build, write):
    test, train = write("a/test.csv", rows(2)), write("train.csv", rows(1))
    assert values(build("table", X, **ASK)) == ([1], [2])
    swapped = {**ASK, "data_path": str(test), "test_path": str(train)}
    assert values(build("table", X, **swapped)) == ([2], [1])


def test_a_column_says_the_split_of_each_row(build, write):
    write("a.csv", "x,y,split\n1,a,train\n2,a,test\n3,a,train\n4,a,validation\n")
    assert values(build("table", f"{X}, split_column = 'split'", **ASK)) == ([1, 3], [2])
    asked = f"{X}, split_column = 'split', test_split = 'validation'"
    assert values(build("table", asked, **ASK)) == ([1, 3], [4])
    with pytest.raises(DataError, match=r"a.csv: no column 'fold'; there are 'x', 'y', 'split'"):
        build("table", f"{X}, split_column = 'fold'", **ASK)
    with pytest.raises(DataError, match=r"2 train and 0 test rows; name the public test split"):
        build("table", f"{X}, split_column = 'split', test_split = 'tst'", **ASK)
    write("a.csv", "x,y,split\n1,a,train\nz,a,test\n3,a,train\n4,a,test\n")
    with pytest.raises(DataError, match=r"a.csv, row 1: column 'x' is 'z'"):
        build("table", f"{X}, split_column = 'split'", **ASK)


def test_a_share_is_drawn_from_the_seed_and_only_if_it_is_asked_for(build, write, tmp_path):
    write("a.csv", rows(*range(5000)))

    def ask(**settings):
        return values(build("table", X, **ASK, **settings))

    with pytest.raises(DataError, match=r"the name of no file or folder begins with 'train'.*test_share"):
        build("table", X, **{**ASK, "data_path": str(tmp_path / "d")})
    train, test = ask(test_share=0.2, seed=1)
    assert sorted(train + test) == list(range(5000))
    assert train == sorted(train)
    assert abs(len(test) - 1000) < 5 * np.sqrt(5000 * 0.2 * 0.8)
    assert ask(test_share=0.2, seed=1) == (train, test)
    assert ask(test_share=0.2, seed=2) != (train, test)
    write("test.csv", rows(1))
    with pytest.raises(DataError, match=r"test.csv has the name of a test split, which test_share=0.2 would mix"):
        ask(test_share=0.2)


def test_the_seed_decides_nothing_without_a_share(build, write, tmp_path):
    write("train.csv", rows(1))
    write("test.csv", rows(1))
    for seed in (1, 2):
        build("table", X, seed=seed, **ASK)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_one_file_and_two_rules_are_refused(build, write):
    file = write("all.csv", rows(1))
    with pytest.raises(DataError, match=r"all.csv' is one file; name the public test split: test_path, test_share"):
        build("table", X, **{**ASK, "data_path": str(file)})
    with pytest.raises(SettingError, match=r"test_share=0.5 is not possible with test_path"):
        build("table", X, test_share=0.5, test_path=str(file), **ASK)
    with pytest.raises(SettingError, match=r"another name than train_split"):
        build("table", f"{X}, test_split = 'train'", **ASK)
    with pytest.raises(DataError, match=r"begins with train_split and test_split"):
        build("table", f"{X}, train_split = 'a', test_split = 'al'", **ASK)


def test_a_folder_without_files_of_the_source_is_an_error(build, write):
    with pytest.raises(DataError, match=r"no name of a file ends with .jsonl"):
        build("table", X, **{**ASK, "data_source": "jsonl"})
    with pytest.raises(DataError, match=r"data_path='' does not exist"):
        build("table", X, **{**ASK, "data_path": ""})


def test_a_change_of_a_file_is_seen(build, write):
    write("test.csv", rows(1))
    for number in (1, 2):
        write("train.csv", rows(number))
        assert values(build("table", X, **ASK)) == ([number], [1])


def test_splits_of_datasets(build, tmp_path):
    import datasets

    def save(name, **splits):
        made = {s: datasets.Dataset.from_dict({"x": xs, "y": ["a"] * len(xs)}) for s, xs in splits.items()}
        datasets.DatasetDict(made).save_to_disk(tmp_path / name)
        return {**ASK, "data_source": "disk", "data_path": str(tmp_path / name)}

    both = save("both", train=[1, 2], test=[3], validation=[4])
    assert values(build("table", X, **both)) == ([1, 2], [3])
    assert values(build("table", f"{X}, test_split = 'validation'", **both)) == ([1, 2], [4])
    with pytest.raises(DataError, match=r"no split 'tst', only train, test, validation"):
        build("table", f"{X}, test_split = 'tst'", **both)
    with pytest.raises(DataError, match=r"has a split 'test' of its own; unset test_share"):
        build("table", X, test_share=0.5, **both)
    shuffled = datasets.Dataset.from_dict({"x": list(range(2500)), "y": ["a"] * 2500}).select(range(2499, -1, -1))
    shuffled.save_to_disk(tmp_path / "one")
    one = {**ASK, "data_source": "disk", "data_path": str(tmp_path / "one")}
    with pytest.raises(DataError, match=r"has no splits; name the public test split"):
        build("table", X, **one)
    train, test = values(build("table", X, test_path=str(tmp_path / "both"), **one))
    assert (train, test) == (list(range(2499, -1, -1)), [3])
    with pytest.raises(DataError, match=r"no folder of datasets' save_to_disk"):
        build("table", X, **{**one, "data_path": str(tmp_path)})


def test_a_hub_that_cannot_be_reached_is_an_error_with_the_way_round(build, monkeypatch):
    import datasets

    def unreachable(*args, **kwargs):
        raise ConnectionError("no route")

    hub = {**ASK, "data_source": "hub"}
    with pytest.raises(SettingError, match=r"hub_repo='' is not the name of a data set"):
        build("table", X, **hub)
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"cannot load me/mine \(no route\).*hf download me/mine"):
        build("table", f"{X}, hub_repo = 'me/mine'", **hub)


def test_the_hub_gives_the_same_rows(build, write, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub-cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    write("train.csv", rows(1, 2))
    write("test.csv", rows(3))
    asked = f"{X}, hub_repo = '{tmp_path}/d'"
    assert values(build("table", asked, **{**ASK, "data_source": "hub"})) == ([1, 2], [3])
    with pytest.raises(SettingError, match=r"test_path='x' is not empty with data_source='hub'"):
        build("table", asked, test_path="x", **{**ASK, "data_source": "hub"})


@pytest.mark.parametrize("dataset", ["table", "text"])
def test_all_rows_can_be_private(build, write, dataset):
    for name in ("train.csv", "test.csv", "other.csv"):
        write(name, "x,y,site\n1,a,n\n2,b,s\n")
    arguments = {"table": X, "text": ""}[dataset]
    private = ", ".join(filter(None, [arguments, "all_private = true"]))
    data = build(dataset, private, **ASK, input_columns="x", user_column="site")
    assert (len(data.train), len(data.test)) == (6, 0)
    assert data.train.columns["site"].tolist() == ["n", "s"] * 3
    assert len(data.test.batch(torch.arange(0))[1]) == 0
    with pytest.raises(SettingError, match="all_private=True is not possible with test_share"):
        build(dataset, private, **ASK, input_columns="x", test_share=0.5)
    for name in ("train.csv", "test.csv", "other.csv"):
        write(name, "x,y,site\n")
    with pytest.raises(DataError, match="there is no row; name files with examples"):
        build(dataset, private, **ASK, input_columns="x")
