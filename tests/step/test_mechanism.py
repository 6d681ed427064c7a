import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from fed_dpsat.accounting.event import PrivacyEvent
from fed_dpsat.errors import SettingError
from fed_dpsat.step.mechanism import GaussianMechanism

SUM = {"w": torch.zeros(100, 120), "b": torch.zeros(12_000)}
MECHANISM = GaussianMechanism(noise_multiplier=2.0, clip_norm=0.5, expected_batch_size=20)
STD = 2.0 * 0.5 / 20


def noise_of(mechanism, seed=0):
    """What becomes of a zero sum: an empty batch."""
    return mechanism.privatize(SUM, np.random.default_rng(seed))


@dataclass(frozen=True, kw_only=True)
class NoiseOnTheMean(GaussianMechanism):
    """Wrong: sigma * C on the mean; too much noise, a broken method."""

    def privatize(self, clipped_sum, generator):
        mean = {name: t / 20 for name, t in clipped_sum.items()}
        return replace(MECHANISM, expected_batch_size=1).privatize(mean, generator)


@dataclass(frozen=True, kw_only=True)
class RealisedBatch(GaussianMechanism):
    """Wrong: divides by the 30 examples that came."""

    def privatize(self, clipped_sum, generator):
        return replace(MECHANISM, expected_batch_size=30).privatize(clipped_sum, generator)


@dataclass(frozen=True, kw_only=True)
class SkipsEmpty(GaussianMechanism):
    """Wrong: no noise where there is no data."""

    def privatize(self, clipped_sum, generator):
        if not any(t.any() for t in clipped_sum.values()):
            return clipped_sum
        return super().privatize(clipped_sum, generator)


@dataclass(frozen=True, kw_only=True)
class Uniform(GaussianMechanism):
    """Wrong: the right variance, another distribution."""

    def privatize(self, clipped_sum, generator):
        half = STD * 3**0.5
        return {name: torch.from_numpy(generator.uniform(-half, half, t.shape)) for name, t in clipped_sum.items()}


def test_by_hand_without_noise(same_bits):
    mechanism = replace(MECHANISM, noise_multiplier=0)
    private = mechanism.privatize({"w": torch.tensor([20.0, -5.0])}, np.random.default_rng(0))
    assert same_bits(private, {"w": torch.tensor([1.0, -0.25])})


def test_noise_of_the_sum_divided_by_the_expected_batch(looks_gaussian):
    assert looks_gaussian(noise_of(MECHANISM).values(), STD)


@pytest.mark.parametrize("off", [0.9, 0.95, 1.05, 1.1])
def test_another_sigma_is_noticed(off, looks_gaussian):
    broken = replace(MECHANISM, noise_multiplier=off * MECHANISM.noise_multiplier)
    assert not looks_gaussian(noise_of(broken).values(), STD)


@pytest.mark.parametrize("broken", [NoiseOnTheMean, RealisedBatch, SkipsEmpty, Uniform])
def test_a_broken_mechanism_is_noticed(broken, looks_gaussian):
    mechanism = broken(noise_multiplier=2.0, clip_norm=0.5, expected_batch_size=20)
    assert not looks_gaussian(noise_of(mechanism).values(), STD)


@pytest.mark.parametrize("shift", [-0.05, 0.05])
def test_a_mean_that_is_not_zero_is_noticed(shift, looks_gaussian):
    assert not looks_gaussian([n + shift * STD for n in noise_of(MECHANISM).values()], STD)


def test_coordinates_tensors_and_steps_are_independent(looks_gaussian):
    """The sum of k independent draws has sqrt(k) times their deviation; of k shared ones, k times."""
    generator = np.random.default_rng(0)
    first, second = (MECHANISM.privatize(SUM, generator) for _ in range(2))
    steps = [(first[name] + second[name]) / 2**0.5 for name in SUM]
    assert looks_gaussian(steps, STD)
    tensors = [(n["w"].flatten() + n["b"]) / 2**0.5 for n in (first, second)]
    assert looks_gaussian(tensors, STD)
    flat = torch.cat([n.flatten() for n in (*first.values(), *second.values())])
    assert looks_gaussian([(flat[1:] + flat[:-1])[::2] / 2**0.5], STD)


def test_shared_noise_is_noticed(looks_gaussian):
    again = [noise_of(MECHANISM, seed=3) for _ in range(2)]
    assert not looks_gaussian([(again[0][name] + again[1][name]) / 2**0.5 for name in SUM], STD)


def test_the_noise_does_not_depend_on_the_sum():
    full = {name: torch.full_like(t, 3.0) for name, t in SUM.items()}
    private, noise = MECHANISM.privatize(full, np.random.default_rng(0)), noise_of(MECHANISM)
    for name in SUM:
        torch.testing.assert_close(private[name] - noise[name], full[name] / 20, rtol=0, atol=1e-6)


def test_shapes_types_and_the_sum_itself_are_kept(same_bits):
    total = {"w": torch.ones(2, 3, dtype=torch.float64), "b": torch.ones(1)}
    before = {name: t.clone() for name, t in total.items()}
    private = MECHANISM.privatize(total, np.random.default_rng(0))
    assert {n: (t.shape, t.dtype) for n, t in private.items()} == {n: (t.shape, t.dtype) for n, t in total.items()}
    assert same_bits(total, before)


def test_a_parameter_that_is_one_number():
    private = MECHANISM.privatize({"scale": torch.tensor(0.0)}, np.random.default_rng(0))
    assert private["scale"].shape == ()
    assert private["scale"] != 0


def test_equal_generators_give_equal_noise(same_bits):
    assert same_bits(noise_of(MECHANISM), noise_of(MECHANISM))
    assert not same_bits(noise_of(MECHANISM), noise_of(MECHANISM, seed=1))


def test_no_bound_and_no_noise():
    mechanism = GaussianMechanism(noise_multiplier=0, clip_norm=math.inf, expected_batch_size=2)
    assert mechanism.privatize({"w": torch.tensor([4.0])}, np.random.default_rng(0))["w"] == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("noise_multiplier", -1),
        ("noise_multiplier", math.nan),
        ("noise_multiplier", math.inf),
        ("clip_norm", 0),
        ("clip_norm", -1),
        ("clip_norm", math.nan),
        ("clip_norm", math.inf),
        ("expected_batch_size", 0),
        ("expected_batch_size", -1),
        ("expected_batch_size", math.nan),
        ("expected_batch_size", math.inf),
    ],
)
def test_what_makes_no_mechanism_is_refused_by_name(name, value):
    """``clip_norm=inf`` among them: there is noise to be scaled."""
    with pytest.raises(SettingError, match=rf"^{name}=.* is not .*; "):
        replace(MECHANISM, **{name: value})


def test_the_event_says_what_ran():
    event = MECHANISM.event(sample_rate=0.01, steps=7)
    assert event == PrivacyEvent(noise_multiplier=2.0, sample_rate=0.01, steps=7)
    assert event.kind == "poisson_gaussian"
