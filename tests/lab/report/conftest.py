"""One run for all tests of reports; it is not to be changed, but copied."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil

import pytest

from fed_dpsat.run.metric import metric_named
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.simulation import simulate


@pytest.fixture(scope="package")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "run"
    simulate(RunConfig(num_clients=4, num_rounds=3, target_epsilon=3.0, delta=1e-4, lr=8.0), folder)
    return folder


@pytest.fixture
def made_up(run_folder, tmp_path):
    """Writes the folder of a run of another task, with a value of each metric in each round (the last one is kept)."""

    def make(name, task, metric, values, losses=(4.0, 2.0, 1.5, 1.0), seed=0, lr=8.0, **others):
        folder = shutil.copytree(run_folder, tmp_path / name)
        config = (folder / "config.toml").read_text()
        for key, value in {"seed": seed, "lr": lr}.items():
            config = re.sub(rf"^{key} = .*$", f"{key} = {value}", config, flags=re.MULTILINE)
        (folder / "config.toml").write_text(config)
        measured = {metric: values, "loss": losses, **others}
        lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
        for i, line in enumerate(lines):
            del line["test_accuracy"]
            line |= {f"test_{key}": of[i] for key, of in measured.items()}
        (folder / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        summary = json.loads((folder / "summary.json").read_text())
        del summary["test_accuracy"]
        stated = {"task": task, "metric": dataclasses.asdict(metric_named(metric, task))}
        last = {f"test_{key}": of[-1] for key, of in measured.items()}
        (folder / "summary.json").write_text(json.dumps({**summary, **stated, **last}))
        quality = {
            "round": 3, "measured_on": "public test split of made-up numbers", "class_names": [],
            "metrics": {key: of[-1] for key, of in measured.items() if key != "loss"},
        }  # fmt: skip
        (folder / "quality.json").write_text(json.dumps(quality))
        sizes = json.loads((folder / "simulation.json").read_text())["sizes"]
        (folder / "simulation.json").write_text(json.dumps({"sizes": sizes, "label_counts": None}))
        return folder

    return make
