"""A device with twenty examples of two pixels, and messages as a server would send them."""

from __future__ import annotations

import dataclasses
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, MessageType, RecordDict

from fed_dpsat.accounting.event import PrivacyEvent
from fed_dpsat.client.assignment import Assignment
from fed_dpsat.device.policy import Policy
from fed_dpsat.device.release import prepare
from fed_dpsat.flower.client_app import app
from fed_dpsat.flower.grid import answer
from fed_dpsat.flower.wire import compat, records
from fed_dpsat.params import Params
from fed_dpsat.settings.config import RunConfig

POLICY = """
folder = "device"
client = 2
dataset = "pixels"
data_source = "function"
data_path = "{data}:examples"
class_names = ["dark", "light"]
largest_epsilon = 8.0
largest_delta = 1e-4
least_noise_multiplier = 1.0
largest_clip_norm = 1.0
largest_local_steps = 5
largest_sample_rate = 0.5
models = ["linear"]
"""
DATA = """
import torch
from fed_dpsat.data import Examples

def examples():
    labels = torch.arange(20) % 2
    return Examples(inputs=labels.float().view(20, 1, 1).repeat(1, 1, 2), labels=labels, mean=(0.0,), std=(1.0,))
"""
SETTINGS = RunConfig(
    dataset="pixels", noise_source="system", noise_multiplier=2.0, delta=1e-4, sample_rate=0.5, num_clients=3
).settings()
STATED = records.protocol_content()
ASSIGNMENT = Assignment(round=1, event=PrivacyEvent(noise_multiplier=2.0, sample_rate=0.5, steps=2))


def model() -> Params:
    return {"1.weight": torch.zeros(2, 2), "1.bias": torch.zeros(2)}


class Device:
    """A device in ``path``, and a server that asks it whatever it likes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.policy_path = path / "policy.toml"
        (path / "data.py").write_text(DATA)
        self.write()
        self.policy = Policy.load(self.policy_path)
        self.folder = Path(self.policy.folder)
        prepare(self.folder)

    def write(self, text: str = POLICY, **changes: object) -> None:
        lines = text.format(data=self.path / "data.py").splitlines()
        kept = [line for line in lines if line.partition(" ")[0] not in changes]
        self.policy_path.write_text("\n".join([*kept, *(f"{k} = {v}" for k, v in changes.items())]))

    def send(
        self, content: RecordDict, kind: str = MessageType.TRAIN, *, run=7, node=5, settings=None, stated=STATED
    ) -> Message:
        """``stated`` is what the server says of itself unless it is in ``content``."""
        content = RecordDict({**stated, **content})
        compat.identify_process(run_id=run, node_id=node)
        context = Context(
            run_id=run,
            node_id=node,
            node_config={"policy": str(self.policy_path)},
            state=RecordDict(),
            run_config=dict(settings or SETTINGS),
        )
        reply = answer(app, Message(content, node, kind), context)
        assert not context.state  # what a device keeps lies on its disk
        return reply

    def ask(
        self, assignment: Assignment = ASSIGNMENT, params: Params | None = None, *, extra=None, changes=None, **to
    ) -> Message:
        """One round of ``assignment``; ``changes`` are made to the run's settings."""
        arrays = params if isinstance(params, ArrayRecord) else records.to_arrays(params or model())
        content = RecordDict(
            {records.ARRAYS: arrays, records.ASSIGNMENT: records.assignment_record(assignment), **(extra or {})}
        )
        return self.send(content, settings={**SETTINGS, **(changes or {})}, **to)

    def log(self) -> list[str]:
        path = self.folder / "device.log"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def device(tmp_path) -> Device:
    return Device(tmp_path)


@pytest.fixture
def assignment():
    """The usual assignment with changes."""

    def changed(**changes):
        own = {name: changes.pop(name) for name in ("round", "attempt") if name in changes}
        return dataclasses.replace(ASSIGNMENT, event=dataclasses.replace(ASSIGNMENT.event, **changes), **own)

    return changed


@pytest.fixture
def settings():
    return dict(SETTINGS)


@pytest.fixture
def zeros():
    return model


def run_script(script: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
