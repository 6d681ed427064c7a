"""What left the project, and its successor. The errors for an unknown setting, value and module read these tables."""

from __future__ import annotations

SETTINGS = {
    "image_column": "it is input_columns now",
    "ascent_memory=server": "it left: client keeps the direction on the client, and zero begins each round without one",
    "strategy=fedexp": "it left: its step was that of fedavg in every measurement, so write fedavg",
    "strategy=low-pass": "it left: it gained nothing over fedavg in any measurement, so write fedavg",
}
"""By setting, or ``setting=value``, what to write now."""
MODULES = {
    "fed_dpsat.attacks": "fed_dpsat.lab.attacks",
    "fed_dpsat.audit": "fed_dpsat.lab.audit",
    "fed_dpsat.clipping": "fed_dpsat.step.clipping",
    "fed_dpsat.config": "fed_dpsat.settings.config",
    "fed_dpsat.device_cli": "fed_dpsat.device.command",
    "fed_dpsat.engines": "fed_dpsat.step.gradients",
    "fed_dpsat.evaluation": "fed_dpsat.client.evaluation",
    "fed_dpsat.experiment": "fed_dpsat.client.build",
    "fed_dpsat.flower.codec": "fed_dpsat.flower.wire.codec",
    "fed_dpsat.flower.compat": "fed_dpsat.flower.wire.compat",
    "fed_dpsat.flower.device_node": "fed_dpsat.device.node",
    "fed_dpsat.flower.on_device": "fed_dpsat.device.handlers",
    "fed_dpsat.flower.records": "fed_dpsat.flower.wire.records",
    "fed_dpsat.loggers": "fed_dpsat.lab.loggers",
    "fed_dpsat.mechanism": "fed_dpsat.step.mechanism",
    "fed_dpsat.noise": "fed_dpsat.step.noise",
    "fed_dpsat.optimizers": "fed_dpsat.step.optimizers",
    "fed_dpsat.per_example": "fed_dpsat.step.gradients.per_example",
    "fed_dpsat.placement": "fed_dpsat.step.placement",
    "fed_dpsat.plans": "fed_dpsat.accounting.plans",
    "fed_dpsat.privacy": "fed_dpsat.accounting",
    "fed_dpsat.query": "fed_dpsat.step.query",
    "fed_dpsat.report": "fed_dpsat.lab.report",
    "fed_dpsat.run_folder": "fed_dpsat.run.folder",
    "fed_dpsat.sampling": "fed_dpsat.step.sampling",
    "fed_dpsat.secure_noise": "fed_dpsat.step.secure_noise",
    "fed_dpsat.subspace": "fed_dpsat.step.subspace",
    "fed_dpsat.sweep": "fed_dpsat.lab.sweep",
    "fed_dpsat.training": "fed_dpsat.step.loop",
}
"""By module, which stands for those in it too, the module that has its content now."""


def successor(setting: str, value: object = None) -> str:
    """What to write for a setting, or a ``value`` of it, that left; "" for another one."""
    return SETTINGS.get(setting if value is None else f"{setting}={value}", "")


def moved(module: str | None) -> str:
    """A sentence with the successor of a module that left; "" for another one."""
    parts = (module or "").split(".")
    parents = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((f"{old} is {MODULES[old]} now" for old in parents if old in MODULES), "")
