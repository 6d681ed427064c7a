#!/usr/bin/env bash
# Packages: torch==2.13.0 opacus==1.6.0 dp-accounting==0.6.0 numpy==2.4.6
# What: Each accountant of Opacus has an epsilon below which it never goes: the orders of the RDP accountant end at
#   63, and the PRV accountant adds its tolerance of 0.01. `get_noise_multiplier` then raises, or goes to noise that
#   is many times too large.
# A good guess: Epsilon goes to 0 as the noise grows, so that each target has a noise multiplier, near that of
#   dp-accounting (RDP).
# Seen: delta 1e-5. With sample_rate 0, where no example is read, RDP says 0.103 and PRV 0.00999. Target 0.1, rate
#   0.01, 1,000 steps: RDP (the default) raises `The privacy budget is too low`; dp-accounting gives 10.8. Target
#   0.01, rate 0.001, 100 steps: PRV 40, dp-accounting 6.1.
# Why it matters: Budgets of one client in one round, of a hyperparameter trial, or of a small release are of this
#   size. 40 in place of 6.1 is a model that learns nothing, with a budget that is hardly used. Calibrate small
#   budgets with dp-accounting.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv --without-pip "$folder/venv"
python3 -m pip --python "$folder/venv/bin/python" install -q --disable-pip-version-check torch==2.13.0 opacus==1.6.0 dp-accounting==0.6.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PY'
import dp_accounting as dp
from dp_accounting import rdp
from opacus.accountants import PRVAccountant, RDPAccountant
from opacus.accountants.utils import get_noise_multiplier

DELTA = 1e-5


def reference(epsilon, rate, steps):
    def event(sigma):
        return dp.SelfComposedDpEvent(dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(sigma)), steps)

    return dp.calibrate_dp_mechanism(rdp.RdpAccountant, event, epsilon, DELTA, dp.LowerEndpointAndGuess(0, 5))


def calibrated(epsilon, rate, steps, accountant):
    return get_noise_multiplier(
        target_epsilon=epsilon, target_delta=DELTA, sample_rate=rate, steps=steps, accountant=accountant
    )


least = {}
for accountant in (RDPAccountant(), PRVAccountant()):
    accountant.history = [(1.0, 0.0, 5)]
    least[accountant.mechanism()] = accountant.get_epsilon(delta=DELTA)
print("sample_rate 0:", least)
assert 0.10 < least["rdp"] < 0.11 and 0.009 < least["prv"] < 0.011

print("target 1:", calibrated(1.0, 0.01, 1000, "rdp"), reference(1.0, 0.01, 1000))
assert abs(calibrated(1.0, 0.01, 1000, "rdp") / reference(1.0, 0.01, 1000) - 1) < 0.02
print("target 0.1:", reference(0.1, 0.01, 1000))
assert 10 < reference(0.1, 0.01, 1000) < 12
try:
    calibrated(0.1, 0.01, 1000, "rdp")
except ValueError as error:
    print("ValueError:", error)
else:
    raise SystemExit("a target of 0.1 has a noise multiplier")
print("target 0.01:", calibrated(0.01, 0.001, 100, "prv"), reference(0.01, 0.001, 100))
assert calibrated(0.01, 0.001, 100, "prv") > 6 * reference(0.01, 0.001, 100)
PY
