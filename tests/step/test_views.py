"""Views of an image: which ones, that they follow from its own draws alone, and that their mean is bounded once."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from fed_dpsat.errors import SettingError
from fed_dpsat.params import global_norm
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.step.bundles import Bundles, Part
from fed_dpsat.step.clipping import FlatClipping
from fed_dpsat.step.draws import VIEWS, Draws
from fed_dpsat.step.gradients.per_example import clipped_gradient_sum
from fed_dpsat.step.loop import Member, Streams, train_locally
from fed_dpsat.step.mechanism import GaussianMechanism
from fed_dpsat.step.sampling import PoissonSampler
from fed_dpsat.step.stacked import Stacked, Unstackable
from fed_dpsat.step.views import AUGMENTATIONS, Views
from fed_dpsat.testing.problems import Watching, prescribed

C = 0.5
IMAGES = torch.rand(6, 2, 5, 6, generator=torch.Generator().manual_seed(0))
PARAMS = {"w": torch.zeros(2 * 5 * 6)}


def inner(params, inputs, targets):
    """The gradient of an example is its view."""
    return prescribed(params, inputs.flatten(1), targets)


def batches(images=IMAGES):
    return lambda places: (images[places], torch.zeros(len(places)))


def draws(*ids, key=b"k" * 16):
    return Draws(key=key, ids=np.array(ids))


def private_gradient(images=IMAGES, views=None, rate=1.0, clip_norm=C, **how):
    """The clipped sum of a step, without noise."""
    watching = Watching()
    sampler = PoissonSampler(num_examples=len(images), sample_rate=rate)
    mechanism = GaussianMechanism(noise_multiplier=0.0, clip_norm=clip_norm, expected_batch_size=1.0)
    train_locally(
        PARAMS,
        batches(images),
        loss_fn=inner,
        optimizer=watching,
        clipping=FlatClipping(clip_norm=clip_norm),
        local_steps=1,
        sampler=sampler,
        mechanism=mechanism,
        state={},
        streams=Streams(seed=1, client=0, round=1),
        views=views,
        **how,
    )
    return watching.released[0]["w"]


def expected_gradient(views, clip_norm=C):
    """By hand: the views of each example alone, their mean, clipped."""
    total = torch.zeros(60)
    for i, image in enumerate(IMAGES):
        mine = views.draws(Streams(seed=1, client=0, round=1).draws(0, torch.tensor([i])))
        mean = views.of(image[None], mine).flatten(1).mean(0)
        total += mean * min(1, clip_norm / float(mean.norm()))
    return total


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_a_view_is_a_crop_of_the_reflected_image(augmentation):
    most, mirrors = AUGMENTATIONS[augmentation]
    views = Views(count=40, augmentation=augmentation)
    images = torch.rand(1, 3, 9, 7)
    mine = views.draws(draws(3))
    words = mine.words(VIEWS, 3).astype(np.int64)
    padded = functional.pad(images, (most, most, most, most), mode="reflect") if most else images
    seen = set()
    for view, (down, right, mirrored) in zip(views.of(images, mine), words.tolist(), strict=True):
        down, right = ((word % (2 * most + 1)) for word in (down, right))
        crop = padded[0, :, down : down + 9, right : right + 7]
        if mirrors and mirrored % 2:
            crop = crop.flip(2)
        assert torch.equal(view, crop)
        seen.add((down, right, mirrors and mirrored % 2))
    assert len(seen) > (20 if most else 1)


def test_views_follow_from_an_example_alone():
    views = Views(count=3)
    together = views.of(IMAGES, views.draws(draws(*range(6))))
    alone = views.of(IMAGES[4:5], views.draws(draws(4)))
    assert torch.equal(together[12:15], alone)
    assert not torch.equal(views.of(IMAGES[4:5], views.draws(draws(5))), alone)
    assert not torch.equal(views.of(IMAGES[4:5], views.draws(draws(4, key=b"l" * 16))), alone)


def test_views_of_nothing():
    views = Views(count=3)
    (part,) = views.parts(Part((IMAGES[:0], torch.zeros(0)), draws()), 8)
    assert part.batch[0].shape == (0, 2, 5, 6)


@pytest.mark.parametrize("size", [1, 4, 7, 1000])
def test_the_mean_over_views_is_clipped_once(size):
    views = Views(count=4)
    assert torch.allclose(private_gradient(views=views, physical_batch_size=size), expected_gradient(views), atol=1e-6)


def test_an_example_adds_no_more_than_the_clip_norm():
    """That of all views, each clipped by itself, is above it: what a version would add that clips rows."""
    views = Views(count=4)
    more, fewer = private_gradient(views=views), private_gradient(IMAGES[:5], views=views)
    assert float((more - fewer).norm()) == pytest.approx(C, rel=1e-5)
    one = draws(5)
    rows = views.of(IMAGES[5:], views.draws(one)), torch.zeros(4)
    row_by_row, _ = clipped_gradient_sum(inner, PARAMS, rows, FlatClipping(clip_norm=C))
    assert float(global_norm(row_by_row)) > 1.5 * C


def test_views_of_a_persons_rows():
    """Bundles of two examples become bundles of all their views, with the weights of the examples."""
    views, weights = Views(count=3), torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.2, 0.8]])
    whole = Part((IMAGES, torch.zeros(6)), draws(*range(6)), Bundles(weights))
    found = torch.cat([part.bundles.weights for part in views.parts(whole, 6)])
    assert torch.allclose(found, weights.repeat_interleave(3, 1) / 3)
    assert len(list(views.parts(whole, 6))) == 3


@pytest.mark.parametrize("shape", [None, (4,), (3, 4, 8), (2, 8, 8, 8)])
def test_refuses_what_is_no_image(shape):
    with pytest.raises(SettingError, match="images"):
        Views(count=2).check(shape)


@pytest.mark.parametrize("wrong", [{"count": 0}, {"count": 2, "augmentation": "rotate"}])
def test_refuses_other_views(wrong):
    with pytest.raises(SettingError):
        Views(**wrong)


def test_refuses_views_of_another_class():
    class Own(Views):
        pass

    with pytest.raises(SettingError, match="Own"):
        private_gradient(views=Own(count=2))


def test_clients_with_views_train_alone():
    member = Member(
        batches=batches(),
        state={},
        sampler=PoissonSampler(num_examples=6, sample_rate=1.0),
        mechanism=GaussianMechanism(noise_multiplier=1.0, clip_norm=C, expected_batch_size=1.0),
        streams=Streams(seed=1, client=0, round=1),
        views=Views(count=2),
    )
    with pytest.raises(Unstackable, match="views"):
        Stacked(
            PARAMS,
            [member, dataclasses.replace(member)],
            loss_fn=inner,
            optimizer=Watching(),
            clipping=FlatClipping(clip_norm=C),
            local_steps=1,
            device=torch.device("cpu"),
            engine="auto",
            physical_batch_size=8,
            watched=False,
        )


def test_the_setting_names_all_views():
    spec = next(f for f in dataclasses.fields(RunConfig) if f.name == "augmentation")
    assert spec.metadata["choices"] == tuple(AUGMENTATIONS)
    with pytest.raises(SettingError, match="without views"):
        RunConfig(augmentation="flip", noise_multiplier=1.0)


def test_no_clipping_is_the_mean_of_views():
    views = Views(count=4)
    found = private_gradient(views=views, clip_norm=math.inf)
    assert torch.allclose(found, expected_gradient(views, math.inf), atol=1e-5)
