"""Private optimizers, one file per method.

=================== ========================================= ==========================
name                query point                               update
=================== ========================================= ==========================
``dp-sgd``          w                                         SGD on the private gradient
``dp-sat``          w + rho * g / \\|g\\|, g the last gradient  the same, at w
``dp-sat-momentum`` w + rho * (w_prev - w) / \\|w_prev - w\\|   the same, at w
=================== ========================================= ==========================
"""

from fed_dpsat.optimizers.base import PrivateOptimizer, State
from fed_dpsat.optimizers.dpsat import DPSAT, DPSATMomentum
from fed_dpsat.optimizers.dpsgd import DPSGD

__all__ = ["DPSAT", "DPSGD", "DPSATMomentum", "PrivateOptimizer", "State"]
