"""Stock Flower on small clients: a ``ClientApp`` with DP-SAT in plain PyTorch, FedAvg, ``run_simulation``."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from benchmarks.rounds_plugins import SMALL_EXAMPLES, small_images
from benchmarks.turns import Turn
from fed_dpsat import plugins
from fed_dpsat.params import Params, cut, laid_end_to_end, trainable
from fed_dpsat.settings.config import RunConfig

ARRAYS, METRICS, ASCENT = "arrays", "metrics", "ascent"


def flower_small(config: RunConfig, turn: Turn) -> None:
    """``num_rounds`` rounds of all clients of ``config``, on one Ray worker; other draws than those of ``simulate``."""
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    client, server, everyone = ClientApp(), ServerApp(), config.num_clients

    @client.train()
    def train(message: Message, context: Context) -> Message:
        torch.set_num_threads(1)
        last = context.state.array_records.get(ASCENT)
        params, ascent = _trained(
            config,
            int(context.node_config["partition-id"]),
            message.content.array_records[ARRAYS].to_torch_state_dict(),
            None if last is None else last.to_torch_state_dict(),
        )
        context.state[ASCENT] = ArrayRecord(ascent)
        content = {ARRAYS: ArrayRecord(params), METRICS: MetricRecord({"num-examples": SMALL_EXAMPLES})}
        return Message(RecordDict(content), reply_to=message)

    def after_round(round: int, arrays: ArrayRecord) -> None:
        turn()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = FedAvg(
            fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=everyone, min_available_nodes=everyone
        )
        start = ArrayRecord(trainable(_work(config.model, everyone)[0]))
        strategy.start(grid, start, config.num_rounds, evaluate_fn=after_round)

    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0}, "init_args": {"num_cpus": 1}}
    run_simulation(server, client, everyone, backend_config=resources)


@functools.cache
def _work(model: str, clients: int) -> tuple[nn.Module, Callable[..., Params], Tensor, Tensor]:
    """Once in a process: the model, its gradients by example, and the examples of all clients."""
    module = plugins.build("model", model, {"input_shape": (1, 8, 8), "num_classes": 10})

    def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy(functional_call(module, params, (x[None],)), y[None])

    return module, vmap(grad(loss), in_dims=(None, 0, 0)), *small_images(clients).train.of_classes("this client")


def _trained(config: RunConfig, client: int, model: Params, last: Params | None) -> tuple[Params, Params]:
    """Parameters and the last private gradient after a round of ``client``."""
    _, gradients, inputs, targets = _work(config.model, config.num_clients)
    first, size = client * SMALL_EXAMPLES, config.sample_rate * SMALL_EXAMPLES
    params, ascent = laid_end_to_end(model), None if last is None else laid_end_to_end(last)
    for _ in range(config.local_steps):
        at = params if ascent is None else params + config.rho * ascent / ascent.norm()
        batch = first + torch.nonzero(torch.rand(SMALL_EXAMPLES) < config.sample_rate)[:, 0]
        total = torch.zeros_like(at)
        if len(batch):
            each = gradients(cut(at, model), inputs[batch], targets[batch])
            rows = torch.cat([g.flatten(1) for g in each.values()], 1)
            total = (config.clip_norm / rows.norm(dim=1)).clamp(max=1) @ rows
        ascent = (total + config.noise_multiplier * config.clip_norm * torch.randn_like(total)) / size
        params = params - config.lr * ascent
    assert ascent is not None
    return cut(params, model), cut(ascent, model)
