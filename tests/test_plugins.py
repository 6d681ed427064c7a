import sys

import pytest

from fed_dpsat import plugins
from fed_dpsat.plugins import PluginError, build, builtin, listed, load, required, summary
from fed_dpsat.step.clipping import FlatClipping
from fed_dpsat.step.optimizers.dpsgd import DPSGD


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Makes ``PACKAGES["optimizer"]`` a package of these files, importable for the length of a test."""

    def make(**modules):
        folder = tmp_path / "plugins_under_test"
        folder.mkdir()
        for name, text in {"__init__": "", **modules}.items():
            (folder / f"{name}.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setitem(plugins.PACKAGES, "optimizer", folder.name)
        for name in [m for m in sys.modules if m.partition(".")[0] == folder.name]:
            monkeypatch.delitem(sys.modules, name)

    return make


@pytest.fixture
def file(tmp_path):
    """Path of a plug-in file."""

    def write(text, folder="."):
        (tmp_path / folder).mkdir(exist_ok=True)
        path = tmp_path / folder / "mine.py"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("optimizer", "dp-sgd"),
        ("optimizer", "dp-sat"),
        ("optimizer", "dp-sat-momentum"),
        ("clipping", "flat"),
        ("model", "resnet20-gn"),
        ("dataset", "digits"),
    ],
)
def test_what_ships_has_a_short_name(kind, name):
    assert name in builtin(kind)
    assert load(kind, name) is builtin(kind)[name]
    assert list(builtin(kind)) == sorted(builtin(kind))


@pytest.mark.parametrize("kind", plugins.PACKAGES)
def test_every_kind_has_some_and_each_says_what_it_is(kind):
    assert builtin(kind)
    assert all(summary(factory) for factory in builtin(kind).values())


def test_every_kind_has_a_table():
    assert plugins.PACKAGES.keys() == plugins.TABLES.keys()


def test_a_dotted_name():
    assert load("optimizer", "fed_dpsat.step.optimizers.dpsgd:DPSGD") is DPSGD


def test_a_file(file):
    path = file("from dataclasses import dataclass\n@dataclass\nclass Mine:\n    lr: float\n")
    assert build("optimizer", f"{path}:Mine", {"lr": 0.5, "rho": 1}).lr == 0.5


def test_two_files_of_one_name_are_two_plugins(file):
    a, b = (file(f"def mine():\n    return {folder!r}\n", folder) for folder in "ab")
    first, second = load("model", f"{a}:mine"), load("model", f"{b}:mine")
    assert [first(), second()] == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dp-sta", "did you mean .*dp-sat"),
        ("DP_SGD", "did you mean .*dp-sgd"),
        ("zzz", "did you mean adam, .*dp-sat, dp-sat-momentum, dp-sgd, .*zeroth-order"),
        ("", "did you mean adam, .*dp-sat, dp-sat-momentum, dp-sgd, .*zeroth-order"),
        ("nowhere.at_all:Thing", "cannot import 'nowhere.at_all'"),
        ("nowhere/at_all.py:Thing", "cannot import 'nowhere/at_all.py' .*no file"),
        ("fed_dpsat.step.optimizers.dpsgd:DPSDG", "has no 'DPSDG'; did you mean DPSGD"),
        ("fed_dpsat.step.optimizers.dpsgd:zzz", "has no 'zzz'$"),
        (":DPSGD", "optimizer=':DPSGD'"),
        (".dpsgd:DPSGD", r"optimizer='\.dpsgd:DPSGD'"),
    ],
)
def test_a_name_that_leads_nowhere_says_where_it_might(name, message):
    with pytest.raises(PluginError, match=message):
        load("optimizer", name)


def test_an_error_inside_a_plugin_is_not_hidden(file):
    path = file("1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        load("optimizer", f"{path}:Mine")


def test_a_new_file_is_a_new_builtin(package):
    package(one="OPTIMIZERS = {'one': int}", two="OPTIMIZERS = {'another': str}", three="")
    assert builtin("optimizer") == {"another": str, "one": int}


def test_a_name_defined_twice_is_refused(package):
    package(one="OPTIMIZERS = {'mine': int}", two="OPTIMIZERS = {'mine': str}")
    with pytest.raises(PluginError, match="optimizer 'mine' is defined twice in plugins_under_test"):
        builtin("optimizer")


def test_a_factory_gets_the_settings_that_it_names():
    optimizer = build("optimizer", "dp-sgd", {"lr": 0.5, "momentum": 0.25, "rho": 3, "delta": 1e-5})
    assert optimizer == DPSGD(lr=0.5, momentum=0.25)
    assert build("clipping", "flat", {"clip_norm": 2}) == FlatClipping(clip_norm=2)


def test_a_setting_that_is_missing_is_named():
    with pytest.raises(
        PluginError,
        match=r"optimizer='dp-sgd' needs 'lr', .* give it: optimizer_args = \"lr = VALUE\" .*, or a default",
    ):
        build("optimizer", "dp-sgd", {"rho": 1})


def test_variadic_parameters_need_no_setting(file):
    path = file("def mine(lr, *args, **kwargs):\n    return lr, args, kwargs\n")
    assert build("optimizer", f"{path}:mine", {"lr": 1, "rho": 2}) == (1, (), {})


def test_an_error_of_the_factory_is_its_own():
    with pytest.raises(ValueError, match=r"lr=-1 is not in \[0, inf\)"):
        build("optimizer", "dp-sgd", {"lr": -1})


def test_a_summary_is_the_first_line_without_its_full_stop():
    def documented():
        """Does this.

        And more.
        """

    assert summary(documented) == "Does this"
    assert summary(lambda: None) == ""


def test_arguments_fill_what_no_setting_does():
    assert build("optimizer", "dp-sgd", {"lr": 0.5}, "momentum = 0.25") == DPSGD(lr=0.5, momentum=0.25)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("momentun = 0.5", "optimizer='dp-sgd' takes no 'momentun'; did you mean momentum"),
        ("momentum 0.5", "optimizer_args='momentum 0.5' are no arguments .*write a = 1, b = 'text'"),
        ("momentum = 0.5} \n x = {", "are no arguments"),
        ("lr = 2", "optimizer_args='lr = 2': 'lr' is a setting of its own; set it as that"),
    ],
)
def test_arguments_that_lead_nowhere_say_where_they_might(arguments, message):
    with pytest.raises(PluginError, match=message):
        build("optimizer", "dp-sgd", {"lr": 0.5}, arguments)


@pytest.mark.parametrize(
    "name", ["FedAvg", "FedAvgM", "FedAdam", "FedYogi", "FedProx", "FedMedian", "FedTrimmedAvg", "Krum", "Bulyan"]
)
def test_a_stock_strategy_is_named_as_it_is(name):
    for written in (f"flwr.serverapp.strategy:{name}", name):
        assert type(build("strategy", written, {"num_rounds": 3})).__name__ == name
    assert listed("strategy")[name]


def test_arguments_reach_a_stock_strategy():
    assert build("strategy", "FedTrimmedAvg", {}, "beta = 0.3").beta == 0.3
    with pytest.raises(PluginError, match="'FedAdm' is not a built-in strategy; did you mean FedAdam"):
        load("strategy", "FedAdm")
    with pytest.raises(PluginError, match="not a built-in strategy"):
        load("strategy", "DifferentialPrivacyServerSideFixedClipping")
    words = r"""needs 'client_learning_rate', .*give it: strategy_args = "client_learning_rate = VALUE" \(--set """
    with pytest.raises(PluginError, match=words):
        build("strategy", "QFedAvg", {})
    with pytest.raises(PluginError, match="has no 'FedTrimedAvg'; did you mean FedTrimmedAvg"):
        load("strategy", "flwr.serverapp.strategy:FedTrimedAvg")


def test_a_models_own_word_may_be_one_of_the_settings():
    made = build("model", "torch.nn:Dropout", {"p": 0.0, "dropout_rate": 0.0}, "p = 0.25")
    assert made.p == 0.25


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise KeyError('writer')", r"model='.*mine.py:make' fails: KeyError: 'writer' \(mine.py, line 2\)"),
        ("return None", "is a NoneType, without 'named_parameters'; return a torch.nn.Module"),
        ("import torch; return torch.nn.Linear", "is the class Linear, without 'named_parameters'"),
    ],
)
def test_a_factory_that_fails_or_makes_something_else_is_one_line(tmp_path, body, said):
    (tmp_path / "mine.py").write_text(f"def make():\n    {body}\n")
    with pytest.raises(PluginError, match=said) as raised:
        required("model", "mine.py:make", build("model", f"{tmp_path}/mine.py:make", {}))
    assert "\n" not in str(raised.value)
