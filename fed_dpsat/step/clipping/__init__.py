"""Clipping rules, one file each.

============= ================================================ ==========================================
name          one example's gradient g becomes                 source
============= ================================================ ==========================================
``flat``      g * min(1, C / \\|g\\|)                            Abadi et al. 2016
``automatic`` g * C / (\\|g\\| + 0.01)                           Bu et al. 2022, AUTO-S
``psac``      g * s C / (s\\|g\\| + r / (\\|g\\| + r))             Xia et al. 2023, DP-PSAC
``global``    g * C / Z if \\|g\\| <= Z, else 0                  Bu et al. 2021
``per-layer`` each layer to C / sqrt(number of layers)         McMahan et al. 2018
``adaptive``  flat, C follows a private quantile of the norms  Andrew et al. 2021
============= ================================================ ==========================================
"""

from fed_dpsat.step.clipping.adaptive import AdaptiveClipping, Tally
from fed_dpsat.step.clipping.base import ClippingRule, check_clip_norm
from fed_dpsat.step.clipping.flat import FlatClipping

__all__ = ["AdaptiveClipping", "ClippingRule", "FlatClipping", "Tally", "check_clip_norm"]
