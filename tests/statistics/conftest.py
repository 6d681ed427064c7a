"""A small table of two hospitals in a folder of the test."""

import numpy as np
import pytest

from fed_dpsat.settings.config import RunConfig


@pytest.fixture
def patients(tmp_path):
    """``patients(**settings)``: a configuration of 400 rows with age, income (often missing) and outcome."""
    folder, generator = tmp_path / "patients", np.random.default_rng(0)
    folder.mkdir()
    for split, count in (("train", 400), ("test", 4)):
        ages, incomes = generator.normal(50, 15, count).clip(0, 110), generator.lognormal(10, 0.5, count)
        lines = [
            f"{('south', 'north')[i % 2]},{age:.0f},{'' if i % 5 == 4 else round(income)},{'ill' if i % 4 else 'well'}"
            for i, (age, income) in enumerate(zip(ages, incomes, strict=True))
        ]
        (folder / f"{split}.csv").write_text("\n".join(["hospital,age,income,outcome", *lines, ""]))
    columns = tmp_path / "columns.toml"
    columns.write_text("age = {low = 0, high = 110}\nincome = {log = true, low = 0, high = 200000, missing = 0}\n")

    def config(**settings):
        given = {
            **{"dataset": "table", "data_source": "csv", "data_path": str(folder), "columns_file": str(columns)},
            **{"label_column": "outcome", "class_names": "well, ill", "cache_dir": str(tmp_path / "cache")},
            **{"user_column": "hospital", "partition": "natural", "partition_by": "hospital", "num_clients": 2},
            **{"num_rounds": 2, "target_epsilon": 20.0, "statistics": "moments, quantiles, labels"},
            **{"statistics_epsilon": 3.0, "lr": 0.1},
        }
        return RunConfig(**{**given, **settings})

    return config
