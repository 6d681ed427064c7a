"""Which examples of which persons a step takes, and that a person adds one clipped gradient."""

from __future__ import annotations

import tracemalloc
from collections import Counter

import numpy as np
import pytest
import torch

from fed_dpsat.accounting.event import PrivacyEvent
from fed_dpsat.errors import DataError, SettingError
from fed_dpsat.step.clipping import FlatClipping
from fed_dpsat.step.draws import Draws, step_key
from fed_dpsat.step.loop import Streams, bundles_alike, train_locally
from fed_dpsat.step.mechanism import GaussianMechanism
from fed_dpsat.step.persons import Persons
from fed_dpsat.step.sampling import PoissonSampler
from fed_dpsat.step.views import Views
from fed_dpsat.testing.problems import Watching, prescribed

USERS = np.array([4, 7, 4, 4, 9, 7, 4, 4, 9, 4])  # six of 4, two of 7, two of 9
ROWS = torch.randn(10, 6, generator=torch.Generator().manual_seed(0))
C = 0.5


def draws(step=0):
    return lambda places: Draws(key=step_key(b"k" * 16, step), ids=places.numpy())


def given(persons, drawn, step=0):
    """By person, their places of a weight above 0, and the weights."""
    found = []
    for places, bundles in persons.chosen(torch.as_tensor(drawn), draws(step)):
        for row, weights in zip(places.view(bundles.weights.shape).tolist(), bundles.weights.tolist(), strict=True):
            found.append(([p for p, w in zip(row, weights, strict=True) if w], [w for w in weights if w]))
            assert len({*USERS[row]}) == 1  # also those of weight 0 are their own
    return found


def private_gradient(users=USERS, rows=ROWS, most=3, persons=None, sampler=None, **how):
    """The clipped sum of a step over all persons, without noise, and its event."""
    persons = Persons.of(users, most=most) if persons is None else persons
    watching = Watching()
    result = train_locally(
        {"w": torch.zeros(rows[0].numel())},
        lambda places: (rows[places], torch.zeros(len(places))),
        loss_fn=lambda params, x, y: prescribed(params, x.flatten(1), y),
        optimizer=watching,
        clipping=FlatClipping(clip_norm=C),
        local_steps=1,
        sampler=sampler or PoissonSampler(num_examples=len(persons), sample_rate=1.0),
        mechanism=GaussianMechanism(noise_multiplier=0.0, clip_norm=C, expected_batch_size=1.0),
        state={},
        streams=Streams(seed=1, client=0, round=1),
        persons=persons,
        **how,
    )
    return watching.released[0]["w"], result.event


def test_a_person_gives_all_examples_or_as_many_as_may_be():
    persons = Persons.of(USERS, most=4)
    assert len(persons) == 3
    by_size = sorted(given(persons, [0, 1, 2]), key=len)
    small = [(places, weights) for places, weights in by_size if len(places) == 2]
    assert sorted(places for places, _ in small) == [[1, 5], [4, 8]]
    assert all(weights == [0.5, 0.5] for _, weights in small)
    ((places, weights),) = [one for one in by_size if len(one[0]) == 4]
    assert {*places} < {0, 2, 3, 6, 7, 9}
    assert len({*places}) == 4
    assert weights == [0.25] * 4


def test_the_sum_has_weights_of_one():
    persons = Persons.of(USERS, most=4, gradient="sum")
    assert {w for _, weights in given(persons, [0, 1, 2]) for w in weights} == {1.0}


def test_each_example_of_a_person_is_taken_equally_often():
    persons = Persons.of(USERS, most=2)
    times = Counter(place for step in range(600) for places, _ in given(persons, [0], step) for place in places)
    assert {*times} == {0, 2, 3, 6, 7, 9}
    assert all(abs(count - 200) < 60 for count in times.values())  # 5 standard deviations


def test_a_choice_follows_from_the_own_list_alone():
    """Others who are drawn, or who have other lists, change nothing; a step does."""
    persons = Persons.of(USERS, most=2)
    (alone,) = given(persons, [0])
    assert alone in given(persons, [0, 1, 2])
    others = USERS.copy()
    others[others == 9] = 7
    assert alone in given(Persons.of(others, most=2), [0, 1])
    assert any(given(persons, [0], step) != [alone] for step in range(1, 6))


@pytest.mark.parametrize("size", [1, 3, 128])
def test_a_persons_mean_is_clipped_once(size):
    users = np.array([0, 0, 1, 1, 1, 2, 2, 2, 2, 2])
    found, event = private_gradient(users, most=8, physical_batch_size=size)
    means = [ROWS[np.flatnonzero(users == user)].mean(0) for user in range(3)]
    assert torch.allclose(found, sum(m * min(1, C / float(m.norm())) for m in means), atol=1e-6)
    assert event == PrivacyEvent(noise_multiplier=0.0, sample_rate=1.0, steps=1, kind="poisson_gaussian_users")
    assert event.privacy_unit == "user"


@pytest.mark.parametrize("gradient", ["mean", "sum"])
def test_a_person_adds_no_more_than_the_clip_norm(gradient):
    users, rows = np.array([0, 0, 1, 1, 1, 1, 1, 1, 1, 1]), ROWS.clone()
    rows[2:] = 3.0
    with_one, without = (
        private_gradient(rows=rows[:n], persons=Persons.of(users[:n], most=5, gradient=gradient))[0] for n in (10, 2)
    )
    assert float((with_one - without).norm()) == pytest.approx(C, rel=1e-5)


def test_nobody_drawn_is_a_step():
    persons = Persons.of(USERS, most=2)
    ((places, bundles),) = persons.chosen(torch.zeros(0, dtype=torch.int64), draws())
    assert (len(places), len(bundles.weights)) == (0, 0)


def test_rows_of_a_person_are_padded_to_the_longest_of_their_own():
    """Bundles are together if the longest of their rows are alike; no other person has a part in a length."""
    lengths = torch.tensor([8, 16, 8, 24, 8, 8, 8, 8, 16, 8])

    def groups(places):
        return [torch.nonzero(lengths[places] == length)[:, 0] for length in lengths[places].unique()]

    persons = Persons.of(USERS, most=8)
    seen = []
    for places, bundles in persons.chosen(torch.arange(3), draws()):
        for some, few in bundles_alike(groups, places, bundles):
            longest = lengths[some].view(few.weights.shape).amax(1)
            assert len(longest.unique()) == 1
            seen += [(int(USERS[row[0]]), int(longest[0])) for row in some.view(few.weights.shape)]
    assert sorted(seen) == [(4, 24), (7, 16), (9, 16)]


def test_views_of_persons():
    images = torch.rand(10, 1, 6, 6)
    plain = private_gradient(rows=images, most=8)[0]
    viewed = private_gradient(rows=images, most=8, views=Views(count=3, augmentation="flip"))[0]
    assert 2 * C < float(viewed.norm()) <= 3 * C * (1 + 1e-5)
    assert not torch.allclose(plain, viewed)
    assert torch.allclose(plain.view(6, 6).sum(1), viewed.view(6, 6).sum(1), rtol=0.1)  # mirrored, and clipped anew


@pytest.mark.parametrize(
    ("offsets", "places"), [([0, 2, 2], [0, 1]), ([0, 1, 2], [1, 1]), ([0], []), ([0, 1], [0, 1]), ([0, 2], [0, 2])]
)
def test_refuses_persons_who_do_not_divide_the_examples(offsets, places):
    with pytest.raises(DataError):
        Persons(offsets=np.array(offsets), places=np.array(places, dtype=np.int64), most=1)


@pytest.mark.parametrize("wrong", [{"most": 0}, {"most": 1, "gradient": "median"}])
def test_refuses_other_settings(wrong):
    with pytest.raises(SettingError):
        Persons.of(USERS, **wrong)


def test_refuses_coins_for_examples():
    with pytest.raises(SettingError, match="one coin for each person"):
        private_gradient(sampler=PoissonSampler(num_examples=10, sample_rate=1.0))


def test_refuses_persons_of_another_class():
    class Own(Persons):
        pass

    with pytest.raises(SettingError, match="Own"):
        private_gradient(persons=Own.of(USERS, most=2))


@pytest.mark.slow
def test_ten_million_persons():
    """A step has memory for those who are drawn alone."""
    persons = Persons.of(np.repeat(np.arange(10**7), 2), most=1)
    drawn = PoissonSampler(num_examples=len(persons), sample_rate=1e-4).sample(np.random.default_rng(0))
    tracemalloc.start()
    ((places, bundles),) = persons.chosen(drawn, draws())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(bundles.weights) == len(drawn) == len(places)
    assert peak < 1000 * len(drawn)
