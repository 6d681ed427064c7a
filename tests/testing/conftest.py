"""What the tests of the suites share: a broken plug-in is caught by a named check, which says what to do."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fed_dpsat.testing import ConformanceError


@pytest.fixture
def caught() -> Callable[..., str]:
    """Run a suite on something broken; the name of the check that caught it."""

    def run(suite: Callable[..., list[str]], *args: object, **settings: object) -> str:
        with pytest.raises(ConformanceError) as found:
            suite(*args, **settings)
        error = found.value
        said = str(error)
        assert said.startswith(f"{suite.__name__}, {error.check}: expected {error.expected}; saw {error.seen}; ")
        assert said.endswith(error.remedy)
        assert all((error.expected, error.seen, error.remedy))
        return error.check

    return run
