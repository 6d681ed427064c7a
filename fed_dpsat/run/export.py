"""``fed-dpsat export``: the model of a run in the files of other libraries (``fed_dpsat.models.libraries.export``)."""

from __future__ import annotations

import shutil
from pathlib import Path

from fed_dpsat.errors import SettingError
from fed_dpsat.models.libraries.adapters import remove_adapter
from fed_dpsat.models.libraries.export import save_adapter, save_model
from fed_dpsat.models.pretrained import read_weights
from fed_dpsat.run.finished import trained


def export_run(run: Path, folder: Path, *, merge: bool = False, averaged: bool = False) -> list[str]:
    """Write the model of the last checkpoint of ``run`` into the new or empty ``folder``; the names of the files.

    With ``averaged`` it is the average of a run with ``averaging``.

    An adapter is written as files of peft, or with ``merge`` as a part of the weights that it changes. The settings of
    the run are beside them as ``run.toml``. Raises ``SettingError`` for a ``folder`` with files in it, ``merge``
    without an adapter, and an adapter without ``start_from``, whose base is in no file; and the errors of ``trained``.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SettingError("folder", str(folder), "new or empty", "name another one")
    experiment = trained(run, again="export with the version that has it", averaged=averaged)
    config, module = experiment.config, experiment.loss_fn.module
    if merge and not config.adapter:
        raise SettingError("merge", True, f"possible: {run} has no adapter", "leave out --merge")
    if config.adapter and not merge and not config.start_from:
        raise SettingError("merge", False, f"possible: the base of {run} is in no file (start_from='')", "add --merge")
    folder.mkdir(parents=True, exist_ok=True)
    names = experiment.dataset.class_names
    if config.adapter and not merge:
        weights, _ = read_weights(config.start_from)
        save_adapter(module, folder, start_from=config.start_from, weights=weights, class_names=names)
    else:
        remove_adapter(module, merge=True)
        save_model(module, folder, names)
    shutil.copyfile(run / "config.toml", folder / "run.toml")
    return sorted(path.name for path in folder.iterdir())
