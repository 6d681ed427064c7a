"""A client's round with its strategy's half: an optimizer whose private gradients the half corrects.

The models of a client train one after the other in one loop, so all their steps are one event. Each model has a state
of the optimizer of its own, and the optimizer sees the schedule of a federation of that one model.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from fed_dpsat.client.half import ClientHalf, Finished, Received, Trained, check_finished
from fed_dpsat.errors import SettingError
from fed_dpsat.params import Params, zeros_like
from fed_dpsat.plugins import PluginError
from fed_dpsat.step.optimizers.base import PrivateOptimizer, State, StepInfo, check_space, next_round
from fed_dpsat.step.query import At, first_point

MODELS, KEPT = "models", "kept"
AT, BASE, SUM = "at", "base", "sum"


@dataclass(frozen=True, kw_only=True)
class OfHalf:
    """``base`` for each model of ``half`` in turn; ``first_step`` of the round, ``steps`` of each model.

    The state has, by model, where it is (``at``), the state of ``base``, and the sum of its private gradients; and what
    the half ``kept``, which does not change within a round.
    """

    base: PrivateOptimizer
    half: ClientHalf
    received: Received
    first_step: int
    steps: int

    def begin(self, kept: State, last: State | None) -> State:
        """The state before the first step; ``last`` has the states of ``base`` after the last round, by model."""
        starts = fresh(self.half).start(self.received, kept)
        self._check(starts)
        models = {}
        for i, start in enumerate(starts):
            begun = self.base.init(start) if last is None else next_round(self.base, start, last[str(i)])
            models[str(i)] = {AT: start, BASE: begun, SUM: zeros_like(start)}
        return {MODELS: models, KEPT: kept}

    def init(self, params: Params) -> State:
        """The state of a client's first round."""
        return self.begin({}, None)

    def query_point(self, params: Params, state: State, info: StepInfo) -> At:
        """Where ``base`` looks, for the model of this step."""
        model, own, _ = self._place(info)
        asked = self.base.query_point(params, state[MODELS][model][BASE], own)
        check_space("optimizer", type(self.base).__name__, params, first_point(asked))
        return asked

    def update(self, params: Params, private_gradient: Params, state: State, info: StepInfo) -> tuple[Params, State]:
        """The step of ``base`` with the corrected gradient; after the last one of a model, the start of the next."""
        model, own, last = self._place(info)
        before, half = state[MODELS][model], fresh(self.half)
        corrected = half.correct(int(model), private_gradient, params, self.received, state[KEPT])
        check_space("strategy", type(self.half).__name__, params, corrected)
        moved, after = self.base.update(params, corrected, before[BASE], own)
        total = {name: before[SUM][name] + g for name, g in private_gradient.items()}
        models = {**state[MODELS], model: {AT: moved, BASE: after, SUM: total}}
        following = models.get(str(int(model) + 1)) if last else None
        return (moved if following is None else following[AT]), {**state, MODELS: models}

    def finished(self, state: State) -> tuple[Finished, State]:
        """What the half sends and keeps after the last step, and the states of ``base`` by model."""
        trained = [
            Trained(params=one[AT], mean_gradient={name: total / self.steps for name, total in one[SUM].items()})
            for one in state[MODELS].values()
        ]
        done = fresh(self.half).finish(self.received, trained, state[KEPT])
        bases = {model: one[BASE] for model, one in state[MODELS].items()}
        return check_finished(self.half, self.received.params, done), bases

    def _place(self, info: StepInfo) -> tuple[str, StepInfo, bool]:
        """The model of a step, what ``base`` is told of it, and whether it is the last of that model."""
        model, step = divmod(info.index - self.first_step, self.steps)
        own = dataclasses.replace(info, index=(info.round - 1) * self.steps + step)
        return str(model), own, step == self.steps - 1

    def _check(self, starts: Sequence[Params]) -> None:
        like, name = self.received.params, type(self.half).__name__
        if len(starts) != self.half.models:
            raise PluginError(f"{name}.start gives {len(starts)} models, and it has models={self.half.models}")
        for start in starts:
            shapes = {key: p.shape for key, p in start.items()}
            if list(start) != list(like) or any(shapes[key] != p.shape for key, p in like.items()):
                raise PluginError(f"{name}.start gives {list(start)[:5]}, not the parameters of the global model")


def fresh(half: ClientHalf) -> ClientHalf:
    """A copy for one call, so that no attribute brings anything from one client to another."""
    return copy.deepcopy(half)


def steps_of_model(half: ClientHalf, steps: int) -> int:
    """The share of one model in the ``steps`` of a round; raises ``SettingError`` unless all have the same."""
    if steps % half.models:
        raise SettingError("steps", steps, f"a multiple of {half.models}, the models of the client's half", "send one")
    return steps // half.models
