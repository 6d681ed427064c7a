#!/usr/bin/env bash
# Packages: torch==2.13.0 opacus==1.6.0 numpy==2.4.6
# What: `PrivacyEngine().get_epsilon` raises before the first step, and after steps with noise_multiplier 0, with the
#   accountant that is the default (PRV).
# A good guess: 0 before the first step and infinity without noise, as the RDP accountant of the same engine says.
# Seen: no step: RDP 0, PRV ValueError (cannot convert float NaN to integer). Five steps with noise_multiplier 0: RDP
#   inf, PRV OverflowError (cannot convert float infinity to integer).
# Why it matters: A client that is not drawn in a round, or whose data are fewer than a batch, has taken no step, and
#   a run without noise is the baseline of each table. A line of logging that asks for epsilon ends these runs, and an
#   average of epsilons over clients has to catch two kinds of errors.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv --without-pip "$folder/venv"
python3 -m pip --python "$folder/venv/bin/python" install -q --disable-pip-version-check torch==2.13.0 opacus==1.6.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PY'
from opacus import PrivacyEngine

found = {}
for accountant in ("rdp", "prv"):
    for noise, steps in ((1.0, 0), (0.0, 5), (1.0, 5)):
        engine = PrivacyEngine(accountant=accountant)
        for _ in range(steps):
            engine.accountant.step(noise_multiplier=noise, sample_rate=0.1)
        try:
            found[accountant, noise, steps] = engine.get_epsilon(1e-5)
        except (ValueError, OverflowError) as error:
            found[accountant, noise, steps] = f"{type(error).__name__}: {error}"
print(found)
assert PrivacyEngine().accountant.mechanism() == "prv"
assert found["rdp", 1.0, 0] == 0 and found["rdp", 0.0, 5] == float("inf")
assert found["prv", 1.0, 0].startswith("ValueError") and found["prv", 0.0, 5].startswith("OverflowError")
assert abs(found["prv", 1.0, 5] - found["rdp", 1.0, 5]) < 1
PY
