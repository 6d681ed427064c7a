"""Jobs, each in one process on one thread: in this process one after the other, or on Ray workers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, TypeVar

from fed_dpsat.errors import SettingError
from fed_dpsat.step.threads import intra_op_threads

Job = TypeVar("Job")
Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class Done(Generic[Job, Value]):
    """The result of a job: its value, or the reason of its failure in ``error``."""

    job: Job
    value: Value | None
    error: str = ""


class Jobs:
    """Runs jobs on ``workers`` Ray workers from ``open_jobs``; 0 means this process."""

    def __init__(self, workers: int, gpus_per_worker: float = 0.0) -> None:
        self._workers, self._gpus_per_worker = workers, gpus_per_worker

    def run(self, work: Callable[[Job], Value], jobs: Iterable[Job]) -> Iterator[Done[Job, Value]]:
        """Yield the result of each job when it ends; jobs start in order. An exception or a dead worker is an error.

        The workers must be able to import the module of ``work``.
        """
        if not self._workers:
            for job in jobs:
                value, error = _attempt(work, job)
                yield Done(job=job, value=value, error=error)
            return
        import ray  # takes seconds to import
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
    """Jobs on ``workers`` Ray workers, of the cluster at ``address`` or of a new one, which ends after the block.

    Each worker takes ``gpus_per_worker`` of a GPU. Raises ``SettingError`` for fewer than 0 workers, ``RunError`` for
    an address without a cluster.
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
    """Value and error as text: another process may be unable to unpickle an exception."""
    with intra_op_threads(1):
        try:
            return work(job), ""
        except Exception as error:  # the other jobs continue
            return None, f"{type(error).__name__}: {error}"
