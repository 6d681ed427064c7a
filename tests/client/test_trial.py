"""What cannot run is found on made-up examples, in one line, nobody charged; what can run gives the same bits."""

from __future__ import annotations

import dataclasses
import logging
import random
import threading

import numpy as np
import pytest
import torch
from flwr.serverapp.strategy import FedAvg, FedMedian
from torch import nn
from typer.testing import CliRunner

from fed_dpsat import simulation
from fed_dpsat.accounting.event import PrivacyEvent
from fed_dpsat.accounting.ledger import PrivacyLedger
from fed_dpsat.accounting.plans import make_plans
from fed_dpsat.cli import app
from fed_dpsat.client.assignment import Assignment
from fed_dpsat.client.blame import TrialError
from fed_dpsat.client.build import Experiment
from fed_dpsat.client.trial import made_up, rehearsal, try_client
from fed_dpsat.data.dataset import Dataset, Examples
from fed_dpsat.data.digits import digits
from fed_dpsat.errors import SettingError
from fed_dpsat.flower import server_app
from fed_dpsat.flower.grid import node_context
from fed_dpsat.flower.trial import try_federation
from fed_dpsat.flower.wire import compat
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.simulation import simulate
from fed_dpsat.step.gradients import loop
from fed_dpsat.step.optimizers import DPSGD

FAST = {"noise_multiplier": 2.0, "delta": 1e-4, "accountant": "rdp", "num_clients": 3, "num_rounds": 2}
MODELS = """
from types import SimpleNamespace

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Net(nn.Module):
    def __init__(self, outputs=10):
        super().__init__()
        self.body, self.gru, self.head = nn.Linear(64, 8), nn.GRU(8, 8, batch_first=True), nn.Linear(8, outputs)

    def forward(self, x):
        return self.head(self.body(x.flatten(1)).tanh())


class Recurrent(Net):
    def forward(self, x):
        return self.head(self.gru(x.squeeze(1))[0][:, -1])


class Checkpointed(Net):
    def forward(self, x):
        return self.head(checkpoint(self.body, x.flatten(1), use_reentrant=False))


class Wrapped(Net):
    def forward(self, x):
        return {"scores": super().forward(x)}


class Outcome(Net):
    def forward(self, x):
        return SimpleNamespace(scores=super().forward(x), hidden=x)


class Answers(Net):
    def forward(self, x):
        return super().forward(x).argmax(1)


class Squeezing(Net):
    def forward(self, x):
        return super().forward(x).squeeze()


class Branching(Net):
    def forward(self, x):
        logits = super().forward(x)
        return logits if float(logits.detach().sum()) < 1e9 else logits * 2


class Mixes(Net):
    def forward(self, x):
        return super().forward(x - x.mean(0, keepdim=True))


class TrainsOnly(Net):
    def forward(self, x):
        if not self.training:
            raise NotImplementedError("no inference yet")
        return super().forward(x)


few = lambda: Net(9)
wrong_inputs = lambda: nn.Sequential(nn.Flatten(), nn.Linear(100, 10))
wrong_channels = lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 10))
"""
OTHERS = '''
from dataclasses import dataclass, replace

import torch
from flwr.serverapp.strategy import FedAvg
from flwr.app import ArrayRecord
from fed_dpsat.step.optimizers import DPSGD
from fed_dpsat.lab.attacks import Attack


class SecondStep:
    """Finds what it kept in its first step under another name."""

    def init(self, params):
        return {}

    def query_point(self, params, state, info):
        return params

    def update(self, params, private_gradient, state, info):
        if "kept" in state:
            raise KeyError("velocity")
        return params, {"kept": private_gradient}


class Carries(DPSGD):
    carries = ("momentun",)

    def init(self, params):
        return {"momentum": params}


class Reorders(DPSGD):
    def update(self, params, private_gradient, state, info):
        params, state = super().update(params, private_gradient, state, info)
        return dict(reversed(params.items())), state


class Reshapes(DPSGD):
    def update(self, params, private_gradient, state, info):
        return {name: p.flatten() for name, p in params.items()}, state


@dataclass(frozen=True)
class TooShort:
    clip_norm: float

    def factors(self, squared_norms):
        return {name: n[:-1] for name, n in squared_norms.items()}


class OtherOrder(FedAvg):
    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        return ArrayRecord(dict(reversed(arrays.items()))), metrics


class NoModel(FedAvg):
    def aggregate_train(self, server_round, replies):
        return None, None


class Old(FedAvg):
    def aggregate_fit(self, server_round, results, failures):
        return None, {}


class SecondRound(FedAvg):
    def configure_train(self, server_round, arrays, config, grid):
        if server_round > 1:
            raise ZeroDivisionError("division by zero")
        return super().configure_train(server_round, arrays, config, grid)


class NoForgery(Attack):
    def forge(self, scene):
        raise ValueError("nothing to forge")


class ForgesNaN(Attack):
    def forge(self, scene):
        return {name: u * torch.nan for name, u in scene.update.items()}


sgd = lambda lr: SecondStep()
carries = lambda lr: Carries(lr=lr)
reorders = lambda lr: Reorders(lr=lr)
reshapes = lambda lr: Reshapes(lr=lr)
'''
TASKS = '''
from fed_dpsat.tasks.base import Measure
from fed_dpsat.tasks.classification import Classification


class OneLoss(Classification):
    """A mean over the batch, as training without privacy takes it."""

    def loss(self, outputs, targets):
        return super().loss(outputs, targets).mean()


class Annealed(Classification):
    """Its loss grows from call to call, and so an example more changes those of the others."""

    calls = 0

    def loss(self, outputs, targets):
        self.calls += 1
        return super().loss(outputs, targets) * min(2, 1 + self.calls / 1e5)


class Collects(Classification):
    def __init__(self, class_names):
        super().__init__(class_names)
        self.sizes = []

    def loss(self, outputs, targets):
        self.sizes.append(len(targets))
        return super().loss(outputs, targets)


class Nothing(Measure):
    def update(self, outputs, targets):
        pass

    def compute(self):
        return {}


class Unmeasured(Classification):
    name = "ranking"

    def measure(self):
        return Nothing()


class Broken(Unmeasured):
    def measure(self):
        raise ValueError("no ranks")
'''
FAILURES = {
    "few outputs": (
        "model=m.py:few",
        "gives [4, 9] for inputs [4, 1, 8, 8], not [4, 10]",
        "make its last layer 10 wide",
    ),
    "wrong inputs": (
        "model=m.py:wrong_inputs",
        "layer 1 (Linear): its in_features is 100, and it gets 64;",
        "[B, 1, 8, 8]",
    ),
    "wrong channels": ("model=m.py:wrong_channels", "layer 0 (Conv2d): its in_channels is 3, and it gets 1;", "[B, 1,"),
    "output object": ("model=m.py:Wrapped", "gives a dict with scores", "return a tensor of logits"),
    "an object": ("model=m.py:Outcome", "gives a SimpleNamespace with scores, hidden", "with the tensor as logits"),
    "answers": ("model=m.py:Answers", "gives [4] for inputs", "return 10 logits for each example, not a class"),
    "one example": ("model=m.py:Squeezing", "gives [10] for inputs [1, 1, 8, 8]", "also for one example"),
    "evaluation": (
        "model=m.py:TrainsOnly",
        "NotImplementedError: no inference yet (m.py, line 62)",
        "make it take those",
    ),
    "second step": ("optimizer=o.py:sgd", "update: KeyError: 'velocity' (o.py, line 22); run", "check_optimizer"),
    "a name of its state": ("optimizer=o.py:carries", "it carries 'momentun'", "did you mean 'momentum'?"),
    "parameters in another order": ("optimizer=o.py:reorders", "other parameters than the model's", "check_optimizer"),
    "other shapes": ("optimizer=o.py:reshapes", "1.weight is float32[640]", "check_optimizer"),
    "clipping": ("clipping=o.py:TooShort", "one real factor per example", "check_clipping"),
    "arrays in another order": ("strategy=o.py:OtherOrder", "returned other parameters", "check_strategy"),
    "mixed examples": ("model=m.py:Mixes", "Mixes mixes examples", "use no statistics over the batch"),
    "no model": ("strategy=o.py:NoModel", "NoModel.aggregate_train returns no model", "return the new model"),
    "second round": ("strategy=o.py:SecondRound", "configure_train: ZeroDivisionError", "check_strategy"),
    "huge lr": ("lr=1e20", "numbers beyond 1e+14", "lower lr"),
    "one loss": ("task=t.py:OneLoss", "its loss of 4 examples is []", "return losses [4]"),
    "loss by calls": (
        "task=t.py:Annealed",
        "its loss changes its 'calls'",
        "the loss of an example depends on its own",
    ),
    "loss that keeps": (
        "task=t.py:Collects",
        "its loss changes its 'sizes'",
        "the loss of an example depends on its own",
    ),
    "metric missing": ("task=t.py:Unmeasured", "its measure has no 'accuracy'", "return a value of each metric"),
    "measure": ("task=t.py:Broken", "measure: ValueError: no ranks", "fed_dpsat.tasks.base.Task"),
    "attack of NaN": ("attack=o.py:ForgesNaN", "attack='ForgesNaN' is not", "return finite tensors"),
    "attack": (
        "attack=o.py:NoForgery",
        "forge: ValueError: nothing to forge (o.py, line ",
        "fed_dpsat.lab.attacks.Attack",
    ),
}
FIRST_EVALUATION = {
    "few outputs",
    "wrong inputs",
    "output object",
    "an object",
    "answers",
    "wrong channels",
    "evaluation",
    "metric missing",
    "measure",
}
"""What failed without a trial before anybody was charged, with a traceback and a run folder left behind."""


@pytest.fixture
def plugins(tmp_path, monkeypatch):
    (tmp_path / "m.py").write_text(MODELS)
    (tmp_path / "o.py").write_text(OTHERS)
    (tmp_path / "t.py").write_text(TASKS)
    monkeypatch.chdir(tmp_path)


def arguments(*overrides):
    settings = {name: str(value) for name, value in FAST.items()}
    return [word for setting in (*(f"{n}={v}" for n, v in settings.items()), *overrides) for word in ("--set", setting)]


@pytest.mark.by_default("wrong inputs", "output object", "few outputs", "one loss", "second round", "evaluation")
@pytest.mark.parametrize("name", FAILURES)
def test_what_cannot_run_is_one_line_and_charges_nobody(name, plugins, tmp_path, monkeypatch):
    setting, seen, remedy = FAILURES[name]
    more = ["attackers=0.3"] if name.startswith("attack") else ["local_steps=2"] if name == "second step" else []
    command = ["run", *arguments(setting, *more), "--out"]
    result = CliRunner().invoke(app, [*command, "tried"])
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert all(words in line for words in (setting.partition("=")[0], seen, remedy)), line
    assert not [path.name for path in tmp_path.iterdir() if path.name not in ("m.py", "o.py", "t.py", "__pycache__")]

    monkeypatch.setattr(simulation, "try_federation", lambda *args: None)
    CliRunner().invoke(app, [*command, "untried"])
    with PrivacyLedger(tmp_path / "untried" / "ledger.sqlite", readonly=True) as ledger:
        assert bool(ledger.rounds_by_client()) == (name not in FIRST_EVALUATION)


@pytest.mark.parametrize("model", ["Recurrent", "Checkpointed", "Branching"])
def test_what_only_a_loop_over_examples_can_train_completes(model, plugins, tmp_path):
    config = RunConfig(**{**FAST, "num_rounds": 1}, sample_rate=0.01, model=f"m.py:{model}")
    assert simulate(config, tmp_path / "run")["status"] == "completed"


def test_a_strategy_of_the_old_interface_is_refused_before_anything(plugins, tmp_path):
    result = CliRunner().invoke(app, ["run", *arguments("strategy=o.py:Old"), "--out", "run"])
    assert result.exit_code == 2
    assert "aggregate_fit, which nothing calls" in result.stderr
    assert "rename it to aggregate_train" in result.stderr
    assert not (tmp_path / "run").exists()


MODES = {
    "plain": {},
    "secure": {"secure_aggregation": True},
    "asynchronous": {"buffer_size": 2, "delay": "lognormal"},
    "client level": {"privacy_unit": "client", "client_sampling": "poisson", "clients_per_round": 2},
    "personal": {"model": "mlp", "personal_layers": "head", "stack_clients": 2},
    "head, then all": {"model": "mlp", "train_layers": "head-then-all", "unfreeze_round": 2},
    "codec": {"update_codec": "random-k", "ascent_memory": "zero"},
    "subspace": {"optimizer": "zeroth-order", "local_steps": 4, "lr": 0.01},
    "adaptive": {"clipping": "adaptive", "base_optimizer": "adam", "validation_share": 0.2},
    "attacked": {"attack": "little-is-enough", "attackers": 0.4, "strategy": "trimmed"},
    "one round": {"num_rounds": 1, "strategy": "flwr.serverapp.strategy:FedAdam"},
}


@pytest.mark.by_default("plain", "secure", "client level")
@pytest.mark.parametrize("mode", MODES)
def test_a_run_has_the_bits_of_one_without_a_trial(mode, tmp_path, monkeypatch):
    config = RunConfig(**{**FAST, **MODES[mode]})
    tried, lines = [], []
    for name in ("with", "without"):
        if name == "without":
            monkeypatch.setattr(simulation, "try_federation", lambda *args: tried.append(args))
        simulate(config, tmp_path / name)
        lines.append((tmp_path / name / "rounds.jsonl").read_text())
    assert len(tried) == 1
    assert lines[0] == lines[1]


class Counting(FedAvg):
    """Remembers each round, and draws from whatever generator there is."""

    def __init__(self):
        super().__init__()
        self.rounds = []

    def configure_train(self, server_round, arrays, config, grid):
        self.rounds.append(server_round)
        random.random(), np.random.rand(), torch.rand(1)
        return super().configure_train(server_round, arrays, config, grid)


class Steps(DPSGD):
    """Counts its steps, as no optimizer may."""

    taken: list

    def update(self, params, private_gradient, state, info):
        self.taken.append(len(self.taken))
        return super().update(params, private_gradient, state, info)


def test_objects_and_generators_are_as_before():
    optimizer, strategy = Steps(lr=0.1), Counting()
    object.__setattr__(optimizer, "taken", [])
    linear = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    experiment = Experiment.build(RunConfig(**FAST), optimizer=optimizer, model=linear)
    optimizer, model = experiment.optimizer, experiment.loss_fn.module  # the run's own copies
    object.__setattr__(optimizer, "taken", [])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    generators = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    identity = vars(compat.TaskIdentity).copy()
    try_federation(experiment, strategy, ["optimizer", "model", "strategy"])
    assert (optimizer.taken, strategy.rounds) == ([], [])
    assert strategy.fraction_evaluate == FedAvg().fraction_evaluate
    assert model.training
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert (random.getstate(), np.random.get_state()[1].tolist()) == generators[:2]
    assert torch.equal(torch.get_rng_state(), generators[2])
    assert vars(compat.TaskIdentity) == identity


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_no_private_example_is_looked_at(share, monkeypatch):
    """Training examples are marked, and of them those that a validation split puts aside."""
    data, batch, largest = digits(), Examples.batch, []

    def watched(self, indices, device=None):
        largest.append(float(self.inputs[indices].max()))
        return batch(self, indices, device)

    train = dataclasses.replace(data.train, inputs=torch.full_like(data.train.inputs, 77.0))
    config = RunConfig(**FAST, validation_share=share)
    experiment = Experiment.build(config, dataset=dataclasses.replace(data, train=train))
    monkeypatch.setattr(Examples, "batch", watched)
    try_federation(experiment)
    try_client(experiment)
    assert len(largest) > 8
    assert max(largest) <= 1
    experiment.client_round(
        0,
        Assignment(round=1, event=PrivacyEvent(noise_multiplier=1.0, sample_rate=1.0, steps=1)),
        experiment.shared(),
        None,
    )
    assert largest[-1] == 77


def tokens(dtype=torch.float32, size=9):
    inputs = (torch.arange(60 * 4).view(60, 4) % size).to(dtype)
    rows = Examples(inputs=inputs, labels=torch.arange(60) % 3, mean=(0.0,) * 4, std=(1.0,) * 4)
    return Dataset(name="tokens", train=rows, test=rows, class_names=("a", "b", "c"))


class Embeds(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(9, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.table(x.long()).mean(1))


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_made_up_tokens_are_in_the_vocabulary(share, tmp_path):
    config = RunConfig(**FAST, validation_share=share)
    assert simulate(config, tmp_path / "run", dataset=tokens(), model=Embeds())["status"] == "completed"


@pytest.mark.parametrize("count", [4, 12])
@pytest.mark.parametrize("public", [True, False])
def test_made_up_examples_are_of_the_shape_and_types_of_the_data(count, public):
    for data in (digits(), tokens(), images()):
        made = made_up(data, count, public=public)
        for split, size in (("train", count), ("test", 4)):
            mine, like = getattr(made, split), getattr(data, split)
            assert (mine.inputs.dtype, mine.inputs.shape[1:]) == (like.inputs.dtype, like.inputs.shape[1:])
            assert (mine.mean, mine.std, len(mine)) == (like.mean, like.std, size)
            assert all(int(labels.max()) == data.num_classes - 1 for labels in mine.labels.split(4))


def images():
    rows = Examples(
        inputs=torch.zeros(5, 3, 2, 2, dtype=torch.uint8), labels=torch.zeros(5).long(), mean=(0.5,) * 3, std=(0.5,) * 3
    )
    return Dataset(name="images", train=rows, test=rows, class_names=("a", "b"))


def test_noise_in_the_mean_is_that_of_the_run():
    """Noise of the mean: noise_multiplier * C / expected batch, here 2 * 0.5 / (0.5 * 479)."""
    experiment = Experiment.build(RunConfig(**FAST))
    tried = rehearsal(experiment, 2, noise_multiplier=2.0).config
    assert tried.noise_multiplier * 0.5 / 4 == pytest.approx(2 * 0.5 / (0.5 * 479))
    client = Experiment.build(RunConfig(**FAST, privacy_unit="client"))
    assert rehearsal(client, 2, noise_multiplier=2.0).config.noise_multiplier == pytest.approx(2 * 2 / 3)


@pytest.mark.parametrize(("steps", "tried"), [(1, 1), (2, 2), (3, 3), (10, 2), (11, 3)])
def test_state_is_carried_and_two_step_methods_end(steps, tried):
    experiment = Experiment.build(RunConfig(**FAST, local_steps=steps))
    assert rehearsal(experiment, 2, noise_multiplier=1.0).config.steps_per_round == tried
    whole = Experiment.build(RunConfig(**FAST, local_steps=steps, optimizer="zeroth-order"))
    assert rehearsal(whole, 2, noise_multiplier=1.0).config.steps_per_round == steps


class Branching(nn.Module):
    """A branch on data, for which the engine has one pass per example."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        return self.head(x.flatten(1)) if x.isfinite().all() else x.flatten(1)[:, :10]


def test_what_is_logged_is_said_once_and_only_if_all_is_well(caplog):
    loop._say_once.cache_clear()
    with caplog.at_level(logging.WARNING, "fed_dpsat"):
        try_federation(Experiment.build(RunConfig(**FAST), model=Branching()))
        assert len([r.message for r in caplog.records if "one pass per example" in r.message]) == 1
        caplog.clear()
        loop._say_once.cache_clear()
        with pytest.raises(TrialError):
            try_federation(Experiment.build(RunConfig(**FAST, lr=1e20), model=Branching()))
        assert loop._say_once.cache_info().currsize == 1
    assert not caplog.records


def test_a_weight_that_is_computed_is_copied_and_a_lock_is_refused_by_name(tmp_path):
    with pytest.warns(FutureWarning):
        model = nn.Sequential(nn.Flatten(), nn.utils.weight_norm(nn.Linear(64, 10)))
    try_federation(Experiment.build(RunConfig(**FAST), model=model), None, ["model"])
    strategy = FedMedian()
    strategy.lock = threading.Lock()
    with pytest.raises(SettingError, match=r"^strategy='FedMedian' is not an object that can be copied .*__deepcopy__"):
        simulate(RunConfig(**FAST), tmp_path / "run", strategy=strategy)
    assert not (tmp_path / "run").exists()


def test_a_strategy_of_single_replies_is_shown_a_whole_cohort():
    """Krum keeps 12 of 15 replies: with two there would be none to keep."""
    strategy = "flwr.serverapp.strategy:MultiKrum"
    config = RunConfig(
        **{**FAST, "num_clients": 15}, strategy=strategy,
        strategy_args="num_malicious_nodes = 3, num_nodes_to_select = 12",
    )  # fmt: skip
    try_federation(Experiment.build(config))


def test_a_client_is_tried_without_a_server(plugins):
    try_client(Experiment.build(RunConfig(**FAST)))
    for model in ("few", "wrong_inputs", "Wrapped"):
        with pytest.raises(TrialError, match=rf"^model='m.py:{model}' fails on made-up examples of digits: "):
            try_client(Experiment.build(RunConfig(**FAST, model=f"m.py:{model}")))
    with pytest.raises(TrialError, match="KeyError: 'velocity'"):
        try_client(Experiment.build(RunConfig(**FAST, optimizer="o.py:sgd")))
    with pytest.raises(TrialError, match="its first steps give parameters"):
        try_client(Experiment.build(RunConfig(**FAST, optimizer="o.py:reorders")))


@pytest.mark.parametrize(
    "kind",
    [
        {"secure_aggregation": True},
        {"secure_aggregation": True, "clients_per_round": 3, "min_clients": 3},
        {"buffer_size": 2, "delay": "lognormal"},
        {"clients_per_round": 2, "client_sampling": "poisson"},
        {"privacy_unit": "client"},
        {"model": "mlp", "personal_layers": "head"},
        {"clipping": "adaptive"},
        {"attack": "sign-flip", "attackers": 0.4},
    ],
    ids=lambda kind: "-".join(kind),
)
def test_a_client_of_each_kind_of_round_is_tried_alone(kind):
    try_client(Experiment.build(RunConfig(**{**FAST, "num_clients": 4, **kind})))


def test_a_data_set_without_test_examples_is_refused_before_a_folder(tmp_path):
    data = digits()
    nothing = dataclasses.replace(data.test, inputs=data.test.inputs[:0], labels=data.test.labels[:0])
    without = dataclasses.replace(data, test=nothing)
    with pytest.raises(SettingError, match=r"^dataset='digits.* at least one test example; set validation_share=0\.1"):
        simulate(RunConfig(**FAST), tmp_path / "run", dataset=without)
    assert not (tmp_path / "run").exists()
    config = RunConfig(**FAST, validation_share=0.1)
    assert simulate(config, tmp_path / "run", dataset=without)["status"] == "completed"


def test_what_plans_refuse_is_said_first():
    config = RunConfig(**{**FAST, "noise_multiplier": 0.4}, target_epsilon=0.01, budget_mode="retire")
    with pytest.raises(ValueError, match="enough for one round"):
        make_plans(config)
    with pytest.raises(ValueError, match="enough for one round"):
        try_federation(Experiment.build(config))


def test_a_server_on_a_network_tries_before_it_makes_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    context = node_context(1, RunConfig(**FAST, strategy="flwr.serverapp.strategy:FedAvg", lr=1e20).settings(), 3)
    with pytest.raises(TrialError, match="numbers beyond"):
        server_app.main(None, context)
    assert not list(tmp_path.iterdir())
