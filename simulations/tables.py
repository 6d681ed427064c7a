"""Three real tables as CSV files, with their columns declared: ``python -m simulations.tables FOLDER``.

========== ====================================================================== ======================================
folder     rows                                                                   label
========== ====================================================================== ======================================
visits     20,190 persons and years of the RAND health insurance experiment       visits to a doctor in the year
           (statsmodels, ``randhie``); ``plan`` is the insurance plan of a family
tumours    569 tumours of the breast, 30 measurements each (scikit-learn)         malignant or benign
diabetes   442 patients, 10 measurements each (scikit-learn)                      progress of the disease in a year
========== ====================================================================== ======================================

A fifth of the rows, by the digest of the row, is the test split. Constants of the columns are those of the published
tables, rounded: for your own data, declare what is known without looking at them.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import pandas as pd
from sklearn import datasets

TEST_SHARE = 0.2
PLANS = {0.0: "free", 3.258097: "25", 3.931826: "50", 4.564348: "95", 4.615120: "deductible"}
"""By ``log(coinsurance rate + 1)``, the name of the plan."""


def main() -> None:
    """Write the three tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for name, (table, label) in {"visits": visits(), "tumours": tumours(), "diabetes": diabetes()}.items():
        write(folder / name, table, label)


def visits() -> tuple[pd.DataFrame, str]:
    """Persons and years, with the plan of the family."""
    from statsmodels.datasets import randhie

    table = randhie.load_pandas().data
    known = pd.Series(PLANS.keys(), index=PLANS.values())
    table["plan"] = [(known - value).abs().idxmin() for value in table.pop("lncoins")]
    return table, "mdvis"


def tumours() -> tuple[pd.DataFrame, str]:
    """Tumours, with their kind."""
    found = datasets.load_breast_cancer(as_frame=True)
    table = found.frame.rename(columns=lambda name: name.replace(" ", "_"))
    table["kind"] = [found.target_names[k] for k in table.pop("target")]
    return table, "kind"


def diabetes() -> tuple[pd.DataFrame, str]:
    """Patients, with the progress of their disease."""
    return datasets.load_diabetes(as_frame=True).frame.rename(columns={"target": "progress"}), "progress"


def write(folder: Path, table: pd.DataFrame, label: str) -> None:
    """``train.csv``, ``test.csv`` and ``columns.toml`` in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    draws = [int(hashlib.sha256(repr(row).encode()).hexdigest()[-6:], 16) / 16**6 for row in table.values.tolist()]
    is_test = pd.Series(draws, index=table.index) < TEST_SHARE
    table[~is_test].to_csv(folder / "train.csv", index=False)
    table[is_test].to_csv(folder / "test.csv", index=False)
    numbers = [name for name in table.columns if pd.api.types.is_numeric_dtype(table[name])]
    lines = [f"{name} = {{ mean = {table[name].mean():.2g}, std = {table[name].std():.2g} }}" for name in numbers]
    (folder / "columns.toml").write_text("\n".join(lines) + "\n")
    print(f"{folder}: {int((~is_test).sum()):,} + {int(is_test.sum()):,} rows, {len(numbers)} numbers, label {label}")


if __name__ == "__main__":
    main()
