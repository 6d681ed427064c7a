#!/usr/bin/env bash
# Packages: tokenizers==0.23.3
# What: A tokenizer that adds [CLS] and [SEP] is truncated to fewer tokens than these two: enable_truncation(1).
# A good guess: an error, or two special tokens and nothing else, as for enable_truncation(2).
# Seen: with a limit of 1 nothing is cut. A text of six words has eight tokens, as without truncation; limits 2, 3 and 4
#   give 2, 3 and 4 tokens.
# Why it matters: A length that is computed, such as what is left beside a long first part, passes 1 on, and a model with
#   a table of positions then fails at the longest text of a data set, or a memory budget for each text does not hold.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv --without-pip "$folder/venv"
python3 -m pip --python "$folder/venv/bin/python" install -q --disable-pip-version-check tokenizers==0.23.3
"$folder/venv/bin/python" - <<'PY'
from tokenizers import Tokenizer, models, pre_tokenizers, processors

words = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "a": 3, "b": 4}
tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer.post_processor = processors.TemplateProcessing(
    single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
)
lengths = {}
for limit in (4, 3, 2, 1):
    tokenizer.enable_truncation(limit)
    lengths[limit] = len(tokenizer.encode("a b a b a b").ids)
print("tokens by limit:", lengths)
assert lengths == {4: 4, 3: 3, 2: 2, 1: 8}, lengths
PY
