import pytest
import torch

from fed_dpsat.step.threads import intra_op_threads


def test_threads_inside_and_outside():
    before = torch.get_num_threads()
    with intra_op_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        with intra_op_threads(1):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_threads_come_back_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="training failed"), intra_op_threads(before + 1):
        raise RuntimeError("training failed")
    assert torch.get_num_threads() == before
