#!/usr/bin/env bash
# Packages: torch==2.13.0 numpy==2.4.6
# What: torch.func.vmap over several tables and their words lets embedding take a word beyond a table from the table
#   of the next model, and leaves its gradient there; outside of vmap, and for one table, it raises IndexError.
# A good guess: vmap computes as a loop does, so a word beyond the table raises "index out of range in self", as
#   index_select, gather, W[i], nll_loss and embedding_bag do under vmap over both.
# Seen: of three tables of two rows, word 2 of the second model is row 0 of the third, and word -1 row 1 of the first;
#   word 2 of the third model raises. The gradient of the second model's loss for its own table has no such row.
# Why it matters: An ensemble, or clients that train in one kernel (stack_module_state), mix silently if one of them
#   has a token that its tokenizer does not share. Check words against the size of the table before the pass.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv --without-pip "$folder/venv"
python3 -m pip --python "$folder/venv/bin/python" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from torch.func import vmap
from torch.nn import functional

tables = torch.arange(12.0).view(3, 2, 2)


def looked_up(words):
    return vmap(lambda table, word: functional.embedding(word, table))(tables, torch.tensor(words))


def raised(function):
    try:
        function()
    except (IndexError, RuntimeError):
        return True
    return False


found = looked_up([0, 2, 0])[1].tolist(), looked_up([0, -1, 0])[1].tolist()
print("word 2:", found[0], "word -1:", found[1])
assert found == (tables[2, 0].tolist(), tables[0, 1].tolist())
assert raised(lambda: looked_up([0, 0, 2]))
assert raised(lambda: functional.embedding(torch.tensor(2), tables[1]))
assert raised(lambda: vmap(lambda word: functional.embedding(word, tables[1]))(torch.tensor([0, 2])))
assert raised(lambda: vmap(lambda table, word: table[word])(tables, torch.tensor([0, 2, 0])))

leaf = tables.clone().requires_grad_()
vmap(lambda table, word: functional.embedding(word, table).sum())(leaf, torch.tensor([0, 2, 0]))[1].backward()
print("gradient of the second model's loss, by table:", leaf.grad.sum((1, 2)).tolist())
assert leaf.grad.sum((1, 2)).tolist() == [0.0, 0.0, 2.0]
PY
