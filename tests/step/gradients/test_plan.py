import pytest
import torch
from torch import nn

from fed_dpsat.models.cnn import tanh_cnn
from fed_dpsat.models.dpnasnet import dpnasnet_cifar
from fed_dpsat.models.resnet import resnet20_gn, wrn16_4_gn
from fed_dpsat.step.gradients import compiled, conv
from fed_dpsat.step.gradients.plan import plan_table, plan_text


@pytest.fixture(autouse=True)
def wide_vectors(monkeypatch):
    """Plans are by what a processor's vectors are; here they are those of AVX-512, wherever the tests run."""
    monkeypatch.setattr(conv, "NARROW_VECTORS", False)


def test_few_positions_are_products_and_many_are_side_by_side():
    rows, reason = plan_table(tanh_cnn((3, 32, 32), 10), torch.zeros(2, 3, 32, 32), kernels="torch")
    assert not reason
    assert [row.strategy for row in rows] == ["channels"] * 4 + ["product"] * 4
    assert [row.parameter for row in rows][:2] == ["0.weight", "2.weight"]
    assert rows[0].input_shape == (2, 3, 32, 32)
    assert "2x3x32x32 last" in plan_text(rows, "")


def test_narrow_vectors_make_rows_of_patches_but_for_few_positions(monkeypatch):
    monkeypatch.setattr(conv, "NARROW_VECTORS", True)
    rows, _ = plan_table(tanh_cnn((3, 32, 32), 10), torch.zeros(2, 3, 32, 32), kernels="torch")
    assert [row.strategy for row in rows] == ["rows"] * 5 + ["product"] * 3
    rows, _ = plan_table(resnet20_gn((3, 32, 32), 10), torch.zeros(2, 3, 32, 32), kernels="torch")
    found = {(row.input_shape[1], row.strategy) for row in rows if row.layer == "conv2d"}
    assert found == {(3, "rows"), (16, "channels"), (16, "rows"), (32, "channels"), (32, "rows"), (64, "rows")}


def test_the_plan_is_of_the_format_that_the_engine_uses():
    """Products for 64 channels at 8x8 in either; nothing of this network has its channels last."""
    rows, _ = plan_table(resnet20_gn((3, 32, 32), 10), torch.zeros(2, 3, 32, 32), kernels="torch")
    assert not any(row.channels_last for row in rows)
    assert {row.strategy for row in rows if row.layer == "conv2d" and row.input_shape[1] == 64} == {"product"}


def test_the_plan_does_not_depend_on_the_batch():
    module = dpnasnet_cifar((3, 32, 32), 10)
    plans = [
        [row.strategy for row in plan_table(module, torch.zeros(batch, 3, 32, 32), kernels="torch")[0]]
        for batch in (1, 3)
    ]
    assert plans[0] == plans[1]
    assert {"product", "channels", "rows"} <= set(plans[0])


def test_timing_tries_what_fits_and_changes_no_choice():
    module = tanh_cnn((3, 16, 16), 10)
    plain, timed = (
        plan_table(module, torch.zeros(2, 3, 16, 16), kernels="torch", timed=t, repeats=1)[0] for t in (False, True)
    )
    assert [row.strategy for row in plain] == [row.strategy for row in timed]
    ours = set() if compiled.refusal() else {"compiled"}
    assert set(timed[0].seconds) == {"product", "channels", "rows", "single"} | ours
    assert "channels" in plan_text(timed, "")


def test_a_function_of_parameters_says_of_which():
    rows, _ = plan_table(wrn16_4_gn((3, 8, 8), 10), torch.zeros(2, 3, 8, 8))
    assert rows[0].parameter == "0.bias"


@pytest.mark.parametrize("timed", [False, True])
def test_a_module_that_is_not_planned_says_why(timed):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return x * self.scale

    rows, reason = plan_table(Scaled(), torch.zeros(2, 3), timed=timed)
    assert "scale" in plan_text(rows, reason)


@pytest.mark.skipif(bool(compiled.refusal()), reason=f"no compiled kernels here: {compiled.refusal()}")
def test_kernels_of_our_own_but_for_few_positions_and_many_channels():
    rows, _ = plan_table(tanh_cnn((3, 32, 32), 10), torch.zeros(2, 3, 32, 32), kernels="compiled")
    assert [row.strategy for row in rows] == ["compiled"] * 4 + ["product"] * 4
    for make in (resnet20_gn, dpnasnet_cifar):
        rows, _ = plan_table(make((3, 32, 32), 10), torch.zeros(2, 3, 32, 32), kernels="compiled")
        images = [row for row in rows if row.layer != "linear"]
        assert all(row.channels_last and row.strategy in ("compiled", "product") for row in images)


class Texts(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(2, 4), nn.Linear(4, 3)

    def forward(self, words, mask):
        return (self.head(self.words(words)) * mask[..., None]).mean(1), mask


def test_texts_are_planned_with_their_mask():
    """Normal numbers, which were the made-up examples of any network, are no tokens."""
    rows, reason = plan_table(Texts(), {"words": torch.ones(2, 6).long(), "mask": torch.ones(2, 6)})
    assert (reason, [row.layer for row in rows]) == ("", ["embedding", "linear"])
