"""A device's own data by path: the same examples from a folder of images, from Parquet and from a function."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from flwr.app import MessageType, RecordDict
from PIL import Image

from fed_dpsat.device.data import own_data
from fed_dpsat.device.policy import Policy, PolicyError
from fed_dpsat.errors import DataError, InputError
from fed_dpsat.flower.wire import records

CLASSES = ("cat", "dog", "owl")


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((2, 3), value, dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def policy(device):
    """A device without an owl: two cats and a dog."""
    (device.path / "images" / "cat").mkdir(parents=True)
    (device.path / "images" / "dog").mkdir()
    (device.path / "images" / ".ipynb_checkpoints").mkdir()  # a hidden folder is no class
    for name, value in (("cat/a.png", 10), ("cat/b.PNG", 20), ("dog/c.png", 30), (".ipynb_checkpoints/a.png", 40)):
        (device.path / "images" / name).write_bytes(png(value))
    return dataclasses.replace(
        device.policy, data_source="folder", data_path=str(device.path / "images"), class_names=CLASSES,
        image_size=(2, 3), channels=1, mean=(0.5,), std=(0.25,),
    )  # fmt: skip


def seen(policy):
    inputs, labels = own_data(policy).train.batch(torch.arange(3))
    return inputs[:, 0, 0, 0], labels


EXPECTED = (torch.tensor([10.0, 20.0, 30.0]) / 255 - 0.5) / 0.25


def test_a_folder_of_images_by_class(policy):
    inputs, labels = seen(policy)
    torch.testing.assert_close(inputs, EXPECTED)
    assert labels.tolist() == [0, 0, 1]
    data = own_data(policy)
    assert (data.num_classes, data.input_shape, len(data.test), data.name) == (3, (1, 2, 3), 0, "pixels")


def test_parquet(policy, tmp_path):
    images = [{"bytes": png(value), "path": None} for value in (10, 20, 30)]
    (tmp_path / "parquet").mkdir()
    pq.write_table(pa.table({"image": images[:2], "label": [0, 0]}), tmp_path / "parquet" / "a.parquet")
    pq.write_table(pa.table({"image": images[2:], "label": [1]}), tmp_path / "parquet" / "b.parquet")
    inputs, labels = seen(dataclasses.replace(policy, data_source="parquet", data_path=str(tmp_path / "parquet")))
    torch.testing.assert_close(inputs, EXPECTED)
    assert labels.tolist() == [0, 0, 1]


def test_the_column_of_images_has_the_name_of_the_setting_or_the_older_one(policy, tmp_path):
    images = [{"bytes": png(value), "path": None} for value in (10, 20, 30)]
    (tmp_path / "parquet").mkdir()
    pq.write_table(pa.table({"scan": images, "label": [0, 0, 1]}), tmp_path / "parquet" / "a.parquet")
    parquet = dataclasses.replace(policy, data_source="parquet", data_path=str(tmp_path / "parquet"))
    for name in ({"input_columns": ("scan",)}, {"image_column": "scan"}):
        inputs, _ = seen(dataclasses.replace(parquet, **name))
        torch.testing.assert_close(inputs, EXPECTED)


def test_a_corrected_column_is_decoded_anew(policy, tmp_path):
    """Not the old labels, or the old images, out of the cache."""
    (tmp_path / "parquet").mkdir()
    images, others = ([{"bytes": png(v), "path": None} for v in values] for values in ((10, 20, 30), (11, 21, 31)))
    table = pa.table({"image": images, "other": others, "coarse": [0, 0, 0], "fine": [0, 1, 2]})
    pq.write_table(table, tmp_path / "parquet" / "a.parquet")
    parquet = dataclasses.replace(policy, data_source="parquet", data_path=str(tmp_path / "parquet"))
    assert seen(dataclasses.replace(parquet, label_column="coarse"))[1].tolist() == [0, 0, 0]
    inputs, labels = seen(dataclasses.replace(parquet, label_column="fine"))
    assert labels.tolist() == [0, 1, 2]
    torch.testing.assert_close(inputs, EXPECTED)
    inputs, _ = seen(dataclasses.replace(parquet, label_column="fine", image_column="other"))
    torch.testing.assert_close(inputs, EXPECTED + 1 / 255 / 0.25)


def test_classes_in_another_order_are_other_labels(policy):
    assert seen(policy)[1].tolist() == [0, 0, 1]
    assert seen(dataclasses.replace(policy, class_names=("dog", "cat", "owl")))[1].tolist() == [1, 1, 0]


def test_what_was_added_between_two_runs_is_in_the_next(device):
    assert identity(device, run=7) == 20
    (device.path / "data.py").write_text((device.path / "data.py").read_text().replace("20", "10"))
    assert identity(device, run=7) == 20
    assert identity(device, run=8) == 10
    reply = device.ask(run=8).content
    assert reply[records.METRICS]["num-examples"] == 10


def identity(device, run):
    return device.send(RecordDict(), MessageType.QUERY, run=run).content[records.IDENTITY]["num_examples"]


def test_a_function(device):
    data = own_data(device.policy)
    assert (len(data.train), data.input_shape, data.class_names) == (20, (1, 2), ("dark", "light"))


NUMBERS = """
import torch
from fed_dpsat.data import Dataset, Examples

def numbers():
    train = Examples(inputs=torch.zeros(20, 1, 2), labels=torch.arange(20.0), mean=(0.0,), std=(1.0,))
    return Dataset(name="numbers", train=train, test=train, label_scale=((10.0, 5.0),), declared="a", tokenizer="b")

def classes():
    return Examples(inputs=torch.zeros(20, 1, 2), labels=torch.arange(20) % 2, mean=(0.0,), std=(1.0,))
"""


def test_a_function_keeps_what_it_declares_and_only_classes_need_names(device):
    (device.path / "numbers.py").write_text(NUMBERS)
    source = device.path / "numbers.py"
    policy = dataclasses.replace(device.policy, data_path=f"{source}:numbers", class_names=())
    data = own_data(policy)
    assert (data.label_scale, data.declared, data.tokenizer) == (((10.0, 5.0),), "a", "b")
    assert (data.name, len(data.train), len(data.test)) == ("pixels", 20, 0)
    with pytest.raises(DataError, match="20 examples of 0 classes; a device needs at least one each"):
        own_data(dataclasses.replace(policy, data_path=f"{source}:classes"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"class_names": ("cat", "owl")}, r"images/dog/c.png: .*'dog', which is not one of class_names"),
        ({"channels": 3, "mean": (), "std": ()}, r"images/cat/a.png: a 3x2 L image, not 3x2 RGB.*fit = true"),
        ({"class_names": ()}, "class_names='' is not a list of names"),
        ({"data_path": "/nowhere/at/all"}, "data_path='/nowhere/at/all' does not exist"),
        ({"data_source": "hub"}, "data_source='hub' is not one of folder, parquet, images, function"),
        ({"data_source": "parquet"}, "no name of a file ends with .parquet"),
        ({"data_source": "function", "data_path": "json:dumps"}, "needs 'obj'"),
        ({"data_source": "function", "data_path": "os:getcwd"}, "returned a str, not Examples"),
    ],
)
def test_data_that_is_not_there_is_told(policy, changes, says):
    with pytest.raises(ValueError, match=says) as raised:
        own_data(dataclasses.replace(policy, **changes))
    assert isinstance(raised.value, InputError)


def test_what_is_decoded_lies_on_the_device(policy, device):
    own_data(dataclasses.replace(policy, largest_epsilon=3.0))
    assert [p.name.rpartition("-")[0] for p in (device.folder / "cache").iterdir()] == ["images"]


def test_the_file_of_an_image_that_cannot_be_read_is_told(policy, device):
    (device.path / "images" / "dog" / "broken.png").write_bytes(png(1)[:40])
    with pytest.raises(DataError, match=r"images/dog/broken.png: not a readable image"):
        own_data(policy)
    (device.path / "images" / "dog" / "broken.png").rename(device.path / "images" / "dog" / "scan.tif")
    with pytest.raises(DataError, match=r"images/dog/scan.tif is not one of .png, .jpg, .jpeg; convert it"):
        own_data(policy)


def test_size_and_colour_are_keys_of_the_policy_and_so_is_the_conversion(policy, device):
    changed = {"image_size": 4, "channels": 3, "fit": "true", "mean": "[0.5, 0.5, 0.5]", "std": "[1.0, 1.0, 1.0]"}
    device.write(data_source='"folder"', data_path='"images"', class_names='["cat", "dog"]', **changed)
    assert own_data(Policy.load(device.policy_path)).input_shape == (3, 4, 4)
    older = dataclasses.replace(policy, data_source="images", image_size=(), shape=(1, 2, 3))
    assert own_data(older).input_shape == (1, 2, 3)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"image_size": ()}, "image_size=.* is not the pixels of both sides"),
        ({"image_size": (0, 4)}, "image_size=.* is not the pixels of both sides"),
        ({"shape": (1, 2, 3)}, "shape=.* is not needed beside image_size"),
        ({"channels": 4}, "channels=4 is not of 1 or 3 channels; 1 is grey, 3 is colour"),
        ({"image_size": (), "shape": (2, 3)}, "image_size=.* is not the pixels of both sides"),
        ({"mean": (0.5, 0.5)}, "mean=.* is not a list of 1 numbers"),
        ({"std": (0.0,)}, "std=.* is not a list of numbers above 0"),
    ],
)
def test_an_image_is_declared_once_and_whole(policy, changes, says):
    with pytest.raises(PolicyError, match=says):
        dataclasses.replace(policy, **changes)
