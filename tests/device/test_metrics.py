"""The metrics and the JSON lines of a device: its budget and its requests, and nothing that is made of its examples."""

from __future__ import annotations

import json
from contextlib import closing
from urllib.request import urlopen

import pytest
import torch
from flwr.app import MessageType, RecordDict

from fed_dpsat.accounting import epsilon
from fed_dpsat.device import metrics
from fed_dpsat.device.node import free_port
from fed_dpsat.device.policy import Policy, PolicyError

EXPOSED = {
    "fed_dpsat_device_joined", "fed_dpsat_device_epsilon_spent", "fed_dpsat_device_epsilon_budget",
    "fed_dpsat_device_epsilon_left", "fed_dpsat_device_rounds_charged", "fed_dpsat_device_requests_total",
    "fed_dpsat_device_request_timestamp_seconds",
}  # fmt: skip
"""docs/operate.md lists them, and says why none is made of examples."""


@pytest.fixture
def scraped(device):
    """The metrics of the device by series, at each call."""
    pytest.importorskip("prometheus_client", reason="the extra 'operate' is not installed")
    port = free_port()
    device.write(metrics_port=port)
    served = metrics.serve(Policy.load(device.policy_path))

    def read():
        with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as reply:
            lines = reply.read().decode().splitlines()
        return {series: float(value) for series, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}

    with closing(served):
        yield read
    metrics._of_process.clear()


def of(request, outcome):
    return f'fed_dpsat_device_requests_total{{outcome="{outcome}",request="{request}"}}'


def test_budget_and_requests_are_those_of_ledger_and_messages(device, assignment, scraped):
    assert scraped()["fed_dpsat_device_epsilon_left"] == 8.0
    device.send(RecordDict(), MessageType.QUERY)
    device.ask()
    device.ask(assignment(round=2, noise_multiplier=0.1))
    device.ask(assignment(round=3), params={"1.weight": torch.zeros(2, 2)})
    found = scraped()
    spent = epsilon([assignment().event], 1e-4)
    assert found["fed_dpsat_device_epsilon_spent"] == pytest.approx(spent)
    assert found["fed_dpsat_device_epsilon_left"] == pytest.approx(8 - spent)
    assert found["fed_dpsat_device_rounds_charged"] == 1
    assert (found[of("identity", "answered")], found[of("round", "answered")], found[of("round", "refused")]) == (
        1,
        1,
        2,
    )
    (device.path / "data.py").write_text("def examples():\n    return None")
    device.ask(run=8)
    assert scraped()[of("round", "failed")] == 1


def test_nothing_else_is_exposed_and_other_examples_give_the_same_metrics(device, assignment, scraped):
    """The device has half as many examples, all of one class, and a value beyond all bounds, in its second run."""

    def of_run(run):
        before = scraped()
        device.send(RecordDict(), MessageType.QUERY, run=run)
        device.ask(assignment(round=1), run=run)
        after = scraped()
        assert {series.partition("{")[0] for series in after} == EXPOSED
        changes = {series: after[series] - before[series] for series in after if "epsilon" not in series}
        return {series: change for series, change in changes.items() if "timestamp" not in series}

    first = of_run(7)
    text = (device.path / "data.py").read_text().replace("20", "10").replace("labels.float()", "1e6 * labels.float()")
    (device.path / "data.py").write_text(text.replace("% 2", "* 0"))
    assert of_run(8) == first


def test_json_lines_have_fields_and_mark_those_that_may_hold_data(device, assignment):
    device.write(log_format='"json"')
    device.ask()
    device.ask(assignment(round=2, noise_multiplier=0.1))
    (device.path / "data.py").write_text("def examples():\n    raise ValueError('patient 7')")
    device.ask(run=8)
    answered, refused, failed = (json.loads(line) for line in device.log())
    assert {
        "run": "7",
        "request": "round",
        "outcome": "answered",
        "round": 1,
        "noise_multiplier": 2.0,
    }.items() <= answered.items()
    assert (refused["outcome"], refused["level"], refused["may_hold_data"]) == ("refused", "WARNING", False)
    assert "noise_multiplier=0.1 is not in" in refused["message"]
    assert (failed["outcome"], failed["may_hold_data"]) == ("failed", True)
    assert "patient 7" in failed["error"]
    assert not any("patient 7" in json.dumps(line) for line in (answered, refused))
    device.write(log_format='"text"')
    device.ask(assignment(round=4, noise_multiplier=0.1))
    assert "a round: refused: noise_multiplier=0.1" in device.log()[-1]


def test_a_policy_says_port_and_form_within_their_bounds(device):
    for changes in ({"metrics_port": 70000}, {"log_format": '"xml"'}):
        device.write(**changes)
        with pytest.raises(PolicyError, match=next(iter(changes))):
            Policy.load(device.policy_path)
