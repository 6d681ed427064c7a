"""Jobs end with a value or with words, here and on workers, and a dead worker does not take the others along."""

from __future__ import annotations

import os
import sys

import pytest
import torch

from fed_dpsat.errors import SettingError
from fed_dpsat.simulation.jobs import open_jobs


def half(number):
    if number % 2:
        raise SettingError("number", number, "even", "halve another")  # which no other process could unpickle
    return number // 2, torch.get_num_threads()


def half_or_die(number):
    if number < 0:
        os._exit(9)
    return half(number)


EXPECTED = {
    4: ((2, 1), ""),
    5: (None, "SettingError: number=5 is not even; halve another"),
    6: ((3, 1), ""),
}


def outcomes(jobs, work, numbers):
    return {done.job: (done.value, done.error) for done in jobs.run(work, numbers)}


def test_in_this_process_on_one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with open_jobs(0) as jobs:
        assert outcomes(jobs, half, [4, 5, 6]) == EXPECTED
        assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def test_on_workers_with_one_that_dies(ray_cluster):
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with open_jobs(2) as jobs:
        found = outcomes(jobs, half_or_die, [4, -1, 5, 6])
        assert found.pop(-1) == (None, "its worker died (WorkerCrashedError)")
        assert found == EXPECTED
        assert outcomes(jobs, half, []) == {}


def test_fewer_than_none_is_an_error():
    with pytest.raises(SettingError, match="workers=-1 is not at least 0"), open_jobs(-1):
        pass
