"""A run for deployment: nobody predicts its coins and noise, and no low bit of a release tells what the sum was."""

import copy
import math
import os
import pickle
import random
import secrets
from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from randomgen import AESCounter, ChaCha
from scipy import stats

from fed_dpsat.errors import SettingError
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.simulation import simulate
from fed_dpsat.step import secure_noise
from fed_dpsat.step.clipping import FlatClipping
from fed_dpsat.step.loop import Streams, train_locally
from fed_dpsat.step.mechanism import GaussianMechanism, normals_like
from fed_dpsat.step.noise import NOISE_SOURCES, derive_generator, standard_normals
from fed_dpsat.step.optimizers.dpsgd import DPSGD
from fed_dpsat.step.sampling import PoissonSampler
from fed_dpsat.step.secure_noise import GRID_BITS, add_noise_on_grid, std_and_grid, system_generator

SUM = {"w": torch.zeros(100, 120), "b": torch.zeros(12_000)}
MECHANISM = GaussianMechanism(noise_multiplier=2.0, clip_norm=0.5, expected_batch_size=20)
STD = 2.0 * 0.5 / 20
SYSTEM = Streams(seed=1, client=2, round=3, noise_source="system")


def words(generator, n=4):
    return tuple(generator.integers(2**64, size=n, dtype=np.uint64).tolist())


# The generator.


def test_no_two_generators_agree():
    drawn = [words(system_generator()) for _ in range(500)]
    assert len(set(drawn)) == 500
    assert len({word for four in drawn for word in four}) == 2000


def test_each_takes_256_bits_of_the_operating_system(monkeypatch):
    taken = []
    monkeypatch.setattr(secrets, "randbits", lambda k: taken.append(k) or random.getrandbits(k))
    for _ in range(3):
        system_generator()
    assert sum(taken) == 3 * 256


def test_global_seeds_are_neither_read_nor_moved():
    drawn = set()
    for _ in range(2):
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
        generator = system_generator()
        drawn.add(words(generator))
        generator.standard_normal(9)
        assert random.getstate() == before[0]
        assert (np.random.get_state()[1] == before[1]).all()
        assert torch.equal(torch.get_rng_state(), before[2])
    assert len(drawn) == 2


@pytest.mark.parametrize("counter", [0, 1, 2**64 - 20, 2**128 - 5])
def test_aes_is_that_of_openssl(counter):
    """Carries included: the counter starts anywhere in its 128 bits."""
    key = secrets.token_bytes(16)
    drawn = AESCounter(key=int.from_bytes(key, "little"), counter=counter).random_raw(128)
    openssl = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    blocks = [openssl.update(((counter + i) % 2**128).to_bytes(16, "little")) for i in range(64)]
    assert drawn.astype("<u8").tobytes() == b"".join(blocks)


def test_chacha_is_that_of_openssl():
    key = secrets.token_bytes(32)
    drawn = ChaCha(key=int.from_bytes(key, "little"), rounds=20).random_raw(1024)
    openssl = Cipher(algorithms.ChaCha20(key, bytes(16)), None).encryptor()
    assert drawn.astype("<u8").tobytes() == openssl.update(bytes(8 * 1024))


def without_aes_instructions(monkeypatch):
    class Tables:
        use_aesni = False

        def __init__(self, **key):
            pass

    monkeypatch.setattr(secure_noise, "AESCounter", Tables)


def test_without_aes_instructions_it_is_chacha20(monkeypatch):
    without_aes_instructions(monkeypatch)
    first, second = system_generator(), system_generator()
    assert type(first.bit_generator) is ChaCha
    assert first.bit_generator.state["state"]["rounds"] == 20
    assert words(first) != words(second)


@pytest.mark.parametrize("duplicate", [pickle.dumps, copy.copy, copy.deepcopy, lambda g: g.spawn(1)])
def test_it_cannot_be_duplicated(duplicate):
    with pytest.raises(TypeError, match="SystemGenerator"):
        duplicate(system_generator())


def drawn_by_child_and_parent(generator):
    """What each draws after ``os.fork``."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(write, repr(words(generator)).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        theirs = pipe.read()
    os.waitpid(child, 0)
    assert theirs
    return theirs, repr(words(generator))


def test_a_fork_does_not_share_noise():
    generator = system_generator()
    generator.integers(2**32, dtype=np.uint32)  # leaves half a word in the buffer
    theirs, ours = drawn_by_child_and_parent(generator)
    assert theirs != ours
    assert drawn_by_child_and_parent(generator)[0] != theirs


def test_a_fork_does_not_share_noise_without_aes_instructions(monkeypatch):
    without_aes_instructions(monkeypatch)
    theirs, ours = drawn_by_child_and_parent(system_generator())
    assert theirs != ours


def test_without_a_new_key_a_fork_would(monkeypatch):
    wrong = np.random.Generator(AESCounter(key=secrets.randbits(128)))
    theirs, ours = drawn_by_child_and_parent(wrong)
    assert theirs == ours


# The noise.


def noise_of(mechanism, generator=None):
    return mechanism.privatize(SUM, generator or system_generator())


@pytest.mark.usefixtures("repeatable")
def test_noise_of_the_declared_size(looks_gaussian):
    assert looks_gaussian(noise_of(MECHANISM).values(), STD)


@pytest.mark.usefixtures("repeatable")
@pytest.mark.parametrize("off", [0.9, 0.95, 1.05, 1.1])
def test_another_sigma_is_noticed(off, looks_gaussian):
    broken = replace(MECHANISM, noise_multiplier=off * MECHANISM.noise_multiplier)
    assert not looks_gaussian(noise_of(broken).values(), STD)


@pytest.mark.usefixtures("repeatable")
@pytest.mark.parametrize("divisor", [1, 4])
def test_a_sum_of_four_that_is_not_halved_is_noticed(divisor, looks_gaussian):
    generator = system_generator()
    wrong = sum(generator.standard_normal(24_000) for _ in range(4)) * STD / divisor
    assert not looks_gaussian([wrong], STD)
    assert looks_gaussian([wrong * divisor / 2], STD)


@pytest.mark.usefixtures("repeatable")
def test_coordinates_tensors_steps_and_generators_are_independent(looks_gaussian):
    generator = system_generator()
    first, second, other = noise_of(MECHANISM, generator), noise_of(MECHANISM, generator), noise_of(MECHANISM)
    for a, b in ((first, second), (first, other)):
        assert looks_gaussian([(a[name] + b[name]) / 2**0.5 for name in SUM], STD)
    assert looks_gaussian([(n["w"].flatten() + n["b"]) / 2**0.5 for n in (first, second)], STD)
    flat = torch.cat([n.flatten() for n in (*first.values(), *second.values())])
    assert looks_gaussian([(flat[1:] + flat[:-1])[::2] / 2**0.5], STD)


def test_shapes_types_and_the_sum_itself_are_kept(same_bits):
    total = {
        "w": torch.ones(2, 3, dtype=torch.float64),
        "t": torch.ones(4, 5).T,
        "scale": torch.tensor(0.0),
        "none": torch.zeros(0, 3),
        "half": torch.ones(2, dtype=torch.bfloat16),
    }
    before = {name: t.clone() for name, t in total.items()}
    private = MECHANISM.privatize(total, system_generator())
    assert {n: (t.shape, t.dtype) for n, t in private.items()} == {n: (t.shape, t.dtype) for n, t in total.items()}
    for name in total:
        assert torch.equal(total[name], before[name])
    assert private["scale"] != 0


def test_without_noise_the_sum_is_left_alone(same_bits):
    silent = GaussianMechanism(noise_multiplier=0, clip_norm=math.inf, expected_batch_size=3)
    total = {"w": torch.tensor([0.1, 1e-30])}
    assert same_bits(silent.privatize(total, system_generator()), {"w": total["w"] / 3})


@dataclass
class Fixed:
    """A generator that draws what it is told."""

    normals: list

    def standard_normal(self, size):
        assert size == len(self.normals)
        return np.array(self.normals)


def test_by_hand():
    """sigma * C = 1: the grid is 2^-22, and both the sum and the noise are rounded to it, each on its own."""
    grid = 2.0**-GRID_BITS
    total = {"w": torch.tensor([0.4, 0.4, 7.0], dtype=torch.float64) * grid}
    generator = Fixed([0.3 * grid, 2.6 * grid, -3 * grid])
    noisy = add_noise_on_grid(total, noise_multiplier=2.0, clip_norm=0.5, generator=generator)
    assert (noisy["w"] / grid).tolist() == [0, 3, 4]


# Floating point: two neighbouring sums must not be told apart by where their releases can lie.

N = 400_000


def float32_normals(total):
    return total + standard_normals(derive_generator(0, purpose="noise"), N)


def opacus_secure_mode(total):
    """The sum of four normals over 2, as in opacus/optimizers/optimizer.py."""
    generator = torch.Generator().manual_seed(0)
    return total + sum(torch.normal(0.0, 1.0, (N,), generator=generator) for _ in range(4)) / 2


def sum_that_is_not_rounded(total):
    return (
        add_noise_on_grid({"w": total * 0}, noise_multiplier=1, clip_norm=1, generator=system_generator())["w"] + total
    )


def on_the_grid(total):
    return add_noise_on_grid({"w": total}, noise_multiplier=1, clip_norm=1, generator=system_generator())["w"]


def proofs(release, ours, other):
    """The share of small releases of the sum ``ours`` that no release of ``other`` could be: off its lattice of
    floats. The sums are such that a small release of ``other`` is a difference of floats of its size, so exact.
    """
    spacing = torch.finfo(torch.float32).eps * other / 2
    small = [y[y.abs() < other / 4].double() / spacing for y in (release(torch.full((N,), s)) for s in (ours, other))]
    mine, theirs = ((y != y.round()).double().mean().item() for y in small)
    return mine if theirs == 0 else 0.0


def test_a_float32_sampler_proves_what_the_sum_was():
    assert proofs(float32_normals, 0.0, 1.0) > 0.3


def test_the_sum_of_four_gaussians_still_does():
    assert proofs(opacus_secure_mode, 0.0, 1.0) > 0.1


def test_the_grid_does_not():
    assert proofs(on_the_grid, 0.0, 1.0) == 0


def test_the_mechanism_adds_a_systems_noise_on_the_grid_and_no_other():
    total = {"w": torch.full((N,), 0.3, dtype=torch.float64)}
    mechanism = GaussianMechanism(noise_multiplier=1.0, clip_norm=1.0, expected_batch_size=1)
    off = [
        float((released != released.round()).double().mean())
        for generator in (system_generator(), derive_generator(0, purpose="noise"))
        for released in [mechanism.privatize(total, generator)["w"] * 2.0**GRID_BITS]
    ]
    assert off[0] == 0
    assert off[1] > 0.9


def steps_off_the_grid(release, total):
    steps = release(torch.full((N,), total, dtype=torch.float64)).double() * 2.0**GRID_BITS
    return (steps != steps.round()).double().mean().item()


@pytest.mark.usefixtures("repeatable")
@pytest.mark.parametrize("total", [0.0, 1.0, 0.3, 1 / 3, 2.0**-40, -5e8 / 3])
def test_every_release_is_on_the_grid_and_its_low_bits_are_even(total):
    steps = on_the_grid(torch.full((N,), total, dtype=torch.float64)) * 2.0**GRID_BITS
    assert torch.equal(steps, steps.round())
    counts = torch.bincount(torch.remainder(steps, 16).long(), minlength=16)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4


def test_a_sum_that_is_not_rounded_before_the_noise_is_noticed():
    assert steps_off_the_grid(sum_that_is_not_rounded, 0.3) > 0.9
    assert steps_off_the_grid(on_the_grid, 0.3) == 0


@pytest.mark.parametrize("sigma", [0.3, 1.0, 7.0])
@pytest.mark.parametrize("clip_norm", [0.1, 1.0, 2.0])
@pytest.mark.parametrize("size", [1, 400, 10**6])
def test_the_noise_is_scaled_to_the_sensitivity_of_the_rounded_sum(sigma, clip_norm, size):
    std, grid = std_and_grid(sigma, clip_norm, size)
    assert sigma * clip_norm * 2.0 ** -(GRID_BITS + 1) < grid <= sigma * clip_norm * 2.0**-GRID_BITS
    assert math.log2(grid).is_integer()
    assert std == pytest.approx(sigma * (clip_norm + grid * size**0.5), rel=1e-12)


def test_rounding_takes_two_sums_further_apart_than_the_clip_norm_but_not_further_than_the_noise_covers():
    """A step of C = 1 in 10,000 equal parts of 41943.04 grid steps: from 0.48, each is rounded to 41944."""
    size, silent = 10_000, Fixed([0.0] * 10_000)
    std, grid = std_and_grid(1.0, 1.0, size)
    pair = [torch.full((size,), x, dtype=torch.float64) for x in (0.48 * grid, 0.48 * grid + 1 / size**0.5)]
    low, high = (add_noise_on_grid({"w": s}, noise_multiplier=1, clip_norm=1, generator=silent)["w"] for s in pair)
    distance = float((high - low).norm())
    assert distance == pytest.approx(41944 * grid * 100)
    assert 1 < distance <= std


# Runs.


def gradient_free(params, inputs, targets):
    return inputs[:, 0] * 0 + 0 * params["b"].sum()


def train(streams, **settings):
    params = {"b": torch.zeros(500)}
    optimizer = DPSGD(lr=1.0)
    return train_locally(
        params,
        lambda indices: (torch.zeros(len(indices), 1), torch.zeros(len(indices))),
        loss_fn=gradient_free,
        optimizer=optimizer,
        state=optimizer.init(params),
        sampler=PoissonSampler(num_examples=8, sample_rate=0.5),
        clipping=FlatClipping(clip_norm=1.0),
        mechanism=GaussianMechanism(noise_multiplier=1.0, clip_norm=1.0, expected_batch_size=4),
        local_steps=2,
        streams=streams,
        engine="vmap",
    ).params["b"]


@pytest.mark.usefixtures("repeatable")
def test_system_training_is_not_reproducible_and_seeded_training_is():
    a, b = train(SYSTEM), train(SYSTEM)
    assert not (a == b).any()
    assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 5 / len(a) ** 0.5
    seeded = replace(SYSTEM, noise_source="seeded")
    assert torch.equal(train(seeded), train(seeded))


def test_seeded_noise_is_the_one_it_always_was(same_bits):
    total = {name: torch.rand_like(t) for name, t in SUM.items()}
    normals, private = normals_like(total, derive_generator(5, purpose="noise")), {}
    for name, t in total.items():
        private[name] = torch.add(t, normals[name], alpha=1.0) / 20
    assert same_bits(MECHANISM.privatize(total, derive_generator(5, purpose="noise")), private)


@pytest.mark.parametrize("purpose", ["sampling", "noise"])
def test_coins_and_noise_are_of_the_system(purpose):
    first, second = (SYSTEM.generator(purpose) for _ in range(2))
    assert isinstance(first, secure_noise.SystemGenerator)
    assert words(first) != words(second)
    assert not isinstance(replace(SYSTEM, noise_source="seeded").generator(purpose), secure_noise.SystemGenerator)


@pytest.mark.usefixtures("repeatable")
def test_batches_are_poisson_and_never_the_same():
    sampler = PoissonSampler(num_examples=2000, sample_rate=0.1)
    batches = [list(sampler.batches(10, SYSTEM.generator("sampling"))) for _ in range(2)]
    assert not any(torch.equal(a, b) for a, b in zip(*batches, strict=True))
    sizes = sum(len(batch) for run in batches for batch in run)
    assert stats.binomtest(sizes, 20 * 2000, 0.1).pvalue > 1e-4
    assert stats.binomtest(sizes, 20 * 2000, 0.11).pvalue < 1e-4


def test_what_is_public_stays_seeded():
    """The model's first weights and the cohort are shared, not secret."""
    assert words(SYSTEM.generator("model")) == words(replace(SYSTEM, noise_source="seeded").generator("model"))
    assert SYSTEM.torch_seed() == replace(SYSTEM, noise_source="seeded").torch_seed()


def test_a_source_that_is_none_is_refused():
    with pytest.raises(SettingError, match=r"^noise_source='sytem' is not one of seeded, system; "):
        replace(SYSTEM, noise_source="sytem")


def test_the_setting_offers_the_sources_that_there_are():
    setting = next(f for f in fields(RunConfig) if f.name == "noise_source")
    assert tuple(setting.metadata["choices"]) == tuple(NOISE_SOURCES)
    assert setting.default == "seeded"
    assert {name: source.reproducible for name, source in NOISE_SOURCES.items()} == {"seeded": True, "system": False}
    for name, source in NOISE_SOURCES.items():
        assert source.description.startswith(f"{name}: ")
        assert "\n" not in source.description
    assert "not private" in NOISE_SOURCES["seeded"].description


@pytest.mark.parametrize("source", NOISE_SOURCES)
def test_a_run_says_where_its_noise_is_from(source, tmp_path, same_bits):
    config = RunConfig(noise_source=source, noise_multiplier=1.0, num_clients=2, num_rounds=1)
    said, models = [], []
    for folder in (tmp_path / "a", tmp_path / "b"):
        said.append(simulate(config, folder)["noise"])
        models.append(torch.load(folder / "checkpoint" / "model.pt", weights_only=True)["params"])
    assert said == [NOISE_SOURCES[source].description] * 2
    assert same_bits(*models) == NOISE_SOURCES[source].reproducible


def test_sums_of_several_clients_have_the_grid_and_the_deviation_of_one(monkeypatch):
    """Each sum has the sensitivity of its own coordinates: C + grid * sqrt(d), with the d of one client."""
    sizes = []
    monkeypatch.setattr(secure_noise, "std_and_grid", lambda z, c, size: sizes.append(size) or std_and_grid(z, c, size))
    sums = {"w": torch.zeros(5, 3, 4), "b": torch.zeros(5, 4)}
    how = {"noise_multiplier": 1.0, "clip_norm": 1.0, "generator": system_generator()}
    add_noise_on_grid(sums, clients=5, **how)
    add_noise_on_grid({name: t[0] for name, t in sums.items()}, **how)
    assert sizes == [16, 16]
