"""``fed-dpsat``: its commands, from run to compare, each a few lines over the module that does its work."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table
from typer.core import TyperCommand, TyperGroup

from fed_dpsat.device import command as device_cli
from fed_dpsat.errors import InputError, RunError, SettingError
from fed_dpsat.lab import settings_view
from fed_dpsat.lab.starter import KINDS, start
from fed_dpsat.plugins import PACKAGES, listed
from fed_dpsat.run.process import first_imports
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.settings.flat import SPECS, parse_overrides
from fed_dpsat.settings.presets import preset as preset_file
from fed_dpsat.settings.presets import presets

if TYPE_CHECKING:
    from fed_dpsat.step.correlated.compare import PartialSums
    from fed_dpsat.testing.configuration import Checked


class _Commands(TyperGroup):
    """Commands whose import errors, such as a Flower without some internal, are one line too."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except InputError as error:
            _fail(error, BAD_INPUT)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(device_cli.app, name="device")
out_console, err_console = Console(), Console(stderr=True)


LISTS = {
    **{f"{kind}s": kind for kind in PACKAGES if kind not in ("clipping", "features", "strategy")},
    **{"clipping": "clipping", "features": "features", "strategies": "strategy", "presets": "preset"},
}
"""The kinds of plug-ins, and presets, as ``fed-dpsat list`` takes them."""


def _complete(names: Collection[str]) -> Callable[[str], list[str]]:
    """Completes what a user has begun to type to those of ``names`` that fit."""

    def completions(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return completions


def _presets_like(incomplete: str) -> list[str]:
    return _complete(presets())(incomplete)


def _print_version(value: bool) -> None:
    if value:
        out_console.print(f"fed-dpsat {version('fed-dpsat')}", highlight=False)
        raise typer.Exit


BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130

ConfigFile = Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help="TOML file; without one, the defaults.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override one setting.",
        autocompletion=_complete([f"{name}=" for name in SPECS]),
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    """Private federated learning with client-side DP-SAT."""


class _WithSettings(TyperCommand):
    """A command whose help ends with the settings that most runs set."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        out_console.print(*settings_view.few(), sep="\n")


def _print_all_settings(ctx: typer.Context, value: bool) -> None:
    if value:
        TyperCommand.format_help(ctx.command, ctx, ctx.make_formatter())  # type: ignore[arg-type]
        out_console.print(*settings_view.by_group(), sep="\n")
        raise typer.Exit


@app.command(cls=_WithSettings)
def run(
    config: ConfigFile = None,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; new or empty. Default: runs/NAME-TIME.")] = None,
    preset: Annotated[
        str, typer.Option(help="Settings that ship with the project, in place of CONFIG.", autocompletion=_presets_like)
    ] = "",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier run in it, and its ledger; not after system noise.")
    ] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Write trace.json: the times of all clients.")] = False,
    as_json: AsJson = False,
    help_all: Annotated[
        bool,
        typer.Option("--help-all", is_eager=True, callback=_print_all_settings, help="Show all settings, by groups."),
    ] = False,
) -> None:
    """Train the federation that CONFIG describes.

    A setting is a key in CONFIG, a TOML file, or --set KEY=VALUE, which wins over it.
    """
    with first_imports():
        from fed_dpsat.lab.watch import watched
        from fed_dpsat.run.folder import fresh
        from fed_dpsat.simulation import simulate

    with _clear_errors():
        if preset and config:
            raise SettingError("--preset", preset, f"possible with {config}", "give one of the two")
        config = preset_file(preset) if preset else config
        extra = [*([f"out={out}"] if out else ()), *(["profile=true"] if profile else ())]
        settings = RunConfig.load(config, [*(overrides or ()), *extra])
    name = config.stem if config else "run"
    folder = Path(settings.out) if settings.out else fresh(name)
    with (
        _clear_errors(run=folder),
        _errors_of_flower(),
        watched(settings, name=name, folder=folder, console=err_console, quiet=as_json) as show,
    ):
        result = simulate(settings, folder, on_round=show, progress=False, overwrite=overwrite)
    _print_result(result, folder, as_json)


@app.command()
def resume(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Continue a run that was interrupted or killed; it ends with the bits and the account of an uninterrupted run.

    --set takes settings that may change: workers, ray_address, reply_timeout and others of the machine, and a larger
    num_rounds, which extends a run, also a complete one, unless its noise or its rates were made for its end.
    """
    with first_imports():
        from fed_dpsat import simulation
        from fed_dpsat.lab.watch import watched
        from fed_dpsat.run.folder import RunFolder

    with _clear_errors(run=run), _errors_of_flower():
        folder, changes = RunFolder(run, resume=True), parse_overrides(overrides or ())
        settings = RunConfig.from_mapping({**folder.config().settings(), **changes})
        earlier = folder.rounds()
        with watched(settings, name=run.name, folder=run, console=err_console, quiet=as_json, earlier=earlier) as show:
            result = simulation.resume(run, overrides=changes, on_round=show, progress=False)
    _print_result(result, run, as_json)


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="New or empty folder.")],
    kind: Annotated[
        str, typer.Option(help=f"One of {', '.join(KINDS)}.", autocompletion=_complete(KINDS))
    ] = "simulation",
    as_json: AsJson = False,
) -> None:
    """Write a small working project with its test: settings, a plug-in or a policy, and a README with the commands."""
    with _clear_errors():
        names = start(folder, kind)
    if as_json:
        return _print_json({"kind": kind, "files": [str(folder / name) for name in names]})
    out_console.print(f"{KINDS[kind]}, in {folder}: {', '.join(names)}", soft_wrap=True, highlight=False)
    _, commands = (folder / "README.md").read_text().split("\n\n", 1)
    out_console.print(f"\ncd {folder}\n\n{commands}", soft_wrap=True, highlight=False, markup=False, end="")
    return None


@app.command()
def check(config: ConfigFile = None, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check all objects that CONFIG names, and try them on made-up examples; exit code 2 for a fault.

    The suites of fed_dpsat.testing run on data set, partition, model, clipping rule, optimizer and strategy.
    """
    from fed_dpsat.testing.configuration import check_configuration

    found: list[Checked] = []
    with _clear_errors(), _errors_of_flower():
        for checked in check_configuration(RunConfig.load(config, overrides or ())):
            found.append(checked)
            if not as_json:
                out_console.print(_check_line(checked), markup=False, highlight=False, soft_wrap=True)
    fine = not any(checked.problem for checked in found)
    if as_json:
        _print_json({"fine": fine, "parts": [dataclasses.asdict(checked) for checked in found]})
    if not fine:
        raise typer.Exit(BAD_INPUT)


def _check_line(checked: Checked) -> str:
    of_part = "" if checked.part == "trial" else f", {checked.checks} checks"
    said = f"NOT FINE: {checked.problem}" if checked.problem else f"fine{of_part}"
    return f"{checked.part:10} {checked.name}: {said}" + (f" ({checked.note})" if checked.note else "")


@app.command()
def data(
    config: ConfigFile = None,
    overrides: Overrides = None,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also draw the clients' examples: .png, .svg or .pdf.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the data set of CONFIG and its division among clients, before any training and without a model."""
    from fed_dpsat.client.evaluation import measured_on
    from fed_dpsat.data.describe import describe
    from fed_dpsat.data.federated import Federated
    from fed_dpsat.lab import data_view

    with _clear_errors():
        settings = data_view.settings_of(config, overrides or ())
        found = Federated.build(settings)
        described = describe(found.dataset, found.whole, settings.partition, settings.partition_by)
        if picture is not None:
            data_view.draw_partition(described, picture)
    if as_json:
        return _print_json(dataclasses.asdict(described))
    for part in data_view.view(described, measured_on(settings), out_console.width):
        out_console.print(part, highlight=False, markup=False)
    if picture is not None:
        out_console.print(str(picture), soft_wrap=True, highlight=False)
    return None


@app.command()
def stats(
    config: ConfigFile = None,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Folder; new, empty or of the same statistics.")] = None,
    as_json: AsJson = False,
) -> None:
    """Release noised statistics of the clients' data, which a run takes as declared constants (statistics_from).

    statistics_epsilon pays for all of them together. The same command again shows the same numbers, at no cost.
    """
    from fed_dpsat.statistics.make import make_statistics
    from fed_dpsat.statistics.show import print_statistics

    with first_imports(), _clear_errors(again="the same command continues"):
        made = make_statistics(RunConfig.load(config, overrides or ()), out)
    if as_json:
        return _print_json({"folder": str(made.path), **made.content})
    print_statistics(out_console, made)
    return None


@app.command(name="list")
def list_plugins(
    kind: Annotated[
        str | None,
        typer.Argument(metavar="[KIND]", help=f"One of {', '.join(LISTS)}.", autocompletion=_complete(LISTS)),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Built-in optimizers, models, data sets, partitions, features, clipping rules, strategies and others; presets."""
    with _clear_errors():
        if kind is not None and kind not in {*LISTS, *LISTS.values()}:
            near = get_close_matches(kind, LISTS, n=1)
            remedy = f"did you mean {near[0]}?" if near else "without one all are listed"
            raise SettingError("KIND", kind, f"one of {', '.join(LISTS)}", remedy)
        kinds = [*PACKAGES, "preset"] if kind is None else [LISTS.get(kind, kind)]
        with first_imports():
            found = {of_kind: presets() if of_kind == "preset" else listed(of_kind) for of_kind in kinds}
    if as_json:
        return _print_json(found)
    for of_kind, plugins in found.items():
        table = Table(title=of_kind, title_justify="left", show_header=False, box=None, padding=(0, 2))
        table.add_column(no_wrap=True, style="cyan")
        for name, line in plugins.items():
            table.add_row(name, line)
        out_console.print(table, "")
    return None


@app.command()
def calibrate(config: ConfigFile = None, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """The noise multiplier for a schedule, and epsilon against rounds."""
    from fed_dpsat.accounting import epsilon_table
    from fed_dpsat.accounting.before import history_beside
    from fed_dpsat.accounting.event import UNITS
    from fed_dpsat.accounting.plans import make_plans
    from fed_dpsat.client.half import with_half
    from fed_dpsat.run.promise import threat_model
    from fed_dpsat.step.correlated.compare import partial_sums

    with _clear_errors():
        settings = with_half(RunConfig.load(config, overrides or ()))
        if not settings.private:
            raise SettingError("private", False, "true", "a run without noise has no noise multiplier to find")
        events = sorted({plan.event for plan in make_plans(settings)}, key=lambda event: event.noise_multiplier)
        paid = history_beside(settings)
        most = settings.rounds_per_client
        rounds = sorted({max(1, round(most * share)) for share in (0.1, 0.25, 0.5, 0.75, 1.0)})
        schedules: list[dict[str, Any]] = [
            {
                "noise_distribution": settings.noise_distribution,
                "noise_multiplier": event.noise_multiplier,
                "sample_rate": event.sample_rate,
                "local_steps": event.steps,
                "delta": settings.delta,
                "delta_is_for": _who_delta_is_for(settings),
                "privacy_unit": UNITS[settings.privacy_unit],
                "table": epsilon_table(
                    event.noise_multiplier, event.sample_rate, event.steps, rounds, settings.delta, event.kind, paid
                ),
            }
            for event in events
        ]
        if settings.noise_mechanism != "independent":
            for schedule in schedules:
                schedule["partial_sums"] = partial_sums(settings, schedule["noise_multiplier"])
    if as_json:
        for schedule in schedules:
            schedule["table"] = [dataclasses.asdict(row) for row in schedule["table"]]
            if "partial_sums" in schedule:
                schedule["partial_sums"] = dataclasses.asdict(schedule["partial_sums"])
        return _print_json({**schedules[0], "schedules": schedules} if len(schedules) > 1 else schedules[0])
    for schedule in schedules:
        table = Table(
            "rounds",
            "epsilon (PLD)",
            "epsilon (RDP)",
            title=f"{_laplace(settings.noise_distribution)}noise_multiplier = {schedule['noise_multiplier']:.4f} at "
            f"{_schedule(settings, schedule)}, delta {schedule['delta']:g}",
            caption=f"Protects {schedule['privacy_unit']}.\nAgainst {threat_model(settings)}.\n"
            f"{'Includes all statistics and evaluations.' + chr(10) if paid else ''}"
            f"The {schedule['delta_is_for']}.",
        )
        for row in schedule["table"]:
            table.add_row(str(row.rounds), f"{row.epsilon_pld:.3f}", _or_none(row.epsilon_rdp, 3))
        out_console.print(table)
        if "partial_sums" in schedule:
            out_console.print(_partial_sums(schedule["partial_sums"]), highlight=False)
    return None


def _partial_sums(found: PartialSums) -> Table:
    table = Table(
        *("noise", "of one round", "of partial sums, mean", "largest"),
        title="Deviation of the noise on sums of clipped changes, in clip norms, at the same epsilon",
        caption=f"It holds while {found.keeps}.",
    )
    alone, mean, largest = found.independent_noise_multiplier, found.independent_mean, found.independent_largest
    table.add_row("independent", f"{alone:.4g}", f"{mean:.4g}", f"{largest:.4g}")
    shares = f"{found.mean:.4g} ({found.mean / mean:.2f})", f"{found.largest:.4g} ({found.largest / largest:.2f})"
    table.add_row(found.noise_mechanism, f"{found.step_deviation:.4g}", *shares)
    return table


def _laplace(noise_distribution: str) -> str:
    """The word before a noise multiplier that is not of Gaussian noise."""
    return "Laplace " if noise_distribution == "laplace" else ""


def _or_none(epsilon: float | None, digits: int) -> str:
    """Epsilon as text; "none" if the accountant has no bound."""
    return "none" if epsilon is None else f"{epsilon:.{digits}f}"


def _who_delta_is_for(settings: RunConfig) -> str:
    """A judgement of delta from the settings, without a look at data."""
    from fed_dpsat.accounting import large_delta

    if settings.privacy_unit == "client":
        fine = f"delta={settings.delta:g} is below 1/{settings.num_clients}, one of the clients"
        return large_delta(settings.delta, "client", settings.num_clients) or fine
    most = math.ceil(1 / settings.delta) - 1
    of = "persons" if settings.privacy_unit == "user" else "examples"
    return f"delta={settings.delta:g} is small enough for clients with at most {most:,} {of}, better far fewer"


def _schedule(settings: RunConfig, schedule: dict[str, Any]) -> str:
    if settings.privacy_unit == "client":
        once = ", charged once" if settings.noise_mechanism != "independent" and settings.amplifying_rate == 1 else ""
        return f"client rate {schedule['sample_rate']:g}, one release a round{once}"
    return f"sample rate {schedule['sample_rate']:g}, {schedule['local_steps']} local steps"


@app.command()
def plan(
    config: ConfigFile = None,
    overrides: Overrides = None,
    timed: Annotated[bool, typer.Option("--timed", help="Also time every strategy that fits a layer.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show how the planned engine computes the per-example gradients of each layer, and the size of a message."""
    from fed_dpsat.client.build import Experiment
    from fed_dpsat.step.gradients.plan import plan_table, plan_text

    with _clear_errors():
        settings = RunConfig.load(config, overrides or ())
        experiment = Experiment.build(settings)
        rows, reason = plan_table(
            experiment.loss_fn.module,
            experiment.made_up_inputs(settings.physical_batch_size),
            kernels=settings.kernels,
            timed=timed,
        )
        shared = experiment.shared(settings.num_rounds).values()
        sizes = {
            "parameters": sum(p.numel() for p in experiment.loss_fn.module.parameters()),
            "sent_parameters": sum(p.numel() for p in shared),
            "sent_bytes": sum(p.nbytes for p in shared),
        }
    if as_json:
        layers = [dataclasses.asdict(row) for row in rows]
        return _print_json({"layers": layers, "one_by_one_because": reason, **sizes})
    out_console.print(plan_text(rows, reason), markup=False, highlight=False, soft_wrap=True)
    out_console.print(
        f"A client receives {sizes['sent_parameters']:,} of {sizes['parameters']:,} parameters in a round, "
        f"{sizes['sent_bytes']:,} bytes in float32; update_codec says in which form they return.",
        highlight=False,
        soft_wrap=True,
    )
    return None


@app.command()
def ledger(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    delta: Annotated[float | None, typer.Option(help="Default: that of the run.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the epsilon of each client, its noise, and the rest of its budget; verifies the file first."""
    from fed_dpsat.run.folder import RunFolder
    from fed_dpsat.run.promise import public_extractor, threat_model
    from fed_dpsat.run.statement import read_statement

    with _clear_errors():
        statement = read_statement(run, delta)
    if as_json:
        return _print_json(statement.as_dict())
    out_console.print(f"Epsilon at delta {statement.delta:g}; protects {statement.unit}", highlight=False)
    settings = RunFolder(run, resume=True).config()
    out_console.print(f"Against {threat_model(settings)}", highlight=False)
    if settings.features:
        out_console.print(f"Declared public: {public_extractor(settings)}", highlight=False, soft_wrap=True)
    table = Table(
        "client",
        "rounds",
        "steps",
        f"{_laplace(statement.noise_distribution)}noise",
        "PLD",
        "RDP",
        "budget",
        "left",
        "state",
        box=None,
        pad_edge=False,
    )
    for row in statement.clients:
        table.add_row(
            str(row.client),
            str(row.rounds),
            str(row.steps),
            ", ".join(f"{noise:.4g}" for noise in row.noise_multipliers),
            f"{row.epsilon:.4f}",
            _or_none(row.epsilon_rdp, 4),
            "none" if math.isinf(row.budget) else f"{row.budget:g}",
            "" if math.isinf(row.budget) else f"{row.budget - row.epsilon:.4f}",
            row.state,
        )
    out_console.print(table)
    if statement.delta_warning:
        out_console.print(f"Warning: {statement.delta_warning}.", highlight=False)
    out_console.print(
        f"Federation: epsilon {statement.epsilon:.4f} (PLD), {_or_none(statement.epsilon_rdp, 4)} (RDP) at delta "
        f"{statement.delta:g}, the maximum over clients.\nIntegrity: {statement.charges} charges, chain unbroken, "
        f"head {statement.sha256[:16]}.",
        highlight=False,
    )
    return None


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="TOML file with a base, a [grid] and perhaps [tune].")],
    out: Annotated[Path | None, typer.Option(help="Folder; continues a sweep in it. Default: runs/FILE.")] = None,
    workers: Annotated[int, typer.Option(help="Runs at a time, each on a Ray worker; 0 is this process.")] = 0,
    budget: Annotated[
        float | None,
        typer.Option(metavar="MINUTES", help="Leave out seeds and rounds until the sweep fits, and list them."),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="AXIS=LABEL,LABEL", help="A part of the grid; in a folder of its own.")
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Run a grid of methods, settings and seeds; tune on validation examples first; one table of all.

    docs/sweeps.md describes FILE. --set overrides a setting of its base.
    """
    from fed_dpsat.lab.sweep import run_sweep
    from fed_dpsat.lab.sweep.show import print_sweep, shown

    folder = out or Path("runs") / file.stem
    clear = _clear_errors(again="the same command continues the sweep")
    with clear, _errors_of_flower(), shown(err_console, quiet=as_json) as show:
        swept = run_sweep(
            file, folder, workers=workers, budget=budget, overrides=overrides or (), only=only or (), show=show
        )
    if as_json:
        failed = [{"run": outcome.run.name, "error": outcome.error} for outcome in swept.failed]
        more = {"failed": failed, "left_out": swept.left_out, "privacy": swept.privacy}
        metric = dataclasses.asdict(swept.metric)
        _print_json({"folder": str(folder), "metric": metric, "summary": swept.summary, **more})
    else:
        print_sweep(out_console, swept, folder)
    if swept.failed:
        raise typer.Exit(FAILED)


@app.command()
def audit(
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG|RUN]", help="TOML file or run folder.")] = None,
    overrides: Overrides = None,
    canaries: Annotated[int, typer.Option(help="Canaries of the one run, each in by a fair coin.")] = 500,
    mislabelled: Annotated[
        bool, typer.Option("--mislabelled", help="Also canaries for an observer of models only.")
    ] = False,
    game: Annotated[bool, typer.Option("--game", help="The distinguishing game alone, without a run.")] = False,
    repetitions: Annotated[int, typer.Option(help="Repetitions of the game in each world.")] = 2000,
    mia: Annotated[int, typer.Option("--mia", help="Also a membership-inference curve from so many models.")] = 0,
    figure: Annotated[Path | None, typer.Option(help="File of the curve: .png, .svg or .pdf.")] = None,
    confidence: Annotated[float, typer.Option(help="Of each lower bound.")] = 0.95,
    as_json: AsJson = False,
) -> None:
    """A lower bound on epsilon, by attack: canaries in one run and a game on the mechanism. CONFIG is run again.

    The bound stands beside the ledger's epsilon. Seeds are those of the configuration.
    """
    from fed_dpsat.lab.audit.command import config_of, run_audit

    with _clear_errors(), _errors_of_flower():
        settings = config_of(config, overrides or ())
        report, words = run_audit(
            settings,
            attacks=() if game else ("gradient", *(("mislabelled",) if mislabelled else ())),
            canaries=canaries,
            repetitions=repetitions,
            models=mia,
            figure=figure,
            confidence=confidence,
        )
    if as_json:
        return _print_json(report)
    for paragraph in words:
        out_console.print(paragraph, "", highlight=False, markup=False)
    return None


@app.command()
def sharpness(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    examples: Annotated[int, typer.Option(help="The first so many of the public test split; 0 is all.")] = 0,
    rho: Annotated[float, typer.Option(help="Radius within which the loss may rise.")] = 0.05,
    m: Annotated[int, typer.Option("--m", help="Examples of each rise: m-sharpness.")] = 128,
    top: Annotated[int, typer.Option(help="Eigenvalues of the Hessian, from the largest.")] = 1,
    probes: Annotated[int, typer.Option(help="Random vectors for the trace.")] = 32,
    landscape: Annotated[Path | None, typer.Option(help="Figure of the loss around the model.")] = None,
    points: Annotated[int, typer.Option(help="Points of the figure along each axis.")] = 21,
    as_json: AsJson = False,
) -> None:
    """Measure the sharpness of the minimum of a run on public test data; also written to RUN/sharpness.json."""
    from fed_dpsat.lab.report.sharpness import measure_run, sharpness_words

    with _clear_errors():
        found = measure_run(
            run, examples=examples, rho=rho, m=m, top=top, probes=probes, landscape=landscape, points=points
        )
    if as_json:
        return _print_json(found)
    out_console.print(sharpness_words(found), highlight=False, markup=False)
    return None


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="New or empty folder.")],
    merge: Annotated[bool, typer.Option("--merge", help="Add an adapter to the weights that it changes.")] = False,
    averaged: Annotated[bool, typer.Option("--averaged", help="The average of a run with averaging.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write the model of a run as files of transformers or peft; any other model as model.safetensors."""
    from fed_dpsat.run.export import export_run

    with _clear_errors():
        files = [str(folder / name) for name in export_run(run, folder, merge=merge, averaged=averaged)]
    if as_json:
        return _print_json({"files": files})
    for file in files:
        out_console.print(file, soft_wrap=True, highlight=False)
    return None


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    out: Annotated[Path | None, typer.Option(help="Page to write, for one run. Default: report.html in it.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write one page per run, with figures as SVG and PNG: the cost of privacy and the metric of the task."""
    from fed_dpsat.lab.report.page import write_report

    with _clear_errors():
        if out is not None and len(runs) > 1:
            raise SettingError(
                "--out", str(out), f"possible with {len(runs)} runs", "each has its own page; leave it out"
            )
        pages = [write_report(run, out) for run in runs]
    if as_json:
        return _print_json({"pages": [str(page) for page in pages]})
    for page in pages:
        out_console.print(str(page), soft_wrap=True, highlight=False)
    return None


@app.command()
def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders, folders of them, .jsonl files of runs.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="compare.html: page, figures and CSV; x.csv: the table; x.jsonl: the runs, condensed."),
    ] = None,
    metric: Annotated[
        str, typer.Option(help="Another metric of the task, such as macro_f1. Default: the main one of the runs.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Compare groups of runs: means and intervals over seeds, and the front of metric and epsilon."""
    from fed_dpsat.lab.report import comparing, comparing_page

    with _clear_errors():
        if out is None:
            found = comparing.compare(comparing_page.runs_of(runs, metric))
        else:
            found = comparing_page.write_comparison(runs, out, metric)
    if as_json:
        return _print_json(comparing_page.as_data(found))
    shown = comparing_page.as_table(found)
    table = Table(box=None, pad_edge=False, caption=shown.note)
    for i, name in enumerate(shown.head):
        table.add_column(name, overflow="fold", no_wrap=i > 0)
    for row in shown.rows:
        table.add_row(*row)
    out_console.print(table)
    for note in found.notes:
        out_console.print(f"note: {note}", soft_wrap=True, highlight=False, markup=False)
    if out is not None:
        out_console.print(str(out), soft_wrap=True, highlight=False)
    return None


def _print_result(result: Mapping[str, Any], folder: Path, as_json: bool) -> None:
    from fed_dpsat.lab.watch.result import result_table

    if as_json:
        _print_json(result)
    else:
        out_console.print(result_table(result))
        out_console.print(f"Run folder: {folder}", soft_wrap=True)


@contextmanager
def _clear_errors(run: Path | None = None, again: str = "") -> Iterator[None]:
    """Show an error that a user can mend as one line and an exit code, without a traceback.

    A failure after the start of the ``run`` in that folder says how to continue it; ``again`` says it without a run.
    """
    handler = RichHandler(console=err_console, show_time=False, show_path=False, show_level=False)
    logging.basicConfig(format="%(message)s", level=logging.WARNING, handlers=[handler])
    try:
        yield
    except InputError as error:
        _fail(error, BAD_INPUT)
    except RunError as error:
        _fail(f"{error}{_then(run, again)}", FAILED)
    except OSError as error:
        if error.filename is None:
            raise
        _fail(f"{error.filename}: {error.strerror}{_then(run, again)}", FAILED)
    except KeyboardInterrupt:
        _fail(f"interrupted{_then(run, again)}", INTERRUPTED)
    except Exception:
        if then := _then(run, again):
            err_console.print(f"failed{then}", markup=False, highlight=False, soft_wrap=True)
        raise


def _errors_of_flower() -> AbstractContextManager[None]:
    """Of Flower's lines, show errors alone."""
    from fed_dpsat.flower.wire.compat import at_level

    return at_level(logging.ERROR)


def _then(run: Path | None, again: str) -> str:
    if run is None:
        return f"; {again}" if again else ""
    from fed_dpsat.run.folder import how_to_continue

    try:
        return f"; {how_to_continue(run)}"
    except (InputError, RunError, OSError, ValueError):  # the error that ended the run is the one to show
        return f"; the run folder is {run}"


def _fail(error: object, code: int) -> None:
    err_console.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(code)


def _print_json(value: Any) -> None:
    from fed_dpsat.run.folder import jsonable

    out_console.print(json.dumps(jsonable(value), indent=2), soft_wrap=True, highlight=False, markup=False)


if __name__ == "__main__":
    app()
