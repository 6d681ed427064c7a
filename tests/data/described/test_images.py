import io

import numpy as np
import pytest
from PIL import Image

from fed_dpsat.errors import DataError, SettingError

ASK = {"data_source": "folder", "class_names": "cat,dog"}
SIZE = "image_size = [2, 3]"


def encoded(pixels: np.ndarray, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()


COLOUR = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
GREY = np.arange(6, dtype=np.uint8).reshape(2, 3)


def test_folders_are_classes(build, write):
    write("train/dog/1.png", encoded(COLOUR))
    write("train/cat/below/2.png", encoded(COLOUR + 1))
    write("train/.cache/3.png", b"no")
    write("train/cat/.DS_Store", b"no")
    write("test/dog/1.png", encoded(COLOUR))
    data = build("images", SIZE, **ASK)
    expected = np.stack([COLOUR + 1, COLOUR]).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(data.train.inputs, expected)
    assert data.train.labels.tolist() == [0, 1]
    assert data.input_shape == (3, 2, 3)
    assert data.train.mean == data.train.std == (0.5,) * 3
    assert build("images", f"{SIZE}, mean = [0.1, 0.2, 0.3]", **ASK).train.mean == (0.1, 0.2, 0.3)


def test_grey_images_and_another_path_for_the_test_split(build, write, tmp_path):
    write("cat/1.png", encoded(GREY))
    write("dog/2.png", encoded(GREY))
    write("../public/dog/2.png", encoded(GREY))
    data = build("images", f"{SIZE}, channels = 1", test_path=str(tmp_path / "public"), **ASK)
    np.testing.assert_array_equal(data.train.inputs[:, 0], [GREY, GREY])
    assert data.test.labels.tolist() == [1]


@pytest.mark.parametrize("source", ["parquet", "disk"])
@pytest.mark.parametrize("kind", ["struct", "bytes"])
def test_columns_hold_encoded_images(build, tmp_path, source, kind):
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    png = encoded(COLOUR)
    column = pa.array([png, png]) if kind == "bytes" else pa.array([{"bytes": png, "path": None}] * 2)
    table = pa.table({"picture": column, "label": ["dog", "cat"]})
    path = tmp_path / "d"
    for split in ("train", "test"):
        pq.write_table(table, path / f"{split}.parquet")
    if source == "disk":
        whole, path = datasets.Dataset(table), tmp_path / "disk"
        datasets.DatasetDict({"train": whole, "test": whole}).save_to_disk(path)
    ask = {**ASK, "data_source": source, "data_path": str(path), "input_columns": "picture", "label_column": "label"}
    data = build("images", SIZE, **ask)
    np.testing.assert_array_equal(data.train.inputs[0], COLOUR.transpose(2, 0, 1))
    assert data.train.labels.tolist() == [1, 0]
    with pytest.raises(DataError, match=r"column 'label' is .*string, not bytes"):
        build("images", SIZE, **{**ask, "input_columns": "label", "label_column": "picture"})


def test_another_size_or_colour_is_refused_or_made_to_fit(build, write):
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was turned by 90 degrees
    tall = np.zeros((3, 2), dtype=np.uint8)
    tall[0] = 255
    write("train/cat/1.jpg", encoded(tall.repeat(32, 0).repeat(32, 1), "JPEG", exif=turned, quality=95))
    write("test/cat/1.png", encoded(COLOUR))
    with pytest.raises(DataError, match=r"train/cat/1.jpg: a 64x96 L image, not 3x2 RGB.*fit = true"):
        build("images", SIZE, **ASK)
    pixels = build("images", f"{SIZE}, fit = true", **ASK).train.inputs[0]
    assert tuple(pixels.shape) == (3, 2, 3)
    assert (pixels[:, :, 2] > 200).all(), "the upper side of the file is the right one of the picture"
    assert (pixels[:, :, :2] < 55).all()


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("train/cow/1.png", None, r"train/cow/1.png: column 'label' has the label 'cow', which is not one of"),
        ("train/1.png", None, r"train/1.png is in no folder of a class; move it into the folder of its class"),
        ("train/cat/1.png", b"broken", r"train/cat/1.png: not a readable image \(neither PNG nor JPEG\)"),
        ("train/cat/1.bmp", None, r"1.bmp is not one of .png, .jpg, .jpeg; convert it"),
    ],
)
def test_a_file_that_is_no_example_is_an_error_with_its_name(build, write, name, content, error):
    write("train/dog/1.png", encoded(COLOUR))
    write("test/dog/1.png", encoded(COLOUR))
    write(name, content or encoded(COLOUR))
    with pytest.raises(DataError, match=error):
        build("images", SIZE, **ASK)


@pytest.mark.parametrize(
    ("arguments", "settings", "error"),
    [
        ("", {}, "the pixels of a side"),
        ("image_size = 'x'", {}, "the pixels of a side"),
        ("image_size = [1, 2, 3]", {}, "the pixels of a side"),
        ("image_size = 2, channels = 2", {}, "1 is grey and 3 is colour"),
        ("image_size = 2, fit = 'yes'", {}, "of type bool"),
        ("image_size = 2", {"data_source": "csv"}, "one of parquet, folder, disk, hub"),
        ("image_size = 2", {"input_columns": "a,b"}, "one column of images"),
        ("image_size = 2, split_column = 'x'", {}, "possible with data_source='folder'"),
        ("image_size = 2", {"class_names": ""}, "declare all classes"),
    ],
)
def test_a_wrong_declaration_is_refused(build, arguments, settings, error):
    with pytest.raises(SettingError, match=error):
        build("images", arguments, **{**ASK, **settings})
