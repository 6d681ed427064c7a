"""What several test files use; they are imported one by one and cannot import each other."""

import random
import resource
import secrets
from contextlib import contextmanager
from fnmatch import fnmatchcase

import numpy as np
import pytest
import torch
from hypothesis import settings
from scipy import stats

torch.set_num_threads(1)
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


LONGEST = ("tests/simulation/", "tests/test_", "tests/testing/", "tests/step/gradients/")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Members of a family that ``by_default`` does not name are slow; a pattern that no case has is an error.

    The longest files come first, so that several processes end at the same time.
    """
    unmet = {}
    for item in items:
        for mark in item.iter_markers("by_default"):
            case, family = item.callspec.id, item.nodeid.partition("[")[0]
            found = {pattern for pattern in mark.args if fnmatchcase(case, pattern)}
            unmet[family] = unmet.get(family, set(mark.args)) - found
            if not found:
                item.add_marker(pytest.mark.slow)
    wrong = {family: patterns for family, patterns in unmet.items() if patterns}
    if wrong and not any("::" in argument for argument in config.args):
        raise pytest.UsageError(f"by_default names cases that are not there: {wrong}")
    items.sort(key=lambda item: next((i for i, name in enumerate(LONGEST) if name in item.nodeid), len(LONGEST)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With ``-n 2`` a process gets one file at a time, and one process gets all of ``tests/simulation``: a Ray cluster.

    ``--dist loadgroup`` would need marks, and pytest-xdist 3.8 does not see them with pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return LONGEST[0] if LONGEST[0] in file else file

    config.option.loadscopereorder = False  # the order is that of the collection
    return ByFile(config, log)


@pytest.fixture(autouse=True)
def own_randomness():
    """Each test begins with the same generators, whatever ran before it in its process."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


@pytest.fixture
def full_disk():
    """A context in which no file gets larger than so many bytes: what a full disk does, for every user alike."""

    @contextmanager
    def full(size):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return full


@pytest.fixture
def same_bits():
    """Whether two dicts of tensors agree in names, shapes, types and every bit (-0.0 is not 0.0)."""

    def check(a, b):
        return a.keys() == b.keys() and all(
            p.shape == b[name].shape and p.dtype == b[name].dtype and p.numpy().tobytes() == b[name].numpy().tobytes()
            for name, p in a.items()
        )

    return check


@pytest.fixture
def repeatable(monkeypatch):
    """The operating system's entropy, the same in every run: what a test says of its noise holds always or never."""
    monkeypatch.setattr(secrets, "randbits", random.Random(0).getrandbits)


@pytest.fixture
def looks_gaussian():
    """Whether ``draws`` may be independent N(0, std^2): mean, variance (chi-square) and shape, each p > 1e-4."""

    def check(draws, std):
        z = np.concatenate([np.asarray(d, dtype=np.float64).ravel() for d in draws]) / std
        squares = np.square(z).sum()
        assert z.size >= 20_000, "too few draws to tell 0.9 sigma from sigma"
        p_mean = 2 * stats.norm.sf(abs(z.sum()) / z.size**0.5)
        p_variance = 2 * min(stats.chi2.cdf(squares, z.size), stats.chi2.sf(squares, z.size))
        return min(p_mean, p_variance, stats.kstest(z, "norm").pvalue) > 1e-4

    return check


@pytest.fixture
def input_gradient():
    """A loss whose gradient for an example is the example: ``sum(params * x)``, parameters laid end to end."""

    def loss(params, inputs, targets):
        flat = torch.cat([p.flatten() for p in params.values()])
        return inputs @ flat

    return loss


@pytest.fixture
def untried(monkeypatch):
    """Runs without the trial on made-up examples, which finds what only some data or many steps show here."""
    monkeypatch.setattr("fed_dpsat.simulation.try_federation", lambda *_, **__: None)
