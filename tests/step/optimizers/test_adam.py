"""Private Adam: torch's without noise, and with the noise taken out of the second moment where there is some."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from fed_dpsat.accounting.event import PrivacyEvent
from fed_dpsat.accounting.plans import make_plans
from fed_dpsat.client.assignment import Assignment
from fed_dpsat.client.build import Experiment
from fed_dpsat.client.train import Request
from fed_dpsat.errors import SettingError
from fed_dpsat.params import trainable
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.step.clipping import AdaptiveClipping, FlatClipping
from fed_dpsat.step.loop import Streams, train_locally
from fed_dpsat.step.mechanism import GaussianMechanism
from fed_dpsat.step.optimizers.adam import SQUARE, Adam
from fed_dpsat.step.optimizers.dpsat import DPSAT
from fed_dpsat.step.sampling import PoissonSampler
from fed_dpsat.testing.problems import quadratic, step_info

PARAMS = {"a": torch.tensor([1.0], dtype=torch.float64), "b": torch.tensor([2.0], dtype=torch.float64)}
CONFIG = RunConfig(optimizer="adam", lr=0.01, noise_multiplier=2.0, num_clients=4, local_steps=3)
ASSIGNMENT = Assignment(round=1, event=PrivacyEvent(noise_multiplier=2.0, sample_rate=0.5, steps=3))


def test_by_hand():
    """Noise of 1, gradients (3, 1), betas 1/2: m_hat = g and v_hat = (9, 1) after one step; less 1 that is (8, 0),
    and the floor of 1/4 keeps b from dividing by 0: steps of lr * 3 / sqrt(8) and lr * 1 / (1/2).

    Then gradients (1, -1): m_hat = (1/2 * 3/2 + 1/2 * 1) / (3/4) = (5/3, -1/3); v_hat = (1/2 * 9/2 + 1/2) / (3/4)
    = (11/3, 1), less 1 (8/3, 0).
    """
    optimizer = Adam(lr=0.1, beta1=0.5, beta2=0.5, eps=1e-300, floor=0.25)
    state, info = optimizer.init(PARAMS), step_info(noise_std=1.0)
    assert optimizer.query_point(PARAMS, state, info) is PARAMS
    one = {"a": torch.tensor([3.0]).double(), "b": torch.tensor([1.0]).double()}
    params, state = optimizer.update(PARAMS, one, state, info)
    assert params["a"].item() == pytest.approx(1 - 0.1 * 3 / math.sqrt(8))
    assert params["b"].item() == pytest.approx(2 - 0.1 * 1 / 0.5)
    before = [p.item() for p in params.values()]
    two = {"a": torch.tensor([1.0]).double(), "b": torch.tensor([-1.0]).double()}
    params, state = optimizer.update(params, two, state, info)
    assert params["a"].item() == pytest.approx(before[0] - 0.1 * (5 / 3) / math.sqrt(8 / 3))
    assert params["b"].item() == pytest.approx(before[1] - 0.1 * (-1 / 3) / 0.5)


def test_against_an_oracle(walk, vectors):
    """Tang et al. 2024, in numpy, where noise grows from step to step as with adaptive clipping."""
    optimizer = Adam(lr=0.05, beta1=0.8, beta2=0.95, floor=0.2, weight_decay=0.1)
    stds = np.linspace(0.1, 1.5, 50)

    class Told(Adam):
        def update(self, params, private_gradient, state, info):
            std = torch.tensor(stds[info.index])
            return super().update(params, private_gradient, state, dataclasses.replace(info, noise_std=std))

    seen = walk(Told(**dataclasses.asdict(optimizer)), vectors)
    w, m, v, s = vectors[0], 0.0, 0.0, 0.0
    floors = 0
    for t, gradient in enumerate(vectors[1:], 1):
        gradient = gradient + 0.1 * w
        m, v = 0.8 * m + 0.2 * gradient, 0.95 * v + 0.05 * gradient**2
        s = 0.95 * s + 0.05 * stds[t - 1] ** 2
        m_hat, v_hat, s_hat = m / (1 - 0.8**t), v / (1 - 0.95**t), s / (1 - 0.95**t)
        floors += int((v_hat - s_hat < 0.2 * s_hat).sum())
        w = w - 0.05 * m_hat / (np.sqrt(np.maximum(v_hat - s_hat, 0.2 * s_hat)) + 1e-8)
        np.testing.assert_allclose(seen[t - 1][1], w, rtol=1e-10)
    assert 0 < floors < 150


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_without_noise_it_is_the_adam_of_torch(weight_decay, walk, vectors):
    leaf = torch.from_numpy(vectors[0].copy()).requires_grad_()
    theirs = torch.optim.Adam([leaf], lr=0.03, betas=(0.7, 0.98), weight_decay=weight_decay)
    seen = walk(Adam(lr=0.03, beta1=0.7, beta2=0.98, weight_decay=weight_decay), vectors)
    for gradient, (_, ours, _) in zip(vectors[1:], seen, strict=True):
        leaf.grad = torch.from_numpy(gradient.copy())
        theirs.step()
        np.testing.assert_allclose(ours, leaf.detach().numpy(), rtol=1e-6, atol=1e-9)


def test_in_float32_too():
    params, generator = {"w": torch.ones(20)}, torch.Generator().manual_seed(0)
    leaf = params["w"].clone().requires_grad_()
    theirs, ours = torch.optim.Adam([leaf], lr=0.03), Adam(lr=0.03)
    state = ours.init(params)
    for _ in range(30):
        leaf.grad = torch.randn(20, generator=generator)
        params, state = ours.update(params, {"w": leaf.grad}, state, step_info())
        theirs.step()
    torch.testing.assert_close(params["w"], leaf.detach(), rtol=1e-5, atol=1e-6)


def test_the_correction_takes_out_the_noise_and_not_the_signal():
    """Gradients 2 + N(0, 1): v_hat is 5, less the noise 4. Without, steps are 2 / sqrt(5); with, 1 to 3 %."""
    steps, dimension = 400, 500
    noise = torch.Generator().manual_seed(0)
    for told, scale in ((1.0, 1.0), (0.0, 2 / math.sqrt(5))):
        optimizer = Adam(lr=1.0, beta1=0.99, beta2=0.99)
        params = {"w": torch.zeros(dimension)}
        state = optimizer.init(params)
        for _ in range(steps):
            before = params
            gradient = {"w": 2 + torch.randn(dimension, generator=noise)}
            params, state = optimizer.update(params, gradient, state, step_info(noise_std=told))
        assert float((before["w"] - params["w"]).mean()) == pytest.approx(scale, rel=0.03)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"beta1": 1.0}, r"beta1=1.0 is not in \[0, 1\)"),
        ({"beta2": -0.1}, "beta2=-0.1"),
        ({"beta2": math.nan}, "beta2=nan"),
        ({"eps": 0.0}, "eps=0.0 is not above 0"),
        ({"floor": 0.0}, "floor=0.0 is not above 0"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"lr_schedule": "none"}, "lr_schedule='none'"),
    ],
)
def test_settings_outside_their_bounds_are_refused(changes, says):
    with pytest.raises(SettingError, match=says):
        Adam(**{"lr": 0.1, **changes})


# what the loop tells


@dataclasses.dataclass(frozen=True, kw_only=True)
class Listening(Adam):
    """Keeps what it is told."""

    told: list = dataclasses.field(default_factory=list)

    def update(self, params, private_gradient, state, info):
        self.told.append(float(info.noise_std))
        return super().update(params, private_gradient, state, info)


def trained(optimizer, clipping, sigma=2.0, steps=5):
    rows = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    params = {"w": torch.zeros(3)}
    return train_locally(
        params,
        lambda indices: (rows[indices], torch.zeros(len(indices))),
        loss_fn=quadratic,
        optimizer=optimizer,
        state=optimizer.init(params),
        sampler=PoissonSampler(num_examples=40, sample_rate=0.5),
        clipping=clipping,
        mechanism=GaussianMechanism(noise_multiplier=sigma, clip_norm=clipping.clip_norm, expected_batch_size=20),
        local_steps=steps,
        streams=Streams(seed=0, client=0, round=1),
    )


def test_the_loop_tells_the_noise_of_the_mean():
    optimizer = Listening(lr=0.1)
    trained(optimizer, FlatClipping(clip_norm=0.5))
    assert optimizer.told == [2.0 * 0.5 / 20] * 5


def test_without_noise_it_tells_none_even_where_nothing_is_clipped():
    optimizer = Listening(lr=0.1)
    trained(optimizer, FlatClipping(clip_norm=math.inf), sigma=0.0)
    assert optimizer.told == [0.0] * 5


def test_with_adaptive_clipping_it_tells_that_of_each_step():
    """The gradient's noise multiplier is above the step's, since the count takes a share; times the C of that step."""
    clipping = AdaptiveClipping(clip_norm=0.5, clip_lr=0.5)
    of_gradient, _ = clipping.noise_multipliers(1.5, 20)
    assert of_gradient > 1.5
    bounds = [0.5]
    for steps in range(1, 5):
        bounds.append(float(trained(Listening(lr=0.1), clipping, sigma=1.5, steps=steps).clip_norm))
    optimizer = Listening(lr=0.1)
    trained(optimizer, clipping, sigma=1.5)
    assert optimizer.told == pytest.approx([of_gradient * bound / 20 for bound in bounds], rel=1e-6)
    assert len(set(optimizer.told)) == 5


def test_what_is_told_is_the_noise_that_is_there():
    """The second moment of what private gradients of zero leave, 4000 coordinates: the told variance within 5 %."""
    optimizer, params = Listening(lr=0.0), {"w": torch.zeros(4000)}
    result = train_locally(
        params,
        lambda indices: (torch.zeros(len(indices), 4000), torch.zeros(len(indices))),
        loss_fn=quadratic,
        optimizer=optimizer,
        state=optimizer.init(params),
        sampler=PoissonSampler(num_examples=10, sample_rate=0.5),
        clipping=FlatClipping(clip_norm=0.7),
        mechanism=GaussianMechanism(noise_multiplier=3.0, clip_norm=0.7, expected_batch_size=5),
        local_steps=4,
        streams=Streams(seed=0, client=0, round=1),
    )
    seen = float(result.state[SQUARE]["w"].mean()) / (1 - 0.999**4)
    assert seen == pytest.approx(optimizer.told[0] ** 2, rel=0.05)


# in a run


def test_a_step_is_one_event():
    experiment = Experiment.build(CONFIG)
    result = experiment.client_round(0, ASSIGNMENT, trainable(experiment.loss_fn.module), None)
    assert result.event == ASSIGNMENT.event == make_plans(CONFIG)[0].event


def test_clients_of_other_noise_train_together_as_they_do_alone():
    """Each is told its own: with the first one's noise the others would end elsewhere."""
    experiment = Experiment.build(dataclasses.replace(CONFIG, stack_clients=3))
    params = trainable(experiment.loss_fn.module)
    requests = [
        Request(
            client=c,
            assignment=dataclasses.replace(
                ASSIGNMENT, event=dataclasses.replace(ASSIGNMENT.event, noise_multiplier=0.1 + 4.0 * c)
            ),
            params=params,
            state=None,
        )
        for c in range(3)
    ]
    for request, result in zip(requests, experiment.client_rounds(requests), strict=True):
        alone = experiment.client_round(**vars(request))
        for name, p in alone.params.items():
            torch.testing.assert_close(result.params[name], p, rtol=1e-4, atol=1e-5)
        counts = [one.state["optimizer"]["count"]["noise"] for one in (result, alone)]
        assert torch.equal(*counts)


def test_it_keeps_its_moments_from_round_to_round():
    experiment = Experiment.build(CONFIG)
    assert experiment.carried_state() == {"count", "mean", "square"}
    params = trainable(experiment.loss_fn.module)
    first = experiment.client_round(0, ASSIGNMENT, params, None)
    second = experiment.client_round(0, dataclasses.replace(ASSIGNMENT, round=2), params, first.state)
    assert int(second.state["optimizer"]["count"]["steps"]) == 6


def test_dp_sat_climbs_over_adam():
    optimizer = Experiment.build(
        dataclasses.replace(
            CONFIG, optimizer="dp-sat", base_optimizer="adam", optimizer_args="beta2 = 0.9, floor = 0.5"
        )
    ).optimizer
    assert optimizer == DPSAT(base=Adam(lr=0.01, beta2=0.9, floor=0.5, total_steps=90), rho=0.03)
