"""MLflow's own client finds the run, and the same one after a resume."""

from __future__ import annotations

import json

import pytest

from fed_dpsat.simulation import resume

mlflow = pytest.importorskip("mlflow")
pytest.importorskip("sqlalchemy")


@pytest.mark.slow
def test_a_run_is_there_and_goes_on_under_its_id(run, tmp_path, monkeypatch):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.chdir(tmp_path)
    folder = run("mlflow")
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("fed-dpsat").experiment_id
    (found,) = client.search_runs([experiment])
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    history = client.get_metric_history(found.info.run_id, "epsilon")
    assert [(m.step, m.value) for m in history] == [(line["round"], line["epsilon"]) for line in rounds]
    assert found.info.status == "FINISHED"
    assert found.data.params["num_rounds"] == "3"
    assert "data_path" not in found.data.params
    (folder / "summary.json").unlink()
    resume(folder, overrides={"workers": 0})
    (again,) = client.search_runs([experiment])
    assert again.info.run_id == found.info.run_id
