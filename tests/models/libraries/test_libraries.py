"""Names of other libraries' networks: which prefix leads where, and what is refused before anything is built."""

import sys

import pytest

from fed_dpsat.errors import ModelError
from fed_dpsat.models.libraries import DOWNLOADS, LIBRARIES, files_of
from fed_dpsat.plugins import PluginError, build, libraries, load, summary

IMAGE = {"input_shape": (3, 8, 8), "num_classes": 4}


def test_each_prefix_says_what_it_leads_to():
    assert libraries("model") == LIBRARIES
    assert all(f"{prefix}:" in summary(of_library) for prefix, of_library in LIBRARIES.items())


@pytest.mark.parametrize("prefix", LIBRARIES)
def test_a_prefix_wins_over_a_module_of_that_name(prefix, monkeypatch):
    monkeypatch.setitem(sys.modules, prefix, None)  # as one that is not installed
    extra = "text" if prefix == "transformers" else "vision"
    with pytest.raises(
        ModelError, match=rf"model='{prefix}:x': {prefix} is not installed; pip install \"fed_dpsat\[{extra}\]\""
    ):
        load("model", f"{prefix}:x")


def test_a_library_that_does_not_import_says_why(tmp_path, monkeypatch):
    (tmp_path / "timm.py").write_text("import a_module_that_is_nowhere")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [m for m in sys.modules if m.partition(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ModelError, match=r"timm cannot be imported .*a_module_that_is_nowhere"):
        load("model", "timm:x")


def test_other_kinds_have_no_libraries(monkeypatch):
    assert libraries("optimizer") == {}
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(PluginError, match="cannot import 'timm'"):
        load("optimizer", "timm:x")


def test_a_module_of_a_library_is_named_as_before():
    assert load("model", "torch.nn:Linear").__name__ == "Linear"


@pytest.mark.parametrize("argument", sorted(DOWNLOADS))
def test_nothing_is_downloaded(argument, torchvision):
    with pytest.raises(ModelError, match=rf"model_args has '{argument}', and a run downloads nothing .*start_from"):
        build("model", "torchvision:resnet18", IMAGE, f"{argument} = 'x'")


@pytest.mark.parametrize("name", ["linear", "timm:resnet18", "torchvision:resnet18", "torch.nn:Linear", "transformers"])
def test_only_a_folder_of_transformers_is_a_file(name):
    assert files_of(name) == {}


def test_the_configuration_is_the_file_of_a_folder(tmp_path):
    assert files_of(f"transformers:{tmp_path}") == {"config.json": tmp_path.resolve() / "config.json"}
