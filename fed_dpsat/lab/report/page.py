"""One run as one self-contained HTML page, and its figures as files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fed_dpsat.client.evaluation import measured_on
from fed_dpsat.errors import InputError
from fed_dpsat.lab.report import canvas, model_figures, palette, training_figures, words
from fed_dpsat.lab.report.canvas import Drawing
from fed_dpsat.lab.report.sharpness import sharpness_words
from fed_dpsat.lab.report.spending import Spending, read_spending
from fed_dpsat.run.metric import CLASSIFICATION, metric_named
from fed_dpsat.run.numbers import duration, in_unit, plain, wilson, with_noise
from fed_dpsat.run.reading import load_run
from fed_dpsat.run.result import Run
from fed_dpsat.tasks.metric import Metric

if TYPE_CHECKING:
    from markupsafe import Markup

SECTIONS = ("Quality", "Spending and noise", "The model", "The clients", "The machine")


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Write the page to ``out`` (default: ``report.html`` in ``folder``) and its figures beside it; returns ``out``.

    Raises ``InputError`` for a folder without a run, a damaged run, or a missing package.
    """
    canvas.matplotlib()
    run, out = load_run(folder), out or folder / "report.html"
    spending = read_spending(run)
    figures = out.parent / "figures" if out.name == "report.html" else out.parent / f"{out.stem}-figures"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        sections = {name: list(_drawings(run, spending, name, figures)) for name in SECTIONS}
        drawn = {drawing.name for drawings in sections.values() for drawing in drawings}
        out.write_text(
            render(
                "report.html.j2",
                run=run,
                title=f"{run.name}: {run.method} on {run.config.dataset}",
                cards=cards(run),
                state=words.state_of(run),
                statement=words.statement(run),
                sections={name: drawings for name, drawings in sections.items() if drawings},
                sharpness=sharpness_words(run.sharpness) if run.sharpness else "",
                not_shown=words.not_shown(run, drawn),
                changed=words.changed_settings(run.config),
                settings=words.all_settings(run.config),
                versions=_versions(run),
            )
        )
    except OSError as error:
        raise InputError(f"{out} cannot be written ({error.strerror}); name another path with --out") from None
    return out


def render(template: str, **values: Any) -> str:
    """A filled template of this package; values are escaped, so a name in a run folder cannot become markup."""
    try:
        import jinja2
    except ImportError:
        raise InputError("reports need matplotlib and Jinja2; pip install 'fed-dpsat[figures]'") from None
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fed_dpsat.lab.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["slug"] = lambda text: re.sub(r"[^a-z0-9]+", "-", str(text).lower()).strip("-")
    environment.filters["code"] = _with_code
    return environment.get_template(template).render(colours=palette.css(), **values)


def _with_code(text: str) -> Markup:
    """``text``, escaped, with its parts between backticks as code."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))


def _drawings(run: Run, spending: Spending | None, section: str, folder: Path) -> Iterator[Drawing]:
    if section == SECTIONS[0]:
        yield from training_figures.quality_curves(run, folder)
        return
    if section == SECTIONS[1]:
        made = [
            training_figures.spending_curves(run, spending, folder) if spending else None,
            training_figures.signal_and_noise(run, folder),
            model_figures.clip_norms(run, folder),
        ]
    elif section == SECTIONS[2]:
        made = [model_figures.reliability_diagram(run, folder), model_figures.class_accuracy(run, folder)]
    elif section == SECTIONS[3]:
        made = [model_figures.client_accuracy(run, folder), *model_figures.partition(run, folder)]
    else:
        made = list(training_figures.time_and_bytes(run, folder))
    yield from (drawing for drawing in made if drawing is not None)


def cards(run: Run) -> list[tuple[str, str, str]]:
    """``(label, number, its basis)`` of the numbers at the head of the page."""
    metric, score = run.metric, run.score
    quality: Mapping[str, Any] = run.quality or {}
    calibration = [
        ("calibration error", plain(quality.get("ece")), f"ECE; MCE {plain(quality.get('mce'))}"),
        ("Brier score", plain(quality.get("brier")), f"NLL {plain(quality.get('nll'))} nats"),
    ]
    others = [(metric_named(name, run.task), value) for name, value in run.others.items()]
    seconds = sum(line["seconds"] for line in run.timing)
    delta = f"at delta = {run.config.delta:g}, {run.config.accountant.upper()}" if run.config.private else "no noise"
    return [
        (
            f"{run.config.evaluated_on} {metric.label}",
            with_noise(in_unit(score, metric, run.num_draws), metric, run.summary),
            _basis(run),
        ),
        ("epsilon", plain(run.epsilon), delta),
        *(calibration if run.task == CLASSIFICATION else []),
        *(
            (f"{run.config.evaluated_on} {other.label}", in_unit(value, other), _direction(other))
            for other, value in others
        ),
        ("clients", f"{run.config.num_clients:,}", f"{run.config.cohort_size:,} a round, {run.config.partition}"),
        ("time", duration(seconds) if seconds else "unknown", f"{run.rounds[-1]['round'] if run.rounds else 0} rounds"),
    ]


def _basis(run: Run) -> str:
    """The examples of the main metric, with its direction, or its interval if it is a share of them."""
    score, n = run.score, run.num_test
    if not n or score is None:
        return ", ".join(filter(None, (measured_on(run.config), _direction(run.metric))))
    examples = f"{n:,} {'validation' if run.config.validation_share else 'public test'} examples"
    if run.num_draws and isinstance(score, float):
        low, high = wilson(score, n)
        return f"{examples}, 95 % interval {100 * low:.1f} to {100 * high:.1f}"
    return ", ".join(filter(None, (examples, _direction(run.metric))))


def _direction(metric: Metric) -> str:
    return "" if metric.higher_is_better else "lower is better"


def _versions(run: Run) -> list[tuple[str, str]]:
    environment = run.environment
    rows = [("command", " ".join(environment.get("command", []))), ("seed", str(run.config.seed))]
    rows += [(key, str(environment[key])) for key in ("python", "platform", "cpus") if key in environment]
    rows += [(name, str(number)) for name, number in environment.get("packages", {}).items()]
    if head := run.summary.get("ledger_head"):
        rows.append(("ledger", f"{head['charges']} charges, head {head['sha256']}"))
    return rows
