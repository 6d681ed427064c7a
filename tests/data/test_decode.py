import numpy as np
import pyarrow as pa
import pytest

from fed_dpsat.data.decode import decode_images
from fed_dpsat.errors import DataError

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
GREY = np.arange(12, dtype=np.uint8).reshape(1, 3, 4)
COLOUR = np.arange(36, dtype=np.uint8).reshape(3, 3, 4)


def table(images, labels):
    rows = [image if image is None else {"bytes": image, "path": None} for image in images]
    return pa.table({"image": pa.array(rows, IMAGE), "label": pa.array(labels)})


def decode(*tables, shape=(1, 3, 4), num_classes=3):
    named = [(f"file{i}", table) for i, table in enumerate(tables)]
    return decode_images(named, image_column="image", label_column="label", shape=shape, num_classes=num_classes)


@pytest.mark.parametrize("pixels", [GREY, COLOUR], ids=["grey", "colour"])
def test_png_gives_back_the_pixels_channels_first(encode, pixels):
    inputs, labels = decode(table([encode(pixels), encode(pixels + 1)], [2, 0]), shape=pixels.shape)
    np.testing.assert_array_equal(inputs, np.stack([pixels, pixels + 1]))
    assert inputs.dtype == np.uint8
    assert labels.dtype == np.int64
    assert labels.tolist() == [2, 0]


def test_jpeg_is_near_the_pixels(encode):
    inputs, _ = decode(table([encode(np.full((3, 3, 4), 77, np.uint8), "JPEG")], [0]), shape=(3, 3, 4))
    assert np.abs(inputs.astype(int) - 77).max() <= 2


def test_tables_follow_one_another_also_slices_of_them(encode):
    whole = table([encode(GREY + i) for i in range(5)], [0, 1, 2, 0, 1])
    inputs, labels = decode(whole.slice(3, 2), whole.slice(0, 2))
    assert inputs[:, 0, 0, 0].tolist() == [3, 4, 0, 1]
    assert labels.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda encode: b"no image", "not a readable image"),
        (lambda encode: b"", "not a readable image"),
        (lambda encode: encode(GREY)[:45], "not a readable image"),
        (lambda encode: encode(GREY, "BMP"), "not a readable image"),
        (lambda encode: None, "no image bytes"),
        (lambda encode: encode(GREY[:, :2]), "a 4x2 L image, not 4x3 L"),
        (lambda encode: encode(COLOUR), "a 4x3 RGB image, not 4x3 L"),
    ],
)
def test_a_bad_image_is_an_error_with_file_and_row(encode, bad, message):
    good = table([encode(GREY)], [0])
    with pytest.raises(DataError, match=f"file1, row 1: {message}"):
        decode(good, table([encode(GREY), bad(encode)], [0, 0]))


@pytest.mark.parametrize("label", [-1, 3, None])
def test_a_bad_label_is_an_error_with_file_and_row(encode, label):
    with pytest.raises(DataError, match=rf"file0, row 1: label {label} is not in \[0, 3\)"):
        decode(table([encode(GREY)] * 2, [0, label]))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"img": [None], "label": [0]}, "file0: no column 'image', only img, label"),
        ({"image": [b""], "label": [0]}, "column 'image' is binary, not struct"),
        ({"image": pa.array([None], IMAGE), "label": [0.0]}, "column 'label' is double, not an integer"),
    ],
)
def test_wrong_columns_are_an_error_with_the_file(columns, message):
    with pytest.raises(DataError, match=message):
        decode(pa.table(columns))


def test_no_rows_are_an_error():
    with pytest.raises(DataError, match="file0: no rows"):
        decode(table([], pa.array([], pa.int64())))
