#!/usr/bin/env bash
# Packages: torch==2.13.0 numpy==2.4.6 peft==0.21.2 transformers==5.24.0
# What: `add_weighted_adapter(combination_type="linear")` of LoRA puts the root of each weight on A and on B and adds
#   them up. The product of the sums has all cross terms at full weight.
# A good guess: Its documentation calls linear a very rough approximation, so for different adapters an error is
#   expected; but the average of n equal adapters, with weights 1 / n, is that adapter.
# Seen: four equal adapters with weights 0.25: linear gives four times the change of the weights, eight with weights
#   0.125 give eight times. svd and cat give it once.
# Why it matters: It is the function that one finds for averaging the clients' adapters, and linear is the only type
#   that keeps the rank without a decomposition. After a round with close clients the change is multiplied by their
#   number. Use cat or svd.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv --without-pip "$folder/venv"
python3 -m pip --python "$folder/venv/bin/python" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6 peft==0.21.2 transformers==5.24.0
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

ratios = {}
for clients in (4, 8):
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), config, adapter_name="client0")
    names = [f"client{index}" for index in range(clients)]
    for name in names[1:]:
        model.add_adapter(name, config)
    layer = model.base_model.model[0]
    a, b = torch.randn(2, 6), torch.randn(5, 2)
    for name in names:
        layer.lora_A[name].weight.data.copy_(a)
        layer.lora_B[name].weight.data.copy_(b)
    for kind in ("linear", "svd", "cat"):
        model.base_model.add_weighted_adapter(names, [1 / clients] * clients, kind, combination_type=kind)
        change, one = layer.get_delta_weight(kind), layer.get_delta_weight("client0")
        ratios[clients, kind] = float(change.norm() / one.norm())
print(ratios)
for (clients, kind), ratio in ratios.items():
    assert abs(ratio - (clients if kind == "linear" else 1)) < 1e-3
PY
