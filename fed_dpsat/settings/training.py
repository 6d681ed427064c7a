"""The group of settings of model and local training, and its checks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from fed_dpsat.settings.paths import of_file, of_plugin, of_plugins
from fed_dpsat.settings.values import refuse, setting


@dataclass(frozen=True, kw_only=True)
class Training:
    """Model and local training: the network, the optimizer, and the steps of a client."""

    model: str = setting(
        "linear",
        "network, a short name, timm:NAME, torchvision:NAME, transformers:FOLDER, or package.module:attribute",
        path=of_plugin,
    )
    model_args: str = setting("", "arguments of the network that no setting fills: depth = 6, patch_size = 4")
    task: str = setting(
        "classification",
        "thing that the model learns, a short name or package.module:attribute: classification, multilabel, "
        "regression, token-classification, causal-lm, masked-lm",
        path=of_plugin,
    )
    task_args: str = setting("", "arguments of the task that no setting fills: beta = 0.5")
    metric: str = setting(
        "", "metric of the task that is shown first and that sweeps choose by; empty is its own first"
    )
    norm: str = setting(
        "", "group replaces each BatchNorm of the network by a GroupNorm; empty replaces nothing", choices=("", "group")
    )
    start_from: str = setting(
        "",
        "weights to start from, public: safetensors, a state dict of torch, a run folder, or a folder with "
        "model.safetensors; empty starts anew",
        path=of_file,
    )
    start_head: str = setting(
        "loaded",
        "head (last layer) at the start: loaded from start_from, or new, for another number of classes",
        choices=("loaded", "new"),
    )
    train_layers: str = setting(
        "all",
        "layers that are trained, sent and noised: all, the last few, the head alone, the head until unfreeze_round, "
        "or all biases and the head",
        choices=("all", "last", "head", "head-then-all", "bias"),
    )
    last_layers: int = setting(1, "number of layers that train_layers=last trains", least=1)
    unfreeze_round: int = setting(0, "first round in which train_layers=head-then-all trains all", least=0)
    adapter: str = setting(
        "",
        "adapter that is trained beside the head while all else is frozen: lora, or ffa-lora, whose first matrix is "
        "frozen too; empty trains the model without an adapter",
        choices=("", "lora", "ffa-lora"),
    )
    adapter_rank: int = setting(8, "rank of the adapter", least=1)
    adapter_alpha: int = setting(16, "scale of the adapter: its output times adapter_alpha / adapter_rank", least=1)
    adapter_targets: str = setting(
        "",
        "layers with an adapter, by the ends of their names, with commas: query, value; empty takes those that peft "
        "has for the network",
    )
    personal_layers: str = setting(
        "",
        "layers that stay on the client, are never sent and never averaged: head (the last one) or names, with commas; "
        "empty shares all",
    )
    optimizer: str = setting("dp-sat", "private optimizer", path=of_plugin)
    base_optimizer: str = setting(
        "dp-sgd",
        "optimizer that dp-sat and other wrappers make their step with; disk+adam is disk over adam",
        path=of_plugins("+"),
    )
    optimizer_args: str = setting("", "arguments of the optimizers that no setting fills: beta2 = 0.99, floor = 0.1")
    lr: float = setting(2.0, "learning rate", least=0)
    lr_schedule: str = setting(
        "constant",
        "learning rate over all steps: constant, linear, cosine",
        choices=("constant", "linear", "cosine"),
    )
    momentum: float = setting(0.0, "momentum of the step, kept by the client across rounds", least=0, most=1)
    weight_decay: float = setting(0.0, "weight decay of the step", least=0)
    rho: float = setting(0.03, "radius that sharpness-aware methods climb, in parameter space", least=0)
    ascent_memory: str = setting(
        "client",
        "first ascent direction of a round: the client's last private gradient, or zero",
        choices=("client", "zero"),
    )
    local_steps: int = setting(1, "number of private steps a client takes per round", least=1)
    local_epochs: int = setting(
        0,
        "number of passes over its data a client takes per round, instead of local_steps; 0 is for local_steps",
        least=0,
    )
    averaging: str = setting(
        "",
        "average of the global models, which a run measures and keeps beside the last one: ema (exponential), last-k; "
        "empty keeps none",
        choices=("", "ema", "last-k"),
    )
    local_averaging: str = setting(
        "",
        "average of its local models that a client sends in place of the last one: ema, last-k; empty sends the last",
        choices=("", "ema", "last-k"),
    )
    averaging_decay: float = setting(
        0.999, "largest decay of an ema, which begins at 0.1 and rises with the number of models", least=0, most=1
    )
    averaging_models: int = setting(10, "number of models of a last-k average", least=1)
    sample_rate: float = setting(0.5, "chance of each example, or person, to be in a Poisson batch", above=0, most=1)
    augmentations: int = setting(
        0,
        "number of random views of each image whose mean gradient is clipped; 0 trains on the image itself",
        least=0,
        most=1024,
    )
    augmentation: str = setting(
        "crop-flip",
        "views of an image: crop-flip (moved by up to 4 pixels over reflecting edges, half of them mirrored), crop, "
        "flip",
        choices=("crop-flip", "crop", "flip"),
    )
    physical_batch_size: int = setting(
        128, "number of per-example gradients in memory at a time; views of an example count", least=1
    )
    engine: str = setting(
        "auto",
        "way per-example gradients are computed: auto (layer by layer; planned is the same), vmap (a row of each "
        "parameter for each example), opacus (auto, compared with Opacus at each step)",
        choices=("auto", "vmap", "planned", "opacus"),
    )
    precision: str = setting(
        "float32",
        "precision of linear and convolution layers; bfloat16 is faster on CPUs that have it and rounds each example's "
        "gradient before clipping",
        choices=("float32", "bfloat16"),
    )
    kernels: str = setting(
        "auto",
        "kernels of the planned engine on a CPU: torch, or also its own, which the C compiler of the machine compiles; "
        "auto is compiled if that works",
        choices=("auto", "compiled", "torch"),
    )


def check(config: Training) -> None:
    """Raise ``SettingError`` for settings of this group that exclude each other."""
    if config.momentum >= 1:
        refuse(config, "momentum", "in [0, 1)", "0.9 is usual")
    if config.personal_layers and config.unfreeze_round:
        refuse(config, "personal_layers", "possible with train_layers='head-then-all'", "keep one of them")
    if config.start_head == "new" and not config.start_from:
        refuse(config, "start_head", "possible without start_from", "a model that starts anew has a new head anyway")
    if config.last_layers > 1 and config.train_layers != "last":
        refuse(config, "last_layers", f"possible with train_layers={config.train_layers!r}", "set train_layers=last")
    if config.unfreeze_round and config.train_layers != "head-then-all":
        refuse(
            config, "unfreeze_round", f"possible with train_layers={config.train_layers!r}", "use head-then-all, or 0"
        )
    _averaging(config)
    if config.augmentation != "crop-flip" and not config.augmentations:
        refuse(config, "augmentation", "possible without views", "set augmentations=16")
    _adapter(config)


def _averaging(config: Training) -> None:
    """An average of models of a kind that is not taken has no meaning."""
    kinds = (config.averaging, config.local_averaging)
    for name, kind, default in (("averaging_decay", "ema", 0.999), ("averaging_models", "last-k", 10)):
        if getattr(config, name) != default and kind not in kinds:
            refuse(config, name, f"possible without an average of kind {kind}", f"set averaging={kind}")


def _adapter(config: Training) -> None:
    """An adapter says by itself what is trained; without one its other settings have no meaning."""
    if config.adapter and config.train_layers != "all":
        bound = f"'all' with adapter={config.adapter!r}, which trains the adapter and the head"
        refuse(config, "train_layers", bound, "keep one of the two")
    for spec in dataclasses.fields(Training):
        if spec.name.startswith("adapter_") and not config.adapter and getattr(config, spec.name) != spec.default:
            refuse(config, spec.name, "possible without an adapter", "set adapter=lora")
