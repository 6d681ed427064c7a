"""Laplace noise on private numbers: its distribution, seeded and exact, what it is scaled to, and what is charged."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from fed_dpsat.accounting.event import LAPLACE, PrivacyEvent
from fed_dpsat.errors import SettingError
from fed_dpsat.step.clipping import AdaptiveClipping, FlatClipping
from fed_dpsat.step.clipping.l1 import L1Clipping
from fed_dpsat.step.gradients.per_example import clipped_gradient_sum
from fed_dpsat.step.loop import Streams, train_locally
from fed_dpsat.step.mechanism import LaplaceMechanism
from fed_dpsat.step.noise import standard_laplaces
from fed_dpsat.step.optimizers import DPSGD
from fed_dpsat.step.optimizers.zeroth_order import ZerothOrder
from fed_dpsat.step.sampling import PoissonSampler
from fed_dpsat.step.secure_laplace import add_laplace_on_grid, rounded_laplace
from fed_dpsat.step.secure_noise import GRID_BITS, system_generator
from fed_dpsat.step.subspace import direction
from fed_dpsat.testing.problems import step_info

COUNT = 20_000


def mechanism(noise_multiplier=2.0, clip_norm=0.5, expected_batch_size=4.0):
    return LaplaceMechanism(
        noise_multiplier=noise_multiplier, clip_norm=clip_norm, expected_batch_size=expected_batch_size
    )


def fits(z, scale=1.0):
    return stats.kstest(z, stats.laplace(scale=scale).cdf).pvalue


def test_seeded_noise_is_laplace_of_the_scale():
    z = standard_laplaces(np.random.default_rng(0), COUNT).numpy()
    assert fits(z) > 0.01
    assert all(fits(z, scale) < 1e-4 for scale in (0.9, 1.1, math.sqrt(0.5)))
    assert stats.kstest(z, stats.norm(scale=math.sqrt(2)).cdf).pvalue < 1e-6
    assert abs(np.corrcoef(z[:-1], z[1:])[0, 1]) < 5 / math.sqrt(COUNT)
    assert abs(float((z > 0).mean()) - 0.5) < 5 * 0.5 / math.sqrt(COUNT)


def test_the_mean_of_a_sum_has_noise_of_scale_z_c_over_the_batch():
    """The sum 3, clipped to 1/2, at z = 2: Laplace of scale 1 around 3, over 4."""
    total = {f"along.{k}": torch.tensor(3.0) for k in range(COUNT)}
    private = mechanism().privatize(total, np.random.default_rng(1))
    assert private.keys() == total.keys()
    assert {t.shape for t in private.values()} == {torch.Size(())}
    z = torch.stack(list(private.values())).numpy()
    assert fits(4 * z - 3) > 0.01
    assert fits(4 * z - 3, 1.1) < 1e-4
    assert mechanism().noise_std == pytest.approx(math.sqrt(2) / 4)
    assert z.std() == pytest.approx(math.sqrt(2) / 4, rel=0.05)
    assert float(total["along.0"]) == 3


def test_without_noise_it_is_the_mean():
    assert mechanism(0.0).privatize({"along": torch.tensor(6.0)}, np.random.default_rng(0)) == {"along": 1.5}


@pytest.mark.usefixtures("repeatable")
def test_whole_numbers_of_exact_noise_are_those_of_rounded_laplace_noise():
    """Scale 2: P(0) = 1 - e^(-1/4), P(k) = sinh(1/4) e^(-|k|/2), by a chi-square test that the discrete law fails."""
    generator = system_generator()
    drawn = np.array([rounded_laplace(2, generator) for _ in range(COUNT)])
    k = np.arange(-8, 9)
    seen = np.array([(drawn == i).sum() for i in k] + [(np.abs(drawn) > 8).sum()])

    def chance(law):
        return np.append(law, 1 - law.sum()) * COUNT

    rounded = np.where(k == 0, -np.expm1(-1 / 4), np.sinh(1 / 4) * np.exp(-np.abs(k) / 2))
    assert stats.chisquare(seen, chance(rounded)).pvalue > 1e-4
    assert stats.chisquare(seen, chance(np.tanh(1 / 4) * np.exp(-np.abs(k) / 2))).pvalue < 1e-4


@pytest.mark.usefixtures("repeatable")
def test_on_the_grid_results_are_multiples_of_it_and_noise_covers_what_rounding_adds():
    """z C = 1, two numbers: grid 2^-22, and a scale of 2 (C / grid + 2) steps or more."""
    generator, total = system_generator(), {"a": torch.tensor(0.3, dtype=torch.float64), "b": torch.tensor(-7.0)}
    grid, z = 2.0**-GRID_BITS, []
    for _ in range(4000):
        noisy = mechanism().privatize(total, generator)
        assert {name: t.dtype for name, t in noisy.items()} == {name: t.dtype for name, t in total.items()}
        steps = noisy["a"].item() * 4 / grid
        assert steps == round(steps)
        z.append(steps * grid - 0.3)
    assert fits(np.array(z)) > 1e-5
    assert fits(np.array(z), 1.4) < 1e-5
    scales = []

    def record(scale, generator):
        scales.append(scale)
        return 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fed_dpsat.step.secure_laplace.rounded_laplace", record)
        add_laplace_on_grid(total, noise_multiplier=2.0, clip_norm=0.5, generator=generator)
    assert scales == [2**GRID_BITS + 4] * 2


def test_gradients_of_parameters_are_refused():
    """Of a tensor clipping sees one norm: coordinates of L2 norm C have an L1 norm of up to sqrt(d) C."""
    for generator in (np.random.default_rng(0), system_generator()):
        with pytest.raises(SettingError, match=r"noise_distribution=.*weight\[2, 3\].*use optimizer=zeroth-order"):
            mechanism().privatize({"weight": torch.zeros(2, 3)}, generator)


def zeroth(directions=1):
    return ZerothOrder(base=DPSGD(lr=0.1), seed=0, steps_per_round=2, directions=directions)


def rounds(clipping, optimizer=None, **changes):
    optimizer = optimizer or zeroth(3)
    return train_locally(
        {"w": torch.zeros(20)},
        lambda indices: (torch.ones(len(indices), 20), torch.zeros(len(indices))),
        loss_fn=lambda p, x, y: x @ p["w"],
        optimizer=optimizer,
        state=optimizer.init({"w": torch.zeros(20)}),
        sampler=PoissonSampler(num_examples=8, sample_rate=0.5),
        clipping=clipping,
        mechanism=mechanism(),
        local_steps=2,
        streams=Streams(seed=0, client=0, round=1, **changes),
    )


@pytest.mark.parametrize("noise_source", ["seeded", "system"])
def test_a_round_is_charged_as_laplace(noise_source):
    result = rounds(L1Clipping(clip_norm=0.5), noise_source=noise_source)
    assert result.event == PrivacyEvent(noise_multiplier=2.0, sample_rate=0.5, steps=2, kind=LAPLACE)
    assert bool(result.params["w"].isfinite().all())
    assert not torch.equal(result.params["w"], torch.zeros(20))


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e8, math.inf])
def test_no_example_adds_more_than_the_clip_norm_in_l1(size):
    """Flat clipping would leave sqrt(5) times as much."""
    optimizer, params = zeroth(5), {"w": torch.zeros(20)}
    at = optimizer.query_point(params, optimizer.init(params), step_info())
    for worst in (*(direction(0, k, 20) for k in range(5)), sum(direction(0, k, 20) for k in range(5))):
        total, _ = clipped_gradient_sum(
            lambda p, x, y: x @ p["w"], at, ((size * worst)[None], torch.zeros(1)), L1Clipping(clip_norm=0.5)
        )
        found = torch.stack(list(total.values())).abs().sum()
        assert float(found) <= 0.5 * (1 + 1e-6)
        assert float(found) == pytest.approx(0 if math.isinf(size) else min(0.5, float(found)))


def test_a_rule_of_the_l2_norm_is_refused():
    """Also an adaptive one, whose count has Gaussian noise."""
    for rule in (FlatClipping(clip_norm=0.5), AdaptiveClipping(clip_norm=0.5, clip_quantile=0.5, clip_lr=0.2)):
        with pytest.raises(SettingError, match="a bound of the L1 norm, to which Laplace noise is scaled"):
            rounds(rule)


class OnlyL2:
    """A rule of somebody else, which bounds the L2 norm alone."""

    clip_norm = 0.5

    def factors(self, squared_norms):
        return FlatClipping(clip_norm=0.5).factors(squared_norms)


def test_a_rule_of_somebody_else_is_held_to_the_l1_norm():
    with pytest.raises(SettingError, match="one that keeps the bound"):
        rounds(OnlyL2())
    assert rounds(OnlyL2(), zeroth(1)).event.kind == LAPLACE  # of one number both norms are its size
