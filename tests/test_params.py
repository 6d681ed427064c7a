import torch
from torch import nn

from fed_dpsat.params import flatten, global_norm, map_tree, subtract, trainable, unflatten, zeros_like


def test_trainable_keeps_the_order_and_leaves_out_what_is_frozen():
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    module[0].weight.requires_grad_(False)
    assert list(trainable(module)) == ["0.bias", "1.weight", "1.bias"]


def test_trainable_copies_without_a_graph():
    module = nn.Linear(2, 1)
    before = module.weight.detach().clone()
    copy = trainable(module)["weight"]
    copy.add_(1)
    assert not copy.requires_grad
    assert torch.equal(module.weight, before)


def test_a_weight_used_twice_is_one_parameter():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[1].weight = module[0].weight
    assert list(trainable(module)) == ["0.weight", "0.bias", "1.bias"]


def test_zeros_keep_shapes_and_types(same_bits):
    params = {"a": torch.ones(2, 3), "b": torch.ones((), dtype=torch.float64)}
    zeros = {"a": torch.zeros(2, 3), "b": torch.zeros((), dtype=torch.float64)}
    assert same_bits(zeros_like(params), zeros)


def test_subtract_by_name_not_by_order(same_bits):
    a = {"x": torch.tensor([5.0]), "y": torch.tensor([7.0])}
    b = {"y": torch.tensor([1.0]), "x": torch.tensor([2.0])}
    assert same_bits(subtract(a, b), {"x": torch.tensor([3.0]), "y": torch.tensor([6.0])})
    assert a["x"] == 5


def test_global_norm_is_over_all_tensors_together():
    assert global_norm({"a": torch.tensor([[3.0]]), "b": torch.tensor([0.0, 4.0])}) == 5


def test_global_norm_of_nothing_is_zero():
    assert global_norm({}) == 0
    assert global_norm({"a": torch.zeros(3)}) == 0


def test_a_tree_goes_flat_and_comes_back():
    """Slashes and tildes in names, and trees without tensors, are kept; so is the order."""
    tree = {"a": torch.ones(2), "b/c": {"~1": torch.zeros(()), "none": {}}, "b": {"c": {"d": torch.ones(1)}}}
    flat = flatten(tree)
    assert list(flat) == ["a", "b~1c/~01", "b~1c/none/", "b/c/d"]
    back = unflatten(flat)
    assert list(back) == list(tree)
    assert back["b/c"].keys() == {"~1", "none"}
    assert back["b/c"]["none"] == {}
    assert back["b"]["c"]["d"] is tree["b"]["c"]["d"]
    assert unflatten(flatten({})) == {}


def test_a_function_of_the_tensors_in_one_place():
    one, two = ({"a": torch.tensor(x), "b": {"c": torch.tensor(x + 1), "d": {}}} for x in (1, 10))
    found = map_tree(torch.add, one, two)
    assert found == {"a": 11, "b": {"c": 13, "d": {}}}
