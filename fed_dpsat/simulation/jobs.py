"""Whole jobs, each by one process on one thread: here, one after the other, or on Ray workers, one each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, TypeVar

from fed_dpsat.errors import SettingError
from fed_dpsat.run.process import intra_op_threads

Job = TypeVar("Job")
Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class Done(Generic[Job, Value]):
    """What came of a job: its value, or in ``error`` why there is none."""

    job: Job
    value: Value | None
    error: str = ""


class Jobs:
    """Runs jobs on ``workers`` Ray workers that ``open_jobs`` has found or started; 0 is this process."""

    def __init__(self, workers: int, gpus_per_worker: float = 0.0) -> None:
        self._workers, self._gpus_per_worker = workers, gpus_per_worker

    def run(self, work: Callable[[Job], Value], jobs: Iterable[Job]) -> Iterator[Done[Job, Value]]:
        """``work`` of each job, as they end; they begin in order. What it raises, or its process's death, is an error.

        Of ``work`` on workers, the module must be importable there.
        """
        if not self._workers:
            for job in jobs:
                value, error = _attempt(work, job)
                yield Done(job=job, value=value, error=error)
            return
        import ray  # seconds to import: only who has workers pays
        from ray.exceptions import RayError

        remote: Any = ray.remote(num_cpus=1, num_gpus=self._gpus_per_worker, max_retries=0)(_attempt)
        waiting, at_work = iter(jobs), dict[Any, Job]()
        while True:
            for job in islice(waiting, self._workers - len(at_work)):
                at_work[remote.remote(work, job)] = job
            if not at_work:
                return
            for reference in ray.wait(list(at_work))[0]:
                job = at_work.pop(reference)
                try:
                    value, error = ray.get(reference)
                except RayError as died:
                    value, error = None, f"its worker died ({type(died).__name__})"
                yield Done(job=job, value=value, error=error)


@contextmanager
def open_jobs(workers: int, address: str = "", gpus_per_worker: float = 0.0) -> Iterator[Jobs]:
    """On ``workers`` Ray workers, of the cluster at ``address`` or of one that is started and ended here.

    Each takes ``gpus_per_worker`` of a card.

    Raises ``SettingError`` for fewer than 0, ``RunError`` for an address where no Ray answers.
    """
    if workers < 0:
        raise SettingError("workers", workers, "at least 0", "0 runs one after the other in this process")
    if not workers:
        yield Jobs(0)
        return
    from fed_dpsat.simulation.cluster import connect

    leave = connect(address, workers)
    try:
        yield Jobs(workers, gpus_per_worker)
    finally:
        leave()


def _attempt(work: Callable[[Job], Value], job: Job) -> tuple[Value | None, str]:
    """Value and error: an exception that only its own process can unpickle would otherwise be lost on the way."""
    with intra_op_threads(1):
        try:
            return work(job), ""
        except Exception as error:  # of a job, whatever it is: the others go on
            return None, f"{type(error).__name__}: {error}"
