"""Texts in a client's round: padding that follows from other examples would move the sum by more than a clip norm."""

import numpy as np
import pytest
import torch
from torch import nn

from fed_dpsat.accounting.plans import plan_of
from fed_dpsat.client.assignment import Assignment
from fed_dpsat.client.build import Experiment
from fed_dpsat.data.dataset import Dataset, Examples
from fed_dpsat.data.sequences import Sequences
from fed_dpsat.errors import SettingError
from fed_dpsat.params import trainable
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.step.clipping import FlatClipping
from fed_dpsat.step.gradients.per_example import ModelLoss
from fed_dpsat.step.loop import Streams, one_group, train_locally
from fed_dpsat.step.mechanism import GaussianMechanism
from fed_dpsat.step.optimizers.dpsgd import DPSGD
from fed_dpsat.step.sampling import PoissonSampler

CLIP_NORM = 0.1


class LastState(nn.Module):
    """Reads the last position, padding or not, as many recurrent models do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.layer, self.head = nn.Embedding(9, 6), nn.GRU(6, 6, batch_first=True), nn.Linear(6, 2)

    def forward(self, input_ids, attention_mask):
        return self.head(self.layer(3 * self.embedding(input_ids))[0][:, -1])


def texts(lengths):
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    values = torch.arange(int(offsets[-1])) * 5 % 9
    sequences = Sequences(values=values, offsets=offsets, max_length=64, vocabulary_size=9)
    return Examples(inputs={"input_ids": sequences}, labels=torch.arange(len(lengths)) % 2)


def clipped_sum(examples, groups):
    """The sum over all examples of their clipped gradients, as a round of noise 0 releases it."""
    count, params = len(examples), trainable(LastState())
    result = train_locally(
        params,
        examples.batch,
        groups=groups,
        loss_fn=ModelLoss(LastState()),
        optimizer=DPSGD(lr=float(count)),
        clipping=FlatClipping(clip_norm=CLIP_NORM),
        local_steps=1,
        state=DPSGD(lr=1.0).init(params),
        sampler=PoissonSampler(num_examples=count, sample_rate=1.0),
        mechanism=GaussianMechanism(noise_multiplier=0.0, clip_norm=CLIP_NORM, expected_batch_size=float(count)),
        streams=Streams(seed=0, client=0, round=1),
    )
    return torch.cat([(params[name] - p).flatten() for name, p in result.params.items()])


def moved_by_one(groups_of):
    """How far one long text more moves the sum over short ones, in clip norms."""
    few, more = texts([3, 5, 2, 7, 4]), texts([3, 5, 2, 7, 4, 60])
    return float((clipped_sum(more, groups_of(more)) - clipped_sum(few, groups_of(few))).norm()) / CLIP_NORM


def test_one_text_moves_a_sum_by_no_more_than_the_clip_norm():
    assert moved_by_one(lambda examples: examples.alike) <= 1 + 1e-5


def test_padding_to_the_longest_of_a_batch_would_move_it_further():
    assert moved_by_one(lambda _: one_group) > 1.5


def test_groups_change_no_gradient_of_an_example():
    examples = texts([3, 60, 14, 5])
    alone = sum(clipped_sum(examples.rows(torch.tensor([i])), examples.rows(torch.tensor([i])).alike) for i in range(4))
    torch.testing.assert_close(clipped_sum(examples, examples.alike), alone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("groups", [[[0, 1]], [[0, 1, 2], [2]], [[0, 1, 2, 3]]])
def test_groups_that_leave_out_or_repeat_an_example_are_refused(groups):
    with pytest.raises(SettingError, match="each of 3 examples once"):
        clipped_sum(texts([3, 5, 2]), lambda _: [torch.tensor(group) for group in groups])


def round_of(lengths):
    """The sum that client 0 of a run releases in a round of noise 0, of all its texts."""
    train, test = texts([*lengths, 3]), texts([3, 5])
    few = np.arange(len(lengths))
    config = RunConfig(
        num_clients=2, num_rounds=1, optimizer="dp-sgd", lr=float(len(lengths)), sample_rate=1.0, clip_norm=CLIP_NORM,
        private=False, target_epsilon=0.0,
    )  # fmt: skip
    experiment = Experiment.build(
        config,
        dataset=Dataset(name="made", train=train, test=test, class_names=("a", "b")),
        partition=[few, [len(lengths)]],
        model=LastState(),
    )
    before = experiment.shared(1)
    result = experiment.client_round(0, Assignment.of(plan_of(experiment.config), round=1), before, None)
    return torch.cat([(result.params[name] - p).flatten() for name, p in before.items()])


def test_the_round_of_a_client_pads_each_text_by_its_own_length():
    moved = round_of([3, 5, 2, 7, 4, 60]) - round_of([3, 5, 2, 7, 4])
    assert float(moved.norm()) / CLIP_NORM <= 1 + 1e-5
