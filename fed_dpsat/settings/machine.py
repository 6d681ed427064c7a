"""The group of settings of the machine, and its checks."""

from __future__ import annotations

from dataclasses import dataclass

from fed_dpsat.settings.paths import of_file, of_plugins
from fed_dpsat.settings.values import refuse, setting


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Machine: seeds, workers, devices and the run folder."""

    seed: int = setting(0, "seed of every draw; with noise_source=seeded the same seed gives the same bits", least=0)
    noise_source: str = setting(
        "seeded",
        "source of coins and noise: seeded (reproducible, not private) or system (cryptographic)",
        choices=("seeded", "system"),
    )
    workers: int = setting(0, "number of Ray workers; 0 trains in this process", least=0, may_change=True)
    ray_address: str = setting(
        "",
        "Ray cluster to join and leave running, host:port or auto; by default one is started for the run",
        may_change=True,
    )
    device: str = setting(
        "cpu",
        "device of model and batches: cpu, cuda, cuda:N, or auto (cuda if there is a card, else cpu); the last bits "
        "of results depend on it",
    )
    gpus_per_worker: float = setting(
        0.0,
        "share of a card that each Ray worker takes: at 0.25 four workers share one",
        least=0,
        most=1,
        may_change=True,
    )
    threads_per_client: int = setting(1, "number of intra-op threads of a client; results depend on it", least=1)
    stack_clients: int = setting(
        1,
        "number of clients that one process trains together in one kernel, for small models and GPUs; 0 means "
        "automatic (up to 128 if the model has at most 65,536 parameters, and a larger physical_batch_size); the last "
        "bits of results depend on it",
        least=0,
    )
    tune_malloc: bool = setting(
        True, "switch: on glibc, let the allocator keep freed blocks: steps are up to twice as fast", may_change=True
    )
    out: str = setting(
        "",
        "run folder, new or empty; by default one in runs/ that is named after config and time",
        may_change=True,
        path=of_file,
    )
    resume: bool = setting(False, "switch: continue the run in out from its last checkpoint", may_change=True)
    profile: bool = setting(
        False, "switch: write trace.json, the times of all clients, for ui.perfetto.dev", may_change=True
    )
    loggers: str = setting(
        "",
        "loggers besides the run folder, comma-separated: tensorboard, mlflow, wandb, your own",
        may_change=True,
        path=of_plugins(","),
    )
    metrics_port: int = setting(
        0,
        "port of this machine with Prometheus metrics of the run, for programs on this machine alone; 0 serves none",
        least=0,
        most=65535,
        may_change=True,
    )
    log_format: str = setting(
        "text",
        "form of the log on standard error: text, or json, an object per line",
        choices=("text", "json"),
        may_change=True,
    )
    evaluate_every: int = setting(1, "number of rounds between evaluations; the last round always is", least=1)


def check(config: Machine) -> None:
    """Raise ``SettingError`` for settings of this group that exclude each other.

    Ray decides which GPU a worker sees, if any, and each worker sees it as its first.
    """
    if config.ray_address and not config.workers:
        bound = f"enough for ray_address={config.ray_address!r}"
        refuse(config, "workers", bound, "say how many of its CPUs to use")
    kind, _, number = config.device.partition(":")
    if config.device not in ("cpu", "cuda", "auto") and not (kind == "cuda" and number.isdecimal()):
        refuse(config, "device", "one of cpu, cuda, cuda:N, auto", "cuda:1 is the second card")
    if config.gpus_per_worker and not config.workers:
        refuse(config, "gpus_per_worker", "possible with workers=0", "set it to 0, or workers above 0")
    if config.gpus_per_worker and config.device == "cpu":
        refuse(config, "gpus_per_worker", "possible with device='cpu'", "set it to 0, or device=cuda")
    if config.workers and number:
        bound = f"possible with workers={config.workers}"
        refuse(config, "device", bound, "Ray gives out the cards: set device=cuda")
    if config.workers and config.device == "cuda" and not config.gpus_per_worker:
        refuse(
            config,
            "gpus_per_worker",
            f"enough for device='cuda' with workers={config.workers}: Ray would give them none",
            "set gpus_per_worker=0.25 for four workers on each card, 1 for one",
        )
