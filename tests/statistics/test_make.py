"""``make_statistics``: the charge before the numbers, kills, the joint epsilon with a run, and what is refused."""

import dataclasses
import json
import os
import signal
import subprocess
import sys

import pytest

from fed_dpsat.accounting import LedgerError, PrivacyLedger
from fed_dpsat.data.described.columns import Number, declared
from fed_dpsat.errors import RunError, SettingError
from fed_dpsat.simulation import simulate
from fed_dpsat.statistics import make
from fed_dpsat.statistics.make import make_statistics
from fed_dpsat.statistics.rows import Declared


def charges(path):
    with PrivacyLedger(path / "ledger.sqlite", readonly=True) as ledger:
        return ledger.head.charges


def numbers(made):
    return json.dumps(made.content["lines"])


def test_the_charge_is_on_disk_before_a_number_is_made(patients, tmp_path, monkeypatch):
    seen, noised = [], make.noised_totals

    def watch(*given):
        seen.append((charges(tmp_path / "s"), (tmp_path / "s" / "statistics.json").exists()))
        return noised(*given)

    monkeypatch.setattr(make, "noised_totals", watch)
    made = make_statistics(patients(), tmp_path / "s")
    assert seen == [(2, False)]
    assert made.content["epsilon"] == pytest.approx(3.0, rel=2e-3)
    assert [line["epsilon"] for line in made.content["lines"]] == [made.content["lines"][0]["epsilon"]] * 5


@pytest.mark.parametrize("source", ["seeded", "system"])
@pytest.mark.parametrize("place", ["charge_many", "noised_totals", "_write"])
def test_a_kill_neither_loses_nor_doubles_a_charge(patients, tmp_path, monkeypatch, place, source):
    path, config = tmp_path / "s", patients(noise_source=source)

    def killed(*given, **named):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if place == "_write":
            write = make._write
            patch.setattr(make, "_write", lambda p, text: (killed if p.name == "statistics.json" else write)(p, text))
        else:
            patch.setattr(PrivacyLedger if place == "charge_many" else make, place, killed)
        with pytest.raises(KeyboardInterrupt):
            make_statistics(config, path)
    assert charges(path) == (0 if place == "charge_many" else 2)
    made = make_statistics(config, path)
    assert charges(path) == 2
    assert numbers(make_statistics(config, path)) == numbers(made)
    if source == "seeded":
        assert numbers(make_statistics(config, tmp_path / "uninterrupted")) == numbers(made)


KILLED = """
import os, signal, sys
from pathlib import Path
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.statistics import make
write = make._write
def kill(path, text):
    if path.name == "statistics.json":
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, text)
make._write = kill
make.make_statistics(RunConfig.load(Path(sys.argv[1])), sys.argv[2])
"""


@pytest.mark.slow
def test_a_process_that_is_killed_after_its_charge_pays_once(patients, tmp_path):
    config, path = patients(noise_source="system"), tmp_path / "s"
    (tmp_path / "c.toml").write_text(config.to_toml())
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "c.toml", path], env={**os.environ}, check=False)
    assert done.returncode == -signal.SIGKILL
    assert charges(path) == 2
    assert not (path / "statistics.json").exists()
    make_statistics(config, path)
    assert charges(path) == 2


def test_the_same_command_again_releases_nothing(patients, tmp_path, monkeypatch):
    first = make_statistics(patients(noise_source="system"), tmp_path / "s")
    monkeypatch.setattr(make, "noised_totals", lambda *given: pytest.fail("noise was drawn again"))
    assert make_statistics(patients(noise_source="system"), tmp_path / "s").content == first.content


@pytest.mark.by_default("example")
@pytest.mark.parametrize("unit", ["example", "client"])
def test_a_run_pays_for_the_statistics_that_it_takes(patients, tmp_path, unit):
    from dp_accounting import GaussianDpEvent
    from dp_accounting.pld import PLDAccountant

    many = {"partition": "iid", "num_clients": 40, "lr": 0.1} if unit == "client" else {}
    config = patients(privacy_unit=unit, statistics="moments", **many)
    made = make_statistics(config, tmp_path / "s")
    taking = dataclasses.replace(config, statistics_from=str(tmp_path / "s"))
    run = simulate(taking, tmp_path / "run", progress=False)
    assert run["epsilon"] == pytest.approx(20.0, rel=2e-3)  # calibrated together
    assert run.rounds[0]["epsilon"] == pytest.approx(3.0, rel=2e-3)  # before training
    accountant = PLDAccountant()
    accountant.compose(GaussianDpEvent(made.content["noise_multiplier"]))
    with PrivacyLedger(tmp_path / "run" / "ledger.sqlite", readonly=True) as ledger:
        training = [event for event in ledger.history(0) if event.noise_multiplier != made.content["noise_multiplier"]]
        assert ledger.rounds_by_client()[0] == 2
    for event in training:
        accountant.compose(event.to_dp_event())
    assert run["epsilon"] == pytest.approx(accountant.get_epsilon(config.delta), rel=0.01)
    assert run["statistics_epsilon"] == pytest.approx(3.0, rel=2e-3)
    if unit == "example":
        age = declared(None, config.columns_file, str(tmp_path / "s"))["age"]
        assert isinstance(age, Number)
        assert (age.shift, age.scale) == (made.content["columns"]["age"]["mean"], made.content["columns"]["age"]["std"])


def test_a_resumed_run_keeps_the_charge_of_the_statistics_once(patients, tmp_path):
    make_statistics(patients(), tmp_path / "s")
    config = patients(statistics_from=str(tmp_path / "s"))

    def stop(record):
        if record["round"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(config, tmp_path / "run", progress=False, on_round=stop)
    run = simulate(dataclasses.replace(config, resume=True), tmp_path / "run", progress=False)
    assert charges(tmp_path / "run") == 2 + 2 * 2
    assert run["epsilon"] == pytest.approx(20.0, rel=2e-3)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"statistics_epsilon": 0.0}, "statistics_epsilon=0.0 is not above 0"),
        ({"statistics_columns": "height"}, "'height' is not"),
        ({"statistics_columns": "outcome"}, "'outcome' is not"),
        ({"statistics": "sizes"}, "something to pay for"),
        ({"statistics_epsilon": 0.001}, "enough for 5 lines: the noise of a count is"),
        ({"dataset": "digits"}, "dataset='digits'"),
        ({"statistics_from": "."}, "statistics_from"),
        ({"task": "regression", "label_column": "age", "statistics": "labels"}, "labels are no classes"),
    ],
)
def test_what_has_no_statistics_is_refused_before_a_charge(patients, tmp_path, settings, named):
    with pytest.raises(SettingError, match=named.replace("(", r"\(")):
        make_statistics(patients(**settings), tmp_path / "s")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("declaration", "named"),
    [("{}", "'age' has none"), ("{mean = 50, std = 10}", "'age' has none"), ("{low = 5, high = 1}", "high above low")],
)
def test_a_range_that_is_not_declared_is_refused(patients, tmp_path, declaration, named):
    (tmp_path / "columns.toml").write_text(f"age = {declaration}\n")
    with pytest.raises(SettingError, match=named):
        make_statistics(patients(statistics_columns="age"), tmp_path / "s")


@pytest.mark.parametrize(
    "settings",
    [{"statistics_epsilon": 25.0}, {"private": False}, {"statistics": "mean"}, {"statistics": "labels, labels"}],
)
def test_settings_that_exclude_each_other_are_refused(patients, settings):
    with pytest.raises(SettingError):
        patients(**settings)


def test_another_folder_and_a_changed_ledger_are_refused(patients, tmp_path):
    make_statistics(patients(), tmp_path / "s")
    with pytest.raises(SettingError, match="further releases"):
        make_statistics(patients(seed=1), tmp_path / "s")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("")
    with pytest.raises(SettingError, match="it has file"):
        make_statistics(patients(), tmp_path / "other")
    with pytest.raises(SettingError, match="seed=1 is not that of the statistics"):
        simulate(patients(seed=1, statistics_from=str(tmp_path / "s")), tmp_path / "run", progress=False)
    (tmp_path / "s" / "ledger.sqlite").unlink()
    with PrivacyLedger(tmp_path / "s" / "ledger.sqlite"):
        pass
    with pytest.raises(LedgerError, match="does not hold the 2 charges"):
        simulate(patients(statistics_from=str(tmp_path / "s")), tmp_path / "run", progress=False)
    (tmp_path / "s" / "statistics.json").write_text("{")
    with pytest.raises(RunError, match="cannot be read"):
        make_statistics(patients(), tmp_path / "s")


def test_numeric_labels_have_moments_and_their_constants_scale_the_loss(patients, tmp_path):
    config = patients(
        task="regression", label_column="age", input_columns="income", class_names="", statistics="moments"
    )
    made = make_statistics(config, tmp_path / "s")
    assert set(made.content["columns"]) == {"age", "income"}
    assert abs(made.content["columns"]["age"]["mean"] - 50) < 6


def test_constants_replace_the_range_and_keep_the_rest():
    column = Declared(name="x", low=0.0, high=1.0, log=True, spec={"low": 0, "high": 1, "log": True, "missing": 0})
    assert column.constants(0.5, 0.1) == {"mean": 0.5, "std": 0.1, "log": True, "missing": 0}
