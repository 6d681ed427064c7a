"""A comparison as a page, as rows for a terminal or a CSV file, and as plain data."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fed_dpsat.errors import InputError
from fed_dpsat.lab.report import canvas
from fed_dpsat.lab.report.by_metric import by_metric
from fed_dpsat.lab.report.canvas import Table
from fed_dpsat.lab.report.comparing import PROMISE_WORDS, Comparison, Group, compare
from fed_dpsat.lab.report.comparing_figures import drawings, mean_text, score_text
from fed_dpsat.lab.report.condensed import read_runs, write_runs
from fed_dpsat.lab.report.page import render
from fed_dpsat.run.metric import CLASSIFICATION, loss_unit
from fed_dpsat.run.numbers import Estimate, plain, rounded, with_unit
from fed_dpsat.run.result import Run
from fed_dpsat.tasks.metric import UNDEFINED

SUFFIXES = {".html", ".csv", ".jsonl"}


def runs_of(paths: Sequence[Path], metric: str = "") -> list[Run]:
    """The runs of ``paths``, by another ``metric`` if it has a name; the errors of ``read_runs`` and ``by_metric``."""
    runs = read_runs(paths)
    return by_metric(runs, metric) if metric else runs


def write_comparison(paths: Sequence[Path], out: Path, metric: str = "") -> Comparison:
    """Write a page and its table as CSV, a CSV file, or condensed runs, by the suffix of ``out``.

    Raises ``InputError`` for another suffix, and the errors of ``runs_of`` and ``compare``.
    """
    if out.suffix not in SUFFIXES:
        raise InputError(f"--out={str(out)!r} is not one of *.html, *.csv (the table), *.jsonl (the runs, condensed)")
    runs = runs_of(paths, metric)
    found = compare(runs)
    if out.suffix == ".jsonl":
        write_runs(runs, out)
        return found
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_suffix(".csv").write_text(as_csv(found))
        if out.suffix == ".html":
            out.write_text(as_html(found, out.parent / f"{out.stem}-figures"))
    except OSError as error:
        raise InputError(f"{out} cannot be written ({error.strerror}); name another path with --out") from None
    return found


def as_html(found: Comparison, figures: Path) -> str:
    """The page; its figures also go into the folder ``figures``."""
    canvas.matplotlib()
    return render(
        "compare.html.j2",
        title=f"{sum(len(g.runs) for g in found.groups)} runs in {len(found.groups)} groups",
        found=found,
        metric=found.metric,
        by=f"{'decreasing' if found.metric.higher_is_better else 'increasing'} {found.metric.label}",
        calibrated=_calibrated(found),
        table=as_table(found),
        drawings=list(drawings(found, figures)),
        promises=[g.promise for g in found.groups if math.isfinite(g.epsilon)][:1],
        common=[(k, v) for k, v in found.common.items() if v != ""],
    )


def as_table(found: Comparison) -> Table:
    """One row per group, with numbers rounded as their intervals support, and columns for differing promises.

    The note states what the numbers are, and delta if it is one.
    """
    parts = [name for name in PROMISE_WORDS if _differ(found, name)]
    delta = "" if "delta" in parts else "".join(f"; epsilon at delta {p.delta:g}" for p in list(found.promises)[:1])
    ece = ["ECE"] if _calibrated(found) else []
    loss = with_unit("loss", loss_unit(found.task))
    head = ["group", "n", found.metric.heading, "sd", loss, *ece, "epsilon", "front"]
    rows = [
        (
            group.label,
            str(len(group.runs)),
            score_text(group),
            _sd(group.score),
            mean_text(group.loss),
            *([mean_text(group.calibration)] if ece else []),
            plain(group.epsilon),
            "yes" if group.on_front else "",
            *(str(getattr(group.promise, name)) for name in parts),
        )
        for group in found.groups
    ]
    words = tuple(PROMISE_WORDS[name] for name in parts)
    return Table(head=(*head, *words), rows=tuple(rows), note=f"means over seeds with 95 % intervals{delta}")


def _calibrated(found: Comparison) -> bool:
    return found.task == CLASSIFICATION


def _differ(found: Comparison, part: str) -> bool:
    return len({getattr(promise, part) for promise in found.promises}) > 1


def as_csv(found: Comparison) -> str:
    """One row per group, without rounding."""
    text = io.StringIO()
    rows = [_flat(group, found) for group in found.groups]
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_data(found: Comparison) -> dict[str, Any]:
    """The comparison as plain data, for ``--json``."""
    return {
        "groups": [
            {
                "label": group.label,
                "settings": group.settings,
                "runs": [str(run.path) for run in group.runs],
                "seeds": group.seeds,
                found.metric.name: dataclasses.asdict(group.score) if group.score else UNDEFINED,
                "loss": dataclasses.asdict(group.loss) if group.loss else None,
                "ece": dataclasses.asdict(group.calibration) if group.calibration else None,
                "epsilon": group.epsilon,
                "on_front": group.on_front,
                **dataclasses.asdict(group.promise),
            }
            for group in found.groups
        ],
        "task": found.task,
        "metric": dataclasses.asdict(found.metric),
        "differing": found.differing,
        "comparable": len(found.promises) <= 1,
        "notes": found.notes,
    }


def _flat(group: Group, found: Comparison) -> dict[str, Any]:
    row: dict[str, Any] = {"group": group.label, **group.settings, "n": len(group.runs)}
    row["seeds"] = " ".join(map(str, group.seeds))
    shown = {found.metric.name: group.score, "loss": group.loss}
    for name, value in (shown | {"ece": group.calibration} if _calibrated(found) else shown).items():
        for part in ("mean", "sd", "low", "high"):
            row[f"{name}_{part}"] = getattr(value, part) if value else ""
    if group.score is None:
        row[f"{found.metric.name}_mean"] = UNDEFINED
    return {**row, "epsilon": group.epsilon, "on_front": group.on_front, **dataclasses.asdict(group.promise)}


def _sd(value: Estimate | None) -> str:
    return plain(None) if value is None or math.isnan(value.sd) else rounded(value.sd, value.sd)
