from __future__ import annotations

import shutil

import pytest

from fed_dpsat.errors import InputError
from fed_dpsat.lab.report.spending import read_spending
from fed_dpsat.run.reading import load_run


@pytest.fixture
def copy(run_folder, tmp_path):
    shutil.copytree(run_folder, tmp_path / "copy")
    return tmp_path / "copy"


def test_spending_ends_at_the_epsilon_of_the_run(run_folder):
    run = load_run(run_folder)
    spent = read_spending(run)
    assert spent.epsilon.shape == (4, 4)
    assert (spent.epsilon[0] == 0).all()
    assert spent.epsilon.max() == pytest.approx(run.epsilon)
    assert spent.epsilon[:, 0].tolist() == pytest.approx([line["epsilon"] for line in run.rounds])
    assert spent.budgets.tolist() == [3.0] * 4


def test_without_a_ledger_there_is_no_spending(copy):
    (copy / "ledger.sqlite").unlink()
    assert read_spending(load_run(copy)) is None


def test_a_damaged_ledger_is_bad_input(copy):
    (copy / "ledger.sqlite").write_bytes(b"no ledger")
    with pytest.raises(InputError, match="ledger"):
        read_spending(load_run(copy))
