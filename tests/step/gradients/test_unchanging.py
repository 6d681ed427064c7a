"""A module that writes into itself is refused by name, before the start; what only remembers is not."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from fed_dpsat import plugins
from fed_dpsat.data._torchvision import torchvision_datasets
from fed_dpsat.errors import ModelError
from fed_dpsat.step.gradients.unchanging import check_unchanging, unchanged

X = torch.randint(2, (2, 3), generator=torch.Generator().manual_seed(0)).float()


def checked(module, inputs):
    """``check_unchanging`` with zeros and ones swapped in between."""
    check_unchanging(module, inputs, 1 - inputs)


def bits(module):
    return {n: t.clone() for n, t in [*module.named_parameters(), *module.named_buffers()]}


class With(nn.Module):
    """A linear layer; ``step(self, x)`` says what a pass does beside."""

    def __init__(self, step, **kept):
        super().__init__()
        self.inner = nn.Linear(3, 2)
        self.step = step
        for name, value in kept.items():
            if isinstance(value, torch.Tensor):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, x):
        extra = self.step(self, x)
        return self.inner(x) + (0 if extra is None else extra)


def running_mean(m, x):
    m.mean.mul_(0.9).add_(0.1 * x.mean())


def running_mean_of_data(m, x):
    m.mean.data.mul_(0.9).add_(0.1 * x.mean())


def replaced(m, x):
    m.mean = m.mean + x.mean()


def in_training_alone(m, x):
    if m.training:
        m.mean += x.mean()


def in_evaluation_alone(m, x):
    if not m.training:
        m.mean += 1


def counts(m, x):
    m.calls += 1


def counts_in_a_list(m, x):
    m.calls[0] += 1


def writes_a_weight(m, x):
    m.inner.weight.data.clamp_(-1e-3, 1e-3)


def carries_a_hidden_state(m, x):
    before, m.hidden = m.__dict__.get("hidden", 0), x.mean().view(1, 1)
    return before


def behind_an_object(m, x):
    m.step.calls = getattr(m.step, "calls", 0) + 1
    return 0.1 * m.step.calls


@pytest.mark.parametrize(
    ("made", "named"),
    [
        (lambda: With(running_mean, mean=torch.zeros(1)), "changes mean in a pass in training mode"),
        (lambda: With(running_mean_of_data, mean=torch.zeros(1)), "changes mean in"),
        (lambda: With(replaced, mean=torch.zeros(1)), "changes mean in"),
        (lambda: With(in_training_alone, mean=torch.zeros(1)), "changes mean in a pass in training mode"),
        (lambda: With(in_evaluation_alone, mean=torch.zeros(1)), "changes mean in a pass in evaluation mode"),
        (lambda: With(counts, calls=0), "changes calls in"),
        (lambda: nn.Sequential(nn.Linear(3, 3), With(counts, calls=torch.tensor(0))), r"changes 1\.calls in"),
        (lambda: nn.Sequential(With(counts_in_a_list, calls=[0])), r"changes 0\.calls in"),
        (lambda: With(writes_a_weight), r"changes inner\.weight in"),
        (lambda: With(carries_a_hidden_state), "keeps something from pass to pass"),
        (lambda: With(behind_an_object), "keeps something from pass to pass"),
        (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2)), r"weight\.0\._u.*weight_norm"),
        (lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(3, 2))), r"changes 0\.weight_u.*weight_norm"),
    ],
)
def test_what_a_pass_changes_is_refused_by_name_and_put_back(made, named):
    torch.manual_seed(0)
    module = made().train()
    before, calls = bits(module), getattr(module, "calls", None)
    with pytest.raises(ModelError, match=named) as refused:
        checked(module, X)
    assert "\n" not in str(refused.value)
    after = bits(module)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], before[n]) for n in after)
    assert isinstance(calls, torch.Tensor) or getattr(module, "calls", None) == calls


def keeps_what_it_saw(m, x):
    m.seen = x


def builds_a_table_once(m, x):
    if m.table is None or m.size < x.shape[1]:
        m.size = x.shape[1]
        m.table = torch.arange(float(m.size))[None, :2]
    return m.table


def registers_a_mask_once(m, x):
    if not hasattr(m, "mask"):
        m.register_buffer("mask", torch.ones(2), persistent=False)
    return m.mask


def draws(m, x):
    return random.random() + torch.rand(1)


@pytest.mark.parametrize(
    "made",
    [
        lambda: With(keeps_what_it_saw),
        lambda: With(builds_a_table_once, table=None, size=0),
        lambda: With(registers_a_mask_once),
        lambda: With(draws),
        lambda: With(lambda m, x: None, mean=torch.full((2,), float("nan"))),
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.GroupNorm(2, 4), nn.Linear(4, 2)),
        lambda: nn.utils.weight_norm(nn.Linear(3, 2)),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)),
        lambda: nn.utils.parametrizations.orthogonal(nn.Linear(3, 2)),
    ],
)
def test_what_stays_or_only_remembers_passes(made):
    module = made()
    module[0].eval() if isinstance(module, nn.Sequential) else None
    modes = [part.training for part in module.modules()]
    state, drawn = random.getstate(), torch.get_rng_state()
    checked(module, X)
    assert [part.training for part in module.modules()] == modes
    assert random.getstate() == state
    assert torch.equal(torch.get_rng_state(), drawn)


SHAPES = {"linear": (3,), "mlp": (3,), "dpnasnet-fashion-mnist": (1, 28, 28)}


@pytest.mark.parametrize("name", sorted(plugins.builtin("model").keys() - {"gpt", "gru"}))
def test_every_model_of_the_library_passes(name):
    shape = SHAPES.get(name, (3, 32, 32))
    module = plugins.build("model", name, {"input_shape": shape, "num_classes": 10})
    checked(module, torch.ones(2, *shape))


@pytest.mark.slow
def test_networks_of_torchvision_pass():
    torchvision_datasets()  # imports it, also beside another build of torch
    import torchvision.models

    normed = {"norm_layer": lambda channels: nn.GroupNorm(1, channels)}
    checked(torchvision.models.resnet18(**normed), torch.ones(1, 3, 32, 32))
    tiny = torchvision.models.VisionTransformer(32, 16, 1, 2, 8, 16)
    checked(tiny, torch.ones(2, 3, 32, 32))


def test_what_examples_change_and_made_up_ones_do_not_is_caught_and_put_back():
    def step(m, x):
        if x.max() > 2:
            m.mean += x.max()

    module = With(step, mean=torch.zeros(1))
    checked(module, X)
    with unchanged(module):
        module(X)
    with pytest.raises(ModelError, match="changes mean while it trained"), unchanged(module):
        module(5 * torch.ones(1, 3))
    assert float(module.mean) == 0
    with pytest.raises(ModelError, match=r"changes inner\.weight while"), torch.no_grad(), unchanged(module):
        module.inner.weight.add_(1)
    with pytest.raises(ModelError, match="changes mean while"), unchanged(module):
        module(5 * torch.ones(1, 4))  # whose shape does not fit, after the buffer was written
    assert float(module.mean) == 0
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), unchanged(module):
        module(torch.ones(1, 4))
