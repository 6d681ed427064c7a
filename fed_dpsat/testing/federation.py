"""A federation of eight clients whose replies a check prescribes, with a real ledger, strategy and grid."""

from __future__ import annotations

import gc
import inspect
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from fed_dpsat.accounting.event import PrivacyEvent
from fed_dpsat.accounting.ledger import PrivacyLedger
from fed_dpsat.accounting.plans import ClientPlan
from fed_dpsat.client.half import half_of, sent_by
from fed_dpsat.flower.grid import SimulationGrid
from fed_dpsat.flower.roster import Roster
from fed_dpsat.flower.strategy import PrivateStrategy
from fed_dpsat.flower.wire import records
from fed_dpsat.simulation.in_process import InProcessBackend
from fed_dpsat.testing.half import records_of

NUM_CLIENTS = 8
EVENT = PrivacyEvent(noise_multiplier=1.0, sample_rate=0.1, steps=2)
ROSTER = inspect.signature(Roster).parameters
PLAN = ClientPlan(target_epsilon=0.0, first_round=1, event=EVENT)

Model = Mapping[str, NDArray[Any]]
Move = Callable[[int, int, Model], Model]
"""``client, round, global model -> the client's model``."""
Tamper = Callable[[int, int, RecordDict], RecordDict]
"""``client, round, honest reply -> reply``."""


def start() -> Model:
    """Parameters of several shapes and types, including 0-d, float64 and integers."""
    return {
        "w": np.linspace(-1, 1, NUM_CLIENTS, dtype=np.float32),
        "matrix": np.linspace(0, 1, 6).reshape(3, 2),
        "scale": np.array(0.5, dtype=np.float32),
        "count": np.array(7, dtype=np.int64),
    }


def drift(client: int, round: int, model: Model) -> Model:
    """A random update for each client and round; integers stay."""
    generator = np.random.default_rng([client, round])
    return {n: (a if _whole(a) else a + 0.1 * generator.standard_normal(a.shape)) for n, a in model.items()}


def together(client: int, round: int, model: Model) -> Model:
    """The same update for all clients: plus 0.1 in each coordinate."""
    return {n: (a if _whole(a) else a + 0.1) for n, a in model.items()}


def still(client: int, round: int, model: Model) -> Model:
    """No update."""
    return model


def as_record(model: Model, like: Model | None = None) -> ArrayRecord:
    """The arrays as a record, in the types of ``like`` if given."""
    return ArrayRecord({n: Array(np.asarray(a, dtype=(like or model)[n].dtype)) for n, a in model.items()})


def as_model(arrays: ArrayRecord) -> Model:
    """The arrays by name."""
    return {name: array.numpy() for name, array in arrays.items()}


def client_app(
    reply: Callable[[int, RecordDict], RecordDict], identity: Callable[[int], int] = lambda client: client
) -> ClientApp:
    """Clients that answer a training message with ``reply(client, content)``, and say that they are ``identity``."""
    app = ClientApp()

    @app.query()
    def identify(message: Message, context: Context) -> Message:
        return Message(records.identity_content(identity(_client(context)), 1), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(reply(_client(context), message.content), reply_to=message)

    return app


class Federation:
    """``inner`` in a ``PrivateStrategy``; ``round()`` runs one round and returns the model after it.

    ``answered`` counts messages by (client, round); ``uncharged`` lists the messages before a charge. ``settings`` are
    arguments of ``Roster`` and ``PrivateStrategy``.
    """

    def __init__(
        self,
        inner: Strategy,
        *,
        move: Move = drift,
        tamper: Tamper | None = None,
        cohort_size: int = NUM_CLIENTS,
        model: Model | None = None,
        after: int = 0,
        ledger: PrivacyLedger | None = None,
        num_clients: int = NUM_CLIENTS,
        **settings: Any,
    ) -> None:
        self.answered: Counter[tuple[int, int]] = Counter()
        self.uncharged: list[tuple[int, int]] = []
        self.backwards = False
        self.ledger = ledger or PrivacyLedger(":memory:")
        self.model = as_record(model or start())
        self._rounds = count(after + 1)
        self._move, self._tamper, self._half = move, tamper, half_of(inner)
        self.grid = SimulationGrid(InProcessBackend(client_app(self._answer), {}, num_clients), num_clients)
        usual = {"plans": [PLAN] * num_clients, "delta": 1e-5, "accountant": "rdp", "max_rounds_per_client": 100}
        drawing = {**usual, "cohort_size": cohort_size, "seed": 0, **{k: v for k, v in settings.items() if k in ROSTER}}
        rest = {key: value for key, value in settings.items() if key not in ROSTER}
        roster = Roster(ledger=self.ledger, **drawing)
        sends = sent_by(self._half, records.to_params(self.model))
        self.private = PrivateStrategy(inner, roster, **{"join_timeout": 0.0, "sends": sends, **rest})
        self.private.meet(self.grid)

    def round(self) -> Model:
        """One round, as in the loop of Flower."""
        number = next(self._rounds)
        messages = self.private.configure_train(number, self.model, ConfigRecord(), self.grid)
        replies = list(self.grid.send_and_receive(messages))
        if self.backwards:
            replies.reverse()
        arrays, _ = self.private.aggregate_train(number, replies)
        self.model = self.model if arrays is None else arrays
        return as_model(self.model)

    def rounds(self, number: int) -> Model:
        """The model after ``number`` rounds."""
        for _ in range(number):
            self.round()
        return as_model(self.model)

    def _answer(self, client: int, content: RecordDict) -> RecordDict:
        model = as_model(content.array_records[records.ARRAYS])
        # a message that the strategy made itself has no assignment; the client replies too
        number = records.read_assignment(content).round if records.ASSIGNMENT in content.config_records else 0
        self.answered[client, number] += 1
        if self.ledger.rounds_by_client().get(client, 0) < len([1 for c, _ in self.answered if c == client]):
            self.uncharged.append((client, number))
        event = ConfigRecord({"client": client, "round": number, "attempt": 0, **EVENT.to_dict()})
        moved = as_record(self._move(client, number, model), like=model)
        before, after = (records.to_params(a) for a in (content.array_records[records.ARRAYS], moved))
        added = records_of(self._half, before, after)
        reply = RecordDict(
            {
                records.ARRAYS: moved,
                **{key: records.to_arrays(tensors) for key, tensors in added.items()},
                records.EVENT: event,
                records.METRICS: MetricRecord({records.NUM_EXAMPLES: client + 1}),
            }
        )
        return self._tamper(client, number, reply) if self._tamper else reply


class Handed(Strategy):
    """``inner``, which receives ``turn(replies)`` instead of the replies."""

    def __init__(self, inner: Strategy, turn: Callable[[list[Message]], list[Message]]) -> None:
        self.inner, self.turn, self.client_half = inner, turn, half_of(inner)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Call ``inner``."""
        return self.inner.configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Call ``inner`` with the changed replies."""
        return self.inner.aggregate_train(server_round, self.turn(list(replies)))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """No messages."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """No metrics."""
        return None

    def summary(self) -> None:
        """Nothing."""


def backwards(replies: list[Message]) -> list[Message]:
    """The replies in reverse order."""
    return replies[::-1]


def averaged(replies: list[Message]) -> list[Message]:
    """One reply with the mean of the models, weighted by size; its other records are those of the first."""
    first, sizes = replies[0], [_size(reply.content) for reply in replies]
    models = [as_model(reply.content.array_records[records.ARRAYS]) for reply in replies]
    mean = {name: np.average(np.stack([m[name] for m in models]), axis=0, weights=sizes) for name in models[0]}
    content = RecordDict(dict(first.content))
    content[records.ARRAYS] = as_record(mean, like=models[0])
    content[records.METRICS] = MetricRecord({records.NUM_EXAMPLES: sum(sizes)})
    first.content = content
    return [first]


def _size(content: RecordDict) -> float:
    return float(content.metric_records[records.METRICS][records.NUM_EXAMPLES])  # type: ignore[arg-type]


def _client(context: Context) -> int:
    return int(context.node_config[records.PARTITION_ID])


def _whole(array: NDArray[Any]) -> bool:
    return bool(np.issubdtype(array.dtype, np.integer))


@contextmanager
def quiet() -> Iterator[None]:
    """Turn off the logs of Flower and the wrapper, and make the garbage collections of Bulyan fast."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    gc.freeze()  # Flower's Bulyan collects once per array of each reply: 80 ms with torch loaded
    try:
        yield
    finally:
        gc.unfreeze()
        logging.disable(before)
