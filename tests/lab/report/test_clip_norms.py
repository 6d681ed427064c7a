"""What the report reads of clients' states is what a simulation wrote into them."""

from types import SimpleNamespace

import torch
from flwr.app import RecordDict

from fed_dpsat.flower.wire import records
from fed_dpsat.lab.report.model_figures import read_clip_norms
from fed_dpsat.simulation.state import StateStore


def test_the_last_clip_norm_of_each_client_that_has_one(tmp_path):
    store = StateStore(tmp_path / "state")
    for client, norms in {0: [1.0, 0.5], 3: [2.0], 7: []}.items():
        before = None
        for round, norm in enumerate(norms, 1):
            state = RecordDict()
            records.save_state(state, {"clipping": {"clip_norm": torch.tensor(norm)}})
            store.save(client, round, state, before)
            before = round
    state = RecordDict()
    records.save_state(state, {"optimizer": {"step": torch.tensor(3)}})
    store.save(7, 1, state, None)
    assert read_clip_norms(SimpleNamespace(path=tmp_path)) == {0: 0.5, 3: 2.0}
