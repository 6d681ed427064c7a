import contextlib

import pytest
from torch import nn

from fed_dpsat.step.modes import in_mode


class Frozen(nn.Sequential):
    """As torch's users freeze a part: ``train`` leaves it in evaluation mode."""

    def train(self, mode=True):
        super().train(mode)
        self[0].eval()
        return self


def modes(module):
    return [part.training for part in module.modules()]


@pytest.mark.parametrize("training", [True, False])
def test_parts_are_afterwards_in_the_mode_they_were_in(training):
    module = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()))
    module[1].eval()
    before = modes(module)
    with in_mode(module, training=training):
        assert modes(module) == [training] * 4
    assert modes(module) == before
    with contextlib.suppress(KeyError), in_mode(module, training=training):
        raise KeyError
    assert modes(module) == before


def test_a_part_that_its_owner_froze_stays_so():
    module = Frozen(nn.Dropout(), nn.Dropout()).eval()
    with in_mode(module, training=True):
        assert modes(module) == [True, False, True]


def test_what_is_no_module_has_no_mode():
    with in_mode(None, training=True):
        pass
