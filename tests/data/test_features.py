"""Features in the place of inputs: computed once, from each example alone, by a frozen extractor that has a hash."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fed_dpsat.client.build import Experiment
from fed_dpsat.data import features
from fed_dpsat.data.dataset import Dataset, Examples
from fed_dpsat.data.extractor import check_extractor, normalised
from fed_dpsat.data.features import with_features
from fed_dpsat.data.federated import Federated
from fed_dpsat.data.sequences import Sequences
from fed_dpsat.errors import DataError, SettingError
from fed_dpsat.plugins import PluginError
from fed_dpsat.settings.config import RunConfig

MINE = """
import torch
from torch import nn

CALLS = []

def doubled(factor = 2.0):
    def extract(x):
        CALLS.append(len(x))
        return factor * x.flatten(1)
    return extract

def mean_token():
    def extract(input_ids, attention_mask):
        weights = attention_mask.float()
        padded = torch.full((len(input_ids), 1), float(input_ids.shape[1]))
        return torch.cat([(input_ids * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True), padded], 1)
    return extract

def network():
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).eval()
"""


def images(count=6, classes=2):
    """Images of 1 x 2 x 2; the first pixel of example i is i."""
    pixels = torch.zeros(count, 1, 2, 2, dtype=torch.uint8)
    pixels[:, 0, 0, 0] = torch.arange(count)
    train = Examples(inputs=pixels, mean=(0.5,), std=(0.25,), labels=torch.arange(count) % classes)
    return Dataset(name="images", train=train, test=train.rows(torch.arange(2)), class_names=("a", "b"))


@pytest.fixture
def mine(tmp_path):
    """A file with extractors, and a configuration that names one."""
    (tmp_path / "mine.py").write_text(MINE)

    def config(name="doubled", **changes):
        return RunConfig(
            features=f"{tmp_path}/mine.py:{name}",
            cache_dir=str(tmp_path / "cache"),
            num_clients=2,
            noise_multiplier=1.0,
            **changes,
        )

    return config


def cached(tmp_path):
    return sorted(folder.name for folder in (tmp_path / "cache").glob("images-features-*"))


def test_features_replace_the_inputs_and_pixels_are_from_0_to_1(mine):
    """By hand: pixel i / 255, doubled; the mean and std of the data set are for its own pixels."""
    found = with_features(images(), mine(), {})
    inputs, targets = found.train.batch(torch.arange(6))
    assert found.train.inputs.dtype == torch.float16
    assert inputs.dtype == torch.float32
    assert torch.allclose(inputs[:, 0], 2 * torch.arange(6) / 255, atol=1e-4)
    assert torch.equal(targets, torch.arange(6) % 2)
    assert found.train.mean == ()


def test_an_extractor_sees_each_example_once_and_the_rest_is_mapped(mine, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "ROWS", 4)
    config = mine()
    first = with_features(images(), config, {})
    (folder,) = cached(tmp_path)
    times = (tmp_path / "cache" / folder / "train.npy").stat().st_mtime_ns
    second = with_features(images(), config, {})
    assert cached(tmp_path) == [folder]
    assert (tmp_path / "cache" / folder / "train.npy").stat().st_mtime_ns == times
    assert np.array_equal(np.load(tmp_path / "cache" / folder / "train.npy"), first.train.inputs.numpy())
    assert torch.equal(first.train.inputs, second.train.inputs)


def test_other_data_arguments_normalisation_or_source_have_another_cache(mine, tmp_path):
    config = mine()
    other = images()
    other.test.inputs[0, 0, 1, 1] = 9
    with_features(images(), config, {})
    with_features(other, config, {})
    with_features(images(), dataclasses.replace(config, features_args="factor = 3.0"), {})
    with_features(images(), dataclasses.replace(config, features_norm="unit"), {})
    (tmp_path / "mine.py").write_text(MINE + "# changed\n")
    with_features(images(), config, {})
    assert len(cached(tmp_path)) == 5


def test_weights_have_a_part_in_the_hash(mine):
    extractor = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.BatchNorm1d(3)).eval()
    config = dataclasses.replace(mine(), features="scattering")
    first = features.digest(config, extractor)
    with torch.no_grad():
        extractor[2].running_mean += 1
    assert features.digest(config, extractor) != first
    assert features.digest(config, extractor.double()) != first


def test_a_run_records_the_hash_and_refuses_another_extractor(mine):
    config = dataclasses.replace(mine("network"), features_norm="unit")
    experiment = Experiment.build(config, dataset=images())
    sha256 = experiment.config.features_sha256
    assert len(sha256) == 64
    assert experiment.dataset.features == sha256
    assert json.loads(experiment.same["features"]) == sha256
    again = Experiment.build(dataclasses.replace(config, features_sha256=sha256), dataset=images())
    assert again.fingerprint == experiment.fingerprint
    with pytest.raises(SettingError, match=r"features_sha256='0' is not .*restore the extractor"):
        with_features(images(), dataclasses.replace(config, features_sha256="0"), {})


def test_code_that_an_extractor_imports_and_that_changed_is_noticed(mine, tmp_path):
    config = mine()
    with_features(images(), config, {})
    (folder,) = cached(tmp_path)
    stored = tmp_path / "cache" / folder / "looked_at.npy"
    np.save(stored, np.load(stored) * np.float16(1.5))
    with pytest.raises(DataError, match=r"has other features than the extractor gives now.*delete that folder"):
        with_features(images(), config, {})


class Centred(nn.Module):
    """A wrong extractor: it takes the mean of the batch away."""

    def forward(self, x):
        return (x - x.mean(0)).flatten(1)


class Counting(nn.Module):
    """A wrong extractor: it counts its calls, and adds the count."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x):
        self.count += 1
        return x.flatten(1) + self.count


class Averaging(nn.Module):
    """A wrong extractor: it follows a mean of what it sees, as BatchNorm does, and gives it to nobody."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running", torch.zeros(1))

    def forward(self, x):
        self.running.lerp_(x.mean(), 0.1)
        return x.flatten(1)


def dropping(x):
    return nn.functional.dropout(x.flatten(1), 0.5)


@pytest.mark.parametrize(
    ("extractor", "says"),
    [
        (Centred().eval(), r"other features without the examples beside it \(by .*\); compute each example by itself"),
        (Counting().eval(), "other features a second time .*; draw and count nothing"),
        (dropping, "other features a second time"),
        (Averaging().eval(), "changes 'running' in a call"),
        (nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4)), r"is in training mode \(itself\); return it after .eval\(\)"),
        (nn.Sequential(nn.Flatten(), nn.Dropout(0.5).train()).eval().append(nn.Dropout()), r"training mode \(2\)"),
    ],
    ids=["mean-of-batch", "counts", "draws", "changes", "trains", "part-trains"],
)
def test_an_extractor_that_is_not_frozen_or_mixes_examples_is_refused(extractor, says):
    looked_at = dataclasses.replace(images().train, inputs=torch.rand(6, 1, 2, 2))
    with pytest.raises(PluginError, match=f"^features='mine' .*{says}"):
        check_extractor("mine", extractor, looked_at)


def test_a_network_in_evaluation_mode_passes():
    looked_at = dataclasses.replace(images().train, inputs=torch.rand(6, 1, 2, 2))
    check_extractor("mine", nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Dropout()).eval(), looked_at)


@pytest.mark.parametrize(
    ("extractor", "says"),
    [
        (lambda x: x.flatten(), r"gives torch.float32 \[24\] for 6 examples; return numbers"),
        (lambda x: x.flatten(1).argmax(1, keepdim=True), r"gives torch.int64 \[6, 1\]"),
        (lambda x: [x], "gives a list"),
        (lambda x: x @ torch.ones(3), "fails: RuntimeError: size mismatch"),
    ],
)
def test_what_is_no_features_is_refused(extractor, says):
    with pytest.raises(DataError, match=f"^features='mine' {says}"):
        check_extractor("mine", extractor, images().train)


@pytest.mark.parametrize(
    ("value", "says"),
    [(torch.nan, "NaN or infinite"), (torch.inf, "NaN or infinite"), (7e4, "as large as 7e.04, above 65504")],
)
def test_a_number_that_float16_does_not_have_is_refused_with_its_row(mine, value, says, tmp_path):
    data = images()
    inputs = data.train.inputs.float()
    inputs[3, 0, 1, 1] = value
    wrong = dataclasses.replace(data, train=dataclasses.replace(data.train, inputs=inputs))
    config = dataclasses.replace(mine(), features_args="factor = 1.0")
    with pytest.raises(DataError, match=f"of row 3 of the train split are {says}"):
        with_features(wrong, config, {})
    assert cached(tmp_path) == []


def test_texts_are_arguments_by_name_and_have_no_padding_of_others(mine):
    """By hand: the mean of the tokens, and the padded length of the text alone: 8 for 2 tokens and 12 for 9."""
    values, offsets = torch.tensor([1, 3, *range(9)]), torch.tensor([0, 2, 11])
    text = Sequences(values=values, offsets=offsets, vocabulary_size=10, padding=0, max_length=16)
    split = Examples(inputs={"input_ids": text}, labels=torch.tensor([0, 1]))
    texts = Dataset(name="some/texts", train=split, test=split, class_names=("a", "b"))
    found = with_features(texts, mine("mean_token"), {})
    assert found.train.inputs.tolist() == [[2.0, 8.0], [4.0, 12.0]]


def test_labels_of_tokens_need_their_tokens(mine):
    text = Sequences(
        values=torch.tensor([1, 2]), offsets=torch.tensor([0, 1, 2]), vocabulary_size=4, padding=0, max_length=4
    )
    split = Examples(inputs={"input_ids": text}, labels=None)
    with pytest.raises(DataError, match="labels belong to tokens"):
        with_features(Dataset(name="texts", train=split, test=split), mine(), {})


def test_group_norm_is_that_of_torch_and_of_each_example():
    x = torch.rand(3, 54, 2, 2)
    found = normalised(x, "group", 27)
    assert torch.equal(found, nn.GroupNorm(27, 54, affine=False)(x))
    assert torch.allclose(normalised(x[1:2], "group", 27), found[1:2])
    assert torch.allclose(normalised(x, "unit", 1).flatten(1).norm(dim=1), torch.ones(3))
    with pytest.raises(SettingError, match="features_groups=5 is not a divisor of 54"):
        normalised(x, "group", 5)
    with pytest.raises(SettingError, match="features_groups=4 is not a divisor of 4"):
        normalised(torch.rand(3, 4), "group", 4)


def test_an_example_of_zeros_has_no_direction():
    assert torch.equal(normalised(torch.zeros(2, 3), "unit", 1), torch.zeros(2, 3))


def test_the_same_example_has_the_same_features_whoever_is_beside_it(tmp_path):
    """A neighbouring data set, with one example less, changes no other features: not a bit of them."""
    config = RunConfig(features="scattering", cache_dir=str(tmp_path), noise_multiplier=1.0, features_norm="group")
    whole = Federated.build(config).dataset
    raw = Federated.build(dataclasses.replace(config, features="", features_norm="")).dataset
    others = torch.arange(1, len(raw.train))
    without = with_features(dataclasses.replace(raw, train=raw.train.rows(others)), config, {})
    assert whole.input_shape == (81, 2, 2)
    assert torch.equal(without.train.inputs, whole.train.inputs[others])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"features_args": "scales = 1"}, "features_args='scales = 1' is not possible without features"),
        ({"features_norm": "group"}, "features_norm='group' is not possible without features"),
        ({"features": "scattering", "features_groups": 9}, "features_groups=9 is not possible with features_norm=''"),
        ({"features": "scattering", "features_norm": "batch"}, "features_norm='batch' is not one of"),
    ],
)
def test_settings_of_an_absent_extractor_are_refused(changes, says):
    with pytest.raises(SettingError, match=says):
        RunConfig(noise_multiplier=1.0, **changes)


def test_an_unknown_extractor_and_argument_are_refused_with_near_names(tmp_path):
    config = RunConfig(noise_multiplier=1.0, features="scatering", cache_dir=str(tmp_path))
    with pytest.raises(PluginError, match="features='scatering' is not a built-in features; did you mean scattering"):
        Federated.build(config)
    with pytest.raises(PluginError, match="takes no 'scale'; did you mean scales"):
        Federated.build(dataclasses.replace(config, features="scattering", features_args="scale = 2"))


def test_the_examples_of_a_relative_path_are_beside_its_file(tmp_path):
    (tmp_path / "a.toml").write_text('features = "mine.py:doubled"\nnoise_multiplier = 1.0\n')
    assert RunConfig.load(Path(tmp_path / "a.toml")).features == f"{tmp_path}/mine.py:doubled"
