"""The task that a configuration names, for a data set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fed_dpsat import plugins
from fed_dpsat.client.given import copied
from fed_dpsat.data.dataset import Dataset
from fed_dpsat.errors import SettingError
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.step.optimizers.base import links
from fed_dpsat.tasks.base import CLASS, Task
from fed_dpsat.tasks.metric import Metric


def build_task(config: RunConfig, dataset: Dataset, settings: Mapping[str, Any], given: Task | None = None) -> Task:
    """A copy of ``given``, or the task ``config.task`` of ``dataset``, with ``config.metric`` first among its metrics.

    Raises ``PluginError`` for a name that leads to no task, ``DataError`` if the labels are not those of the task, and
    ``SettingError`` for a metric that the task does not have.
    """
    of_data = {
        "class_names": dataset.class_names,
        "num_labels": dataset.num_labels,
        "label_scale": dataset.label_scale,
        **dataset.of_texts,
    }
    task: Task = given or plugins.build("task", config.task, {**settings, **of_data}, config.task_args)
    task = copied("task", plugins.required("task", config.task, task))
    task.check(dataset)
    task.metrics = _with_first(task.metrics, config.metric)
    return task


def check_optimizer(task: Task, optimizer: object, name: str) -> None:
    """Raise ``SettingError`` for an optimizer ``of_classes`` in a task whose examples have no class each."""
    if task.labels == CLASS:
        return
    for link in links(optimizer):
        if getattr(link, "of_classes", False):
            raise SettingError(
                "optimizer",
                name,
                f"possible with task={task.name!r}: {type(link).__name__} compares shares of classes",
                "choose another optimizer",
            )


def _with_first(metrics: tuple[Metric, ...], name: str) -> tuple[Metric, ...]:
    named = {metric.name: metric for metric in metrics}
    if name and name not in named:
        raise SettingError("metric", name, f"one of {', '.join(named)}", "choose one of those of the task")
    return (named.pop(name), *named.values()) if name else metrics
