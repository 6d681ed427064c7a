"""``fed-dpsat device``: the commands init, run and status for the owner of a device."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fed_dpsat.errors import InputError, RunError

if TYPE_CHECKING:
    from fed_dpsat.device.policy import Policy
    from fed_dpsat.device.status import DeviceStatus

app = typer.Typer(no_args_is_help=True, help="A client on a device of its own, with a policy and a ledger.")

PolicyFile = Annotated[Path, typer.Argument(metavar="POLICY", help="TOML file; docs/deploy.md has an example.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

BAD_INPUT, FAILED = 2, 1


@app.command()
def init(policy: PolicyFile) -> None:
    """Check all of the policy, count the examples or persons and create the ledger; once per device."""
    from fed_dpsat.device.check import advice
    from fed_dpsat.device.policy import Policy

    try:
        read = Policy.load(policy)
        held = begin(read)
    except (InputError, RunError) as error:
        raise _failed(error) from None
    of = "persons" if read.privacy_unit == "user" else "examples"
    typer.echo(f"device {read.client}: {held} {of}, ledger created in {read.folder}")
    _warn(advice(read))


def begin(policy: Policy) -> int:
    """Check the policy and the data, and create the ledger; the number of examples, or of persons.

    Raises ``PolicyError`` with everything that is wrong, a line each, and ``SettingError`` for a ledger that is there.
    """
    from fed_dpsat.device.check import problems, problems_of_data
    from fed_dpsat.device.data import size
    from fed_dpsat.device.policy import PolicyError
    from fed_dpsat.device.release import prepare

    if found := [*problems(policy), *problems_of_data(policy)]:
        raise PolicyError("\nerror: ".join(found))
    prepare(Path(policy.folder))
    return size(policy)


@app.command()
def run(
    policy: PolicyFile,
    port: Annotated[int, typer.Option(help="Port on this machine between SuperNode and client; 0 finds one.")] = 0,
) -> None:
    """Connect to the server of the policy and serve its requests with the installed code, until stopped."""
    from fed_dpsat.device.node import run_device

    try:
        code = run_device(policy, port)
    except (InputError, RunError) as error:
        raise _failed(error) from None
    raise typer.Exit(code)


@app.command()
def status(policy: PolicyFile, as_json: AsJson = False) -> None:
    """Budget spent and left, rounds, last contact, the policy, the integrity of the ledger, and what is wrong."""
    from fed_dpsat.device.check import advice, problems, problems_of_data
    from fed_dpsat.device.policy import Policy
    from fed_dpsat.device.status import read_status

    try:
        read = Policy.load(policy)
        found = read_status(read)
    except (InputError, RunError) as error:
        raise _failed(error) from None
    of_data = problems_of_data(read)
    wrong, warnings = [*problems(read), *of_data], [] if of_data else advice(read)
    if as_json:
        told = {**dataclasses.asdict(found), "epsilon_left": found.epsilon_left, "policy": dataclasses.asdict(read)}
        typer.echo(json.dumps({**told, "problems": wrong, "warnings": warnings}, indent=2))
    else:
        typer.echo(status_text(read, found))
        for said in wrong:
            typer.echo(f"error: {said}", err=True)
        _warn(warnings)
    if found.integrity != "unbroken" or wrong:
        raise typer.Exit(FAILED)


def status_text(policy: Policy, found: DeviceStatus) -> str:
    """The lines of ``fed-dpsat device status``."""
    from fed_dpsat.device.policy import LISTS

    runs = ", ".join(f"{run}: {rounds}" for run, rounds in found.rounds_by_run.items()) or "none"
    lines = {
        "device": f"{found.client}, {policy.content} for {policy.dataset}",
        "server": policy.server or "none in the policy",
        "epsilon spent": f"{found.epsilon_spent:.4f} of {found.epsilon_budget:g} at delta {found.delta:g} (PLD)",
        "epsilon left": f"{found.epsilon_left:.4f}",
        "rounds charged": str(found.rounds),
        "rounds by run": runs,
        "last contact": found.last_contact or "never",
        "ledger": f"{found.integrity}, {found.charges} charges, head {found.sha256[:16]}",
    }
    bounds = {spec.name: getattr(policy, spec.name) for spec in dataclasses.fields(policy)}
    lines |= {name: str(value) for name, value in bounds.items() if name.startswith(("largest_", "least_"))}
    lines |= {name: ", ".join(bounds[name]) for name in LISTS}
    lines["release_counts"] = str(policy.release_counts).lower()
    return "\n".join(f"{name:28}{value}" for name, value in lines.items())


def _warn(warnings: list[str]) -> None:
    for warning in warnings:
        typer.echo(f"warning: {warning}", err=True)


def _failed(error: InputError | RunError) -> typer.Exit:
    typer.echo(f"error: {error}", err=True)
    return typer.Exit(BAD_INPUT if isinstance(error, InputError) else FAILED)
