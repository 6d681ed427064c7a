"""``fed-dpsat device``: init, status, and what it says of a ledger that is not whole."""

from __future__ import annotations

import json
import sqlite3

import pytest
from typer.testing import CliRunner

from fed_dpsat.accounting import epsilon
from fed_dpsat.cli import app
from fed_dpsat.device.log import LARGEST_BYTES, device_log, last_line, one_line
from fed_dpsat.device.release import ledger_path


def call(*arguments):
    result = CliRunner().invoke(app, ["device", *map(str, arguments)])
    return result.exit_code, result.output


def test_a_device_that_was_never_asked(device):
    code, text = call("status", device.policy_path)
    assert code == 0
    assert "0.0000 of 8 at delta 0.0001" in text
    assert "never" in text


def test_what_was_spent_is_left_over_and_told(device, assignment):
    for round in (1, 2):
        device.ask(assignment(round=round))
    device.ask(assignment(round=3, noise_multiplier=0.1))
    code, text = call("status", device.policy_path, "--json")
    told = json.loads(text)
    assert code == 0
    assert told["epsilon_spent"] == pytest.approx(epsilon([assignment().event] * 2, 1e-4))
    assert told["epsilon_left"] == pytest.approx(8 - told["epsilon_spent"])
    assert (told["rounds"], told["rounds_by_run"], told["charges"]) == (2, {"7": 2}, 2)
    assert told["integrity"] == "unbroken"
    assert told["policy"]["least_noise_multiplier"] == 1.0
    assert "refused: noise_multiplier=0.1" in told["last_contact"]
    code, text = call("status", device.policy_path)
    assert "unbroken, 2 charges" in text
    assert "rounds by run               7: 2" in text


def test_a_ledger_that_was_edited_is_told(device, assignment):
    device.ask()
    file = sqlite3.connect(ledger_path(device.folder))
    file.execute("DROP TRIGGER charges_update")
    file.execute("UPDATE charges SET noise_multiplier = 100.0")
    file.commit()
    file.close()
    code, text = call("status", device.policy_path)
    assert code == 1
    assert "changed" in text or "edited" in text
    assert "its own log has the reason" in device.ask(assignment(round=2)).error.reason  # and it answers no more


def test_an_older_copy_of_the_ledger_is_told_and_answers_no_more(device, assignment):
    device.ask()
    older = ledger_path(device.folder).read_bytes()
    device.ask(assignment(round=2))
    newer = ledger_path(device.folder).read_bytes()
    ledger_path(device.folder).write_bytes(older)
    code, text = call("status", device.policy_path)
    assert code == 1
    assert "does not hold the charge of reply 2" in text
    assert "its own log has the reason" in device.ask(assignment(round=3)).error.reason
    ledger_path(device.folder).write_bytes(newer)
    assert call("status", device.policy_path)[0] == 0
    assert not device.ask(assignment(round=3)).has_error()


def test_status_while_a_writer_holds_the_ledger(device):
    from fed_dpsat.accounting import PrivacyLedger

    device.ask()
    with PrivacyLedger(ledger_path(device.folder)):
        assert call("status", device.policy_path)[0] == 0
        assert "its own log has the reason" in device.ask(run=8).error.reason


def test_init_counts_the_examples_and_begins_once(device):
    device.write(folder='"another"')
    code, text = call("init", device.policy_path)
    assert code == 0
    assert "device 2: 20 examples, ledger created" in text
    assert "largest_delta" not in text
    device.write(folder='"third"', largest_delta=0.05)
    assert "largest_delta: delta=0.05 is not below 1/20" in call("init", device.policy_path)[1]
    code, text = call("init", device.policy_path)
    assert code == 2
    assert "run init once" in text


def test_init_and_status_of_a_table(device):
    (device.path / "own.csv").write_text("age,outcome\n40,ill\n50,well\n60,well\n")
    (device.path / "columns.toml").write_text("age = {mean = 50, std = 10}\n")
    device.write(
        folder='"another"', content='"table"', data_source='"csv"', data_path='"own.csv"', label_column='"outcome"',
        columns_file='"columns.toml"', class_names='["well", "ill"]', tasks='["classification", "multilabel"]',
        adapters='["lora"]', dataset_args='"label_separator = \'+\'"',
    )  # fmt: skip
    assert "device 2: 3 examples, ledger created" in call("init", device.policy_path)[1]
    code, text = call("status", device.policy_path)
    assert code == 0
    assert "2, table for pixels" in text
    assert "tasks                       classification, multilabel" in text
    assert "adapters                    lora" in text
    told = json.loads(call("status", device.policy_path, "--json")[1])["policy"]
    assert (told["columns_file"], told["tokenizer"]) == (str(device.path / "columns.toml"), "bytes")


def test_errors_are_one_line(device):
    assert call("status", device.path / "none.toml")[0] == 2
    ledger_path(device.folder).unlink()
    code, text = call("status", device.policy_path)
    assert code == 1
    assert text.startswith("error: no ledger at")
    assert (
        "new device with `fed-dpsat device init POLICY`; if this device has answered a server before, restore" in text
    )
    code, text = call("run", device.policy_path)
    assert code == 2
    assert "set server, root_certificates and private_key" in text


def test_the_log_cannot_be_forged_nor_fill_a_disk(device):
    log = device_log(device.folder)
    assert one_line("a\n2026 INFO forged\x1b[2J" + "x" * 10_000).count("\n") == 0
    assert len(one_line("x" * 10_000)) < 500
    for _ in range(12_000):
        log.info("x" * 300)
    assert sum(path.stat().st_size for path in device.folder.glob("device.log*")) <= 2 * LARGEST_BYTES
    log.info("the last line")
    assert last_line(device.folder).endswith("the last line")
