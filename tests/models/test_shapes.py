import pytest

from fed_dpsat.models._shapes import image_shape, shape_error, vector_size


@pytest.mark.parametrize(("shape", "size"), [((64,), 64), ((1, 8, 8), 64), ((3, 32, 32), 3072), ((1,), 1)])
def test_vector_size_counts_the_numbers_of_one_example(shape, size):
    assert vector_size("mlp", shape) == size


@pytest.mark.parametrize("shape", [(), (0,), (1, -8, 8)])
def test_vector_size_refuses_an_empty_example(shape):
    with pytest.raises(ValueError, match="one or more positive sizes"):
        vector_size("mlp", shape)


def test_image_shape_takes_the_least_side():
    assert image_shape("m", (1, 4, 9), min_side=4) == (1, 4, 9)


@pytest.mark.parametrize("shape", [(), (64,), (8, 8), (2, 1, 8, 8), (0, 8, 8), (1, 3, 8), (1, 8, 3)])
def test_image_shape_refuses_what_is_no_image_or_too_small(shape):
    with pytest.raises(ValueError, match="at least 4"):
        image_shape("m", shape, min_side=4)


def test_the_error_names_model_shape_bound_and_way_out():
    message = str(shape_error("tanh-cnn", (1, 2), "(C, H, W)", "'mlp'"))
    assert message == "model='tanh-cnn': input_shape=(1, 2) is not (C, H, W); use 'mlp'"
