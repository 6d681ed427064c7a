import pytest
import torch

from fed_dpsat.models.linear import linear


def test_logits_are_the_product_with_the_flattened_example():
    model = linear((1, 2, 2), 2)
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 1.0]]))
        model[1].bias.copy_(torch.tensor([0.5, 0.0]))
    image = torch.tensor([[[[1.0, 1.0], [1.0, 2.0]]]])
    assert model(image).tolist() == [[1 + 2 + 3 + 8 + 0.5, 2.0]]


def test_an_empty_shape_is_refused():
    with pytest.raises(ValueError, match=r"model='linear': input_shape=\(\) is not .*use one example's"):
        linear((), 10)
