#!/usr/bin/env bash
# Packages: torch==2.13.0, peft==0.21.2, transformers==5.24.0
# What: LoRA on "out_proj" of nn.TransformerEncoderLayer, a usual name in target_modules, as a Linear of its own.
# A good guess: it trains, as on the out_proj of networks of transformers; or peft says that it cannot.
# Seen: both matrices of the adapter are made, counted as trainable, and never used: nn.MultiheadAttention reads
#   out_proj.weight itself. Their gradients stay None, and any value in them leaves the outputs as they are to the bit.
#   The adapter of linear1 in the same layer trains. Nothing warns.
# Why it matters: A run trains fewer weights than it counts. A private run that draws noise for all trainable weights
#   sends noise alone for these; one that asserts a gradient for each of them fails.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv --without-pip "$folder/venv"
python3 -m pip --python "$folder/venv/bin/python" install -q --disable-pip-version-check \
  torch==2.13.0 numpy==2.4.6 peft==0.21.2 transformers==5.24.0
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
layer = inject_adapter_in_model(LoraConfig(r=2, target_modules=["out_proj", "linear1"]), layer)
trainable = {name: p for name, p in layer.named_parameters() if p.requires_grad}
idle = [name for name in trainable if "out_proj" in name]
assert len(trainable) == 4 and len(idle) == 2, list(trainable)

x = torch.randn(3, 5, 8)
layer(x).square().sum().backward()
print({name: None if p.grad is None else float(p.grad.norm()) for name, p in trainable.items()})
assert all(trainable[name].grad is None for name in idle)
assert float(trainable["linear1.lora_B.default.weight"].grad.norm()) > 0

layer.eval()
with torch.no_grad():
    before = layer(x)
    for name in idle:
        trainable[name].fill_(5.0)
    assert torch.equal(layer(x), before)
PY
