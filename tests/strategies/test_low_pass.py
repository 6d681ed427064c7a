from __future__ import annotations

import numpy as np
import pytest

from fed_dpsat.errors import SettingError
from fed_dpsat.testing.federation import Federation, Model, as_model, start
from strategies.low_pass import low_pass


def moving(steps: list[float]):
    return lambda client, number, model: {**model, "w": model["w"] + np.float32(steps[number - 1])}


def test_the_step_is_the_average_of_steps_corrected_for_the_start():
    """beta 1/2, steps 1, 3: first 1, then (1/4 * 1 + 1/2 * 3) / (3/4) = 7/3."""
    federation = Federation(low_pass(beta=0.5), move=moving([1.0, 3.0]))
    before: Model = as_model(federation.model)
    first, second = federation.round(), federation.round()
    assert first["w"] - before["w"] == pytest.approx(1.0)
    assert second["w"] - first["w"] == pytest.approx(7 / 3)


def test_beta_zero_is_fedavg():
    federation = Federation(low_pass(beta=0.0), move=moving([1.0, -2.0]))
    assert federation.rounds(2)["w"] == pytest.approx(start()["w"] - 1.0)


def test_a_memory_without_end_is_refused():
    with pytest.raises(SettingError, match=r"beta=1.0 is not in \[0, 1\)"):
        low_pass(beta=1.0)
