"""A server that wants the data: whatever it sends, the answer is a refusal in words or a private update."""

from __future__ import annotations

import dataclasses
import io
import pickle
import sys

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MessageType, MetricRecord, RecordDict

from fed_dpsat.accounting import PrivacyLedger
from fed_dpsat.device.release import CLIENT, ledger_path
from fed_dpsat.flower.wire import records
from fed_dpsat.params import unflatten
from fed_dpsat.step.subspace import Coordinates


def history(device):
    with PrivacyLedger(ledger_path(device.folder), readonly=True) as ledger:
        ledger.verify()
        return ledger.history(CLIENT)


def refused(device, reply, says):
    """An error, nothing charged, a line in the log, and the next honest question is answered."""
    assert reply.has_error()
    assert says in reply.error.reason
    assert len(reply.error.reason) < 500
    assert history(device) == ()
    assert "refused" in device.log()[-1]
    assert says.split("\n")[0] in device.log()[-1]
    assert device.ask(run=99).has_content()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"noise_multiplier": 0.0}, "noise_multiplier=0.0 is not in [1, 1e+06]"),
        ({"noise_multiplier": 0.999}, "noise_multiplier=0.999 is not in [1, 1e+06]"),
        ({"noise_multiplier": float("nan")}, "noise_multiplier=nan is not in"),
        ({"noise_multiplier": float("inf")}, "noise_multiplier=inf is not in"),
        ({"noise_multiplier": -2.0}, "noise_multiplier=-2.0 is not in"),
        ({"noise_multiplier": 2}, "noise_multiplier is a int, not a float"),
        ({"noise_multiplier": "2.0"}, "noise_multiplier is a str, not a float"),
        ({"sample_rate": 1.0}, "sample_rate=1.0 is not in [1e-06, 0.5]"),
        ({"sample_rate": 0.0}, "sample_rate=0.0 is not in"),
        ({"sample_rate": float("nan")}, "sample_rate=nan is not in"),
        ({"steps": 1_000_000}, "steps=1000000 is not in [1, 5]"),
        ({"steps": 0}, "steps=0 is not in"),
        ({"steps": True}, "steps is a bool, not a int"),
        ({"kind": "poisson_gaussian_clients"}, "LocalTraining only under the unit 'client'"),
        ({"kind": "poisson_laplace"}, "kind='poisson_laplace' is not allowed on this device; choose one of poisson_ga"),
        ({"round": 0}, "round=0 is not in"),
        ({"round": 2**62}, "is not in [1, 2.14748e+09]"),
        ({"attempt": -1}, "attempt=-1 is not in"),
        ({"round": [1, 2]}, "round is a list, not a int"),
    ],
)
def test_an_assignment_out_of_bounds_is_refused(device, assignment, changes, says):
    honest = records.assignment_record(assignment())
    refused(device, device.ask(extra={records.ASSIGNMENT: ConfigRecord({**honest, **changes})}), says)


@pytest.mark.parametrize("key", ["seed", "noise_source", "clip_norm", "fed_dpsat"])
def test_an_unknown_key_in_the_assignment_is_refused(device, assignment, key):
    honest = records.assignment_record(assignment())
    refused(device, device.ask(extra={records.ASSIGNMENT: ConfigRecord({**honest, key: 7})}), "the assignment has keys")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"noise_source": "seeded"}, "only from the operating system"),
        ({"private": False, "noise_multiplier": 0.0}, "private=False is not allowed"),
        ({"clip_norm": 1e6}, "clip_norm=1000000.0 is not in [0, 1]"),
        ({"clip_norm": float("inf")}, "finite in a private run"),
        ({"clip_norm": float("nan")}, "clip_norm=nan"),
        ({"local_steps": 1_000_000}, "local_steps=1000000 is not in [1, 5]"),
        ({"local_epochs": 2**62, "sample_rate": 5e-324}, "local_steps"),
        ({"augmentations": 1000}, "augmentations=1000 is not in [0, 16]"),
        ({"delta": 0.5}, "delta=0.5 is not in [0, 0.0001]"),
        ({"release_counts": True}, "release_counts=True is not allowed"),
        ({"dataset": "cifar10"}, "dataset='cifar10' is not allowed on this device; choose one of pixels"),
        ({"dataset": "os:getcwd"}, "dataset='os:getcwd' is not allowed"),
        ({"model": "resnet10-gn"}, "model='resnet10-gn' is not allowed on this device; choose one of linear"),
        ({"model": "evil:model"}, "model='evil:model' is not allowed"),
        ({"model": "/tmp/evil.py:model"}, "is not allowed"),
        ({"model": "torch.hub:load"}, "is not allowed"),
        ({"optimizer": "evil:optimizer"}, "optimizer='evil:optimizer' is not allowed"),
        ({"base_optimizer": "evil:optimizer"}, "base_optimizer='evil:optimizer' is not allowed"),
        ({"base_optimizer": "dp-sat+evil:optimizer"}, "base_optimizer='evil:optimizer' is not allowed"),
        ({"optimizer_args": "draws = 1000000"}, "optimizer_args='draws = 1000000' is not allowed on this device"),
        ({"model_args": "width = 1000000"}, "model_args='width = 1000000' is not allowed on this device"),
        ({"clipping_args": "groups = 4"}, "clipping_args='groups = 4' is not allowed on this device"),
        ({"task_args": "knee = 0.5"}, "task_args='knee = 0.5' is not allowed on this device; choose one of none"),
        ({"task": "regression"}, "task='regression' is not allowed on this device; choose one of classification"),
        ({"task": "evil:task"}, "task='evil:task' is not allowed on this device"),
        ({"adapter": "lora"}, "adapter='lora' is not allowed on this device; choose one of none"),
        ({"clipping": "evil:clipping"}, "clipping='evil:clipping' is not allowed"),
        ({"clipping": "adaptive"}, "clipping='adaptive' is not allowed"),
        ({"engine": "evil:engine"}, "engine='evil:engine' is not one of"),
        (
            {"attack": "evil:attack", "attackers": 0.5},
            "attack='evil:attack' is not possible with noise_source='system'",
        ),
        ({"secure_aggregation": True}, "secure_aggregation=True is not possible on a device"),
        ({"privacy_unit": "client"}, "privacy_unit='client' leaves the noise to the server"),
        (
            {"privacy_unit": "user", "user_column": "patient"},
            "privacy_unit='user' is not allowed on this device; choose one of example",
        ),
        ({"surprise": 1}, "surprise=1 is not a setting"),
        ({"lr": "fast"}, "lr='fast' is not of type float"),
        ({"model": "x" * 10_000_000}, "model='xxxx"),
        ({"optimizer": "a\nb\x1b[31m"}, "optimizer='a\\nb"),
    ],
)
def test_settings_that_the_policy_does_not_allow_are_refused(device, changes, says):
    refused(device, device.ask(changes=changes), says)
    asked = device.send(RecordDict(), MessageType.QUERY, settings={**device_settings(), **changes})
    assert says in asked.error.reason  # and it does not even say who it is
    assert len(device.log()) == 3


def device_settings():
    from fed_dpsat.settings.config import RunConfig

    return RunConfig(
        dataset="pixels", noise_source="system", noise_multiplier=2.0, delta=1e-4, sample_rate=0.5, num_clients=3
    ).settings()


EVIL = """
raise SystemExit("code of the server's ran")
"""


@pytest.mark.parametrize(
    "kind", ["dataset", "model", "task", "optimizer", "base_optimizer", "clipping", "partition", "strategy"]
)
def test_no_name_of_the_servers_loads_code(device, tmp_path, monkeypatch, kind):
    (tmp_path / "evil_plugin.py").write_text(EVIL)
    monkeypatch.syspath_prepend(tmp_path)
    for run, name in enumerate(["evil_plugin:attribute", f"{tmp_path / 'evil_plugin.py'}:attribute"]):
        reply = device.ask(changes={kind: name}, run=run)
        assert reply.has_content() == (kind in ("partition", "strategy"))  # which no device asks for
    assert "evil_plugin" not in sys.modules


PATHS = ["client_table", "data_path", "cache_dir", "out", "start_from", "tokenizer", "columns_file", "test_path"]


@pytest.mark.parametrize("setting", PATHS)
def test_no_path_of_the_servers_is_opened(device, tmp_path, setting):
    secret = tmp_path / "secret"
    secret.write_text("password\nhunter2\n")
    before = sorted(tmp_path.rglob("*"))
    reply = device.ask(changes={setting: str(secret), "data_source": "parquet"})
    assert reply.has_content()
    assert "hunter2" not in repr(reply.content)
    assert not [p for p in set(tmp_path.rglob("*")) - set(before) if device.folder not in p.parents]


def raw(dtype: str, shape: tuple[int, ...], data: bytes, stype: str = "numpy.ndarray") -> Array:
    return Array(dtype=dtype, shape=shape, stype=stype, data=data)


def npy(array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def header(shape: str, dtype: str = "<f4", size: int = 8) -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}"
    text += " " * (63 - (10 + len(text)) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + b"\0" * size


class Bomb:
    def __reduce__(self):
        return (sys.exit, ("a pickle was loaded",))


GOOD = np.zeros((2, 2), dtype=np.float32)
BIASES = {
    "float64": Array(np.zeros(2)),
    "integers": Array(np.zeros(2, dtype=np.int32)),
    "complex numbers": Array(np.zeros(1, dtype=np.complex64)),
    "big-endian": raw("float32", (2,), npy(np.zeros(2, dtype=">f4"))),
    "another shape": Array(np.zeros((2, 1), dtype=np.float32)),
    "text": Array(np.array(["ab", "cd"])),
    "structured": raw("float32", (2,), npy(np.zeros(1, dtype=[("a", "<f4"), ("b", "<f4")]))),
    "NaN": Array(np.array([0, np.nan], dtype=np.float32)),
    "inf": Array(np.array([0, np.inf], dtype=np.float32)),
    "objects": raw("float32", (2,), npy(np.zeros(2, dtype=np.float32)).replace(b"'<f4'", b"'|O' ")),
    "a pickle": raw("float32", (2,), pickle.dumps(Bomb())),
    "a pickle by type": raw("float32", (2,), pickle.dumps(Bomb()), "pickle"),
    "10 GB by its header": raw("float32", (2,), header("(2500000000,)")),
    "10^18 by its header": raw("float32", (2,), header("(1000000000000000000,)")),
    "a negative shape": raw("float32", (2,), header("(-2,)")),
    "a shape that is a call": raw("float32", (2,), header("__import__('os').getpid()")),
    "a deep literal": raw("float32", (2,), header("(" * 300 + ")" * 300)),
    "cut off": raw("float32", (2,), npy(np.zeros(2, dtype=np.float32))[:-1]),
    "too long": raw("float32", (2,), npy(np.zeros(2, dtype=np.float32)) + b"\0" * 4),
    "far too long": raw("float32", (2,), npy(np.zeros(2, dtype=np.float32)) + b"\0" * 50_000_000),
    "nothing": raw("float32", (2,), b""),
}


@pytest.mark.parametrize("what", BIASES)
def test_arrays_that_are_not_the_models_are_refused(device, what):
    refused(device, device.ask(params=ArrayRecord({"1.weight": Array(GOOD), "1.bias": BIASES[what]})), "1.bias")


def test_a_model_of_20000_layers_or_other_names_is_refused(device):
    bias = Array(np.zeros(2, dtype=np.float32))
    layers = ArrayRecord({str(n): bias for n in range(20_000)})
    refused(device, device.ask(params=layers), "20000 arrays are not the 2 of the model")
    for names in (["1.bias", "1.weight"], ["1.weight"], ["1.weight", "1.bias", "2.bias"], []):
        arrays = ArrayRecord({n: Array(GOOD) if "w" in n else bias for n in names})
        assert "arrays are not" in device.ask(params=arrays, run=99 + len(names)).error.reason


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"fed_dpsat.state": ArrayRecord({"a": Array(GOOD)})}, "'fed_dpsat.state', which a device rejects"),
        ({"secret": ConfigRecord({"a": 1})}, "'secret', which a device rejects"),
        ({"metrics": MetricRecord({"a": 1})}, "'metrics', which a device rejects"),
        ({records.ASSIGNMENT: MetricRecord({"round": 1})}, "no 'fed_dpsat.assignment' record"),
        ({records.ARRAYS: ConfigRecord({"round": 1})}, "no 'arrays' record"),
    ],
)
def test_unknown_or_missing_records_are_refused(device, extra, says):
    refused(device, device.ask(extra=extra), says)


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ({"kind": "line"}, "describes no subspace"),
        ({"kind": "coordinates", "seed": 0, "round": 1, "frozen": 7}, "7 frozen coordinates, above the 6 of the model"),
        ({"kind": "coordinates", "seed": 0, "round": 1, "frozen": -1}, "describes no subspace"),
        ({"kind": "span", "seed": 0, "first": 0, "steps": 10**9, "directions": 1}, "1000000000 steps, and 2 in"),
        ({"kind": "span", "seed": 0, "first": 0, "steps": 2, "directions": 10**9}, "the round of this device has None"),
        ({"kind": "span", "seed": 0, "first": 0, "steps": 2}, "describes no subspace"),
    ],
)
def test_a_subspace_that_is_none_is_refused_before_anything_is_charged(device, said, says):
    refused(device, device.ask(extra={records.SUBSPACE: ConfigRecord(said)}), says)


def test_within_a_subspace_the_same_private_update_is_sent_in_part(device, assignment):
    """Four of six coordinates: the bits that are in the whole reply to the same question, and one charge for both."""
    within = Coordinates(seed=0, round=1, frozen=2)
    whole = device.ask().content.array_records[records.ARRAYS]
    part = device.ask(extra={records.SUBSPACE: records.subspace_record(within)}).content.array_records[records.ARRAYS]
    flat = torch.cat([torch.from_numpy(whole[name].numpy().copy()).flatten() for name in whole])
    assert list(part) == ["values"]
    assert part["values"].numpy().tolist() == flat[within.active(6)].tolist()
    assert history(device) == (assignment().event,)


def test_a_strategys_own_config_is_not_read(device):
    assert device.ask(extra={"config": ConfigRecord({"server-round": 1, "seed": 3, "lr": 1e9})}).has_content()


def test_a_device_does_not_evaluate_and_loads_nothing_to_say_so(device, tmp_path):
    (tmp_path / "evil.py").write_text(EVIL)
    reply = device.send(RecordDict(), "evaluate", settings={**device_settings(), "model": f"{tmp_path}/evil.py:model"})
    assert "evaluates in a simulation alone" in reply.error.reason
    assert history(device) == ()


def test_a_private_head_stays_on_the_devices_disk(device, assignment):
    from fed_dpsat.device.client import unpack
    from fed_dpsat.device.journal import open_journal
    from fed_dpsat.device.release import journal_path

    changes, shared = {"personal_layers": "1.bias"}, {"1.weight": torch.zeros(2, 2)}
    reply = device.ask(params=shared, changes=changes)
    assert list(reply.content[records.ARRAYS]) == ["1.weight"]
    assert history(device) == (assignment().event,)
    with open_journal(journal_path(device.folder)) as journal:
        state = unflatten(unpack(journal.kept().state))
    assert state["personal"].keys() == {"1.bias"}
    assert float(state["personal"]["1.bias"].abs().sum()) > 0
    refused = device.ask(dataclasses.replace(assignment(), round=2), changes=changes)
    assert "names of the 2 arrays are not the 1 of the model" in refused.error.reason
    wrong = device.ask(run=9, params=shared, changes={"personal_layers": "1"})
    assert "nothing would be left to share" in wrong.error.reason


@pytest.mark.parametrize("kind", ["query.data", "train.raw", "evaluate.everything"])
def test_other_kinds_of_message_have_no_answer(device, kind):
    reply = device.send(RecordDict(), kind)
    assert "function registered" in reply.error.reason
    assert history(device) == ()


def test_a_round_before_the_handshake_is_a_private_update_like_any(device, assignment):
    assert device.ask().has_content()
    assert history(device) == (assignment().event,)


def test_identical_rounds_are_one_answer_and_one_charge(device, assignment):
    first, second = (device.ask(node=node).content[records.ARRAYS] for node in (5, 6))  # also by a new node id
    assert all((first[name].numpy() == second[name].numpy()).all() for name in first)
    assert history(device) == (assignment().event,)


def test_identical_rounds_under_new_numbers_are_charged_until_nothing_is_left(device, assignment):
    answered = 0
    for attempt in range(100):
        reply = device.ask(assignment(attempt=attempt, noise_multiplier=1.0))
        if reply.has_error():
            break
        answered += 1
    assert "budget=8 is below" in reply.error.reason
    assert 1 <= answered < 20
    assert sum(event.steps for event in history(device)) == 2 * answered
    for run in (8, 9):
        assert "budget=8 is below" in device.ask(assignment(noise_multiplier=1.0), run=run).error.reason
    assert sum(event.steps for event in history(device)) == 2 * answered


def test_settings_that_change_within_a_run_are_refused(device, assignment):
    device.ask()
    reply = device.ask(assignment(round=2), changes={"lr": 9.0})
    assert "other settings than at its start" in reply.error.reason
    assert history(device) == (assignment().event,)


def test_crafted_weights_do_not_let_one_example_through(device, assignment):
    """Weights under which a gradient is huge, or overflows: what an update may move stays clip_norm and noise."""
    clip_norm, lr, rate, steps, noise = 0.5, 2.0, 0.5, 2, 2.0
    most = 20 * clip_norm + 8 * noise * clip_norm  # 20 examples, and noise that exceeds 8 sigma with chance 1e-15
    for round, scale in enumerate([1.0, 1e6, 1e19, 3e38], start=1):
        weights = torch.tensor([[scale, -scale], [-scale, scale]])
        start = {"1.weight": weights, "1.bias": torch.tensor([scale, -scale])}
        reply = device.ask(assignment(round=round), params=records.to_arrays(start))
        end = {name: torch.from_numpy(a.numpy().copy()) for name, a in reply.content[records.ARRAYS].items()}
        for name, value in start.items():
            moved = (end[name].double() - value.double()).abs().max()
            rounding = steps * float(value.abs().max()) * 2.0**-23
            assert moved <= steps * lr * most / (20 * rate) + rounding


def test_a_policy_that_forbids_the_run_refuses(device):
    device.write(runs="[8]")
    assert "run 7 is not one of the runs" in device.ask().error.reason
    assert device.ask(run=8).has_content()


def test_a_model_with_more_parameters_than_allowed_is_refused(device):
    device.write(largest_parameters=5)
    assert "has 6 parameters, above largest_parameters=5" in device.ask().error.reason


def test_a_model_with_batch_norm_is_refused_even_if_the_policy_lists_it(device, tmp_path):
    source = tmp_path / "norm.py"
    source.write_text(
        "from torch import nn\n"
        "def model(num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(2, num_classes), nn.BatchNorm1d(num_classes))\n"
    )
    device.write(models=f'["{source}:model"]')
    assert "mix examples: 2 (BatchNorm1d)" in device.ask(changes={"model": f"{source}:model"}).error.reason
    assert history(device) == ()


def test_a_model_that_cannot_be_trained_privately_is_refused_before_a_charge(device, tmp_path):
    """A trial on made-up examples says so to whoever asks who the device is, and to whoever asks for a round."""
    source = tmp_path / "short.py"
    source.write_text(
        "from torch import nn\n"
        "class Short(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.linear = nn.Linear(2, 1)\n"
        "    def forward(self, x):\n"
        "        return self.linear(x[:, 0])\n"
    )
    device.write(models=f'["linear", "{source}:Short"]')
    changes = {"model": f"{source}:Short"}
    asked = device.send(RecordDict(), MessageType.QUERY, settings={**device_settings(), **changes})
    assert "Short gives [4, 1] for inputs" in asked.error.reason
    refused(device, device.ask(changes=changes), "Short gives [4, 1] for inputs")


def test_a_task_of_code_on_the_device_is_loaded_if_the_policy_names_it(device, tmp_path):
    source = tmp_path / "own.py"
    source.write_text(
        "from fed_dpsat.tasks.classification import Classification\nclass Own(Classification):\n    name = 'own'\n"
    )
    changes = {"task": f"{source}:Own"}
    refused(device, device.ask(changes=changes), "is not allowed on this device; choose one of classification")
    device.write(tasks=f'["{source}:Own"]')
    assert device.ask(changes=changes, run=11).has_content()


def test_an_error_that_tells_of_data_stays_on_the_device(device):
    data = device.path / "data.py"
    data.write_text(data.read_text().replace("arange(20) % 2", "full((20,), 41)"))
    reply = device.ask()
    assert "its own log has the reason" in reply.error.reason
    assert "41" not in reply.error.reason
    assert "label 41 of row 0" in "".join(device.log())
    data.write_text(data.read_text().replace("full((20,), 41)", "arange(20) % 2"))


def test_a_device_without_a_ledger_or_policy_answers_nothing(device):
    ledger_path(device.folder).unlink()
    assert "its own log has the reason" in device.ask().error.reason
    device.policy_path.write_text("folder = 3")
    reply = device.ask()
    assert "no valid policy" in reply.error.reason
    assert "folder" not in reply.error.reason


def test_counts_leave_only_if_policy_and_run_say_so(device):
    assert dict(device.ask().content[records.METRICS]) == {"num-examples": 20}
    device.write(release_counts="true")
    content = device.ask(run=8, changes={"release_counts": True}).content
    assert dict(content[records.METRICS]) == {"num-examples": 20, "nonfinite-examples": 0}


def test_noise_has_no_seed(device, assignment):
    """Two devices, or attempts, with equal settings and seed get other noise; in a simulation it would be equal."""
    found = [device.ask(assignment(), run=run).content[records.ARRAYS]["1.weight"].numpy() for run in (1, 2)]
    assert (found[0] != found[1]).all()


def test_no_seed_of_the_servers_is_that_of_what_a_model_draws(device, assignment, monkeypatch):
    """Two admitted runs, and the same one again, each with the server's seed: keys that nobody else can derive."""
    from fed_dpsat.step import loop as training
    from fed_dpsat.step.draws import step_key
    from fed_dpsat.step.noise import derive_key

    keys, of_training = [], training.clipped_gradient_sum

    def heard(*arguments, draws, **settings):
        keys.append(draws.key)
        return of_training(*arguments, draws=draws, **settings)

    monkeypatch.setattr(training, "clipped_gradient_sum", heard)
    for run in (1, 2):
        assert device.ask(assignment(), run=run, changes={"seed": 12345}).has_content()
    assert len(set(keys)) == len(keys) >= 4  # two runs of two steps, and those of their trials
    derived = derive_key(12345, purpose="draws", client=0, round=1)
    assert not {step_key(derived, step) for step in range(4)} & set(keys)


def test_momentum_and_direction_survive_on_the_devices_disk(device, assignment):
    from fed_dpsat.device.client import unpack
    from fed_dpsat.device.journal import open_journal
    from fed_dpsat.device.release import journal_path

    for round in (1, 2):
        device.ask(dataclasses.replace(assignment(), round=round), changes={"momentum": 0.9}, node=round)
    with open_journal(journal_path(device.folder)) as journal:
        state = unflatten(unpack(journal.kept().state))
    assert state.keys() == {"optimizer"}
    assert float(state["optimizer"]["base"]["momentum"]["1.weight"].abs().sum()) > 0
