"""Private optimizers, one file per method.

=================== ========================================= ===================================
name                query point                               update
=================== ========================================= ===================================
``dp-sgd``          w                                         SGD on the private gradient
``adam``            w                                         Adam, noise out of the second moment
``dp-sat``          w + rho * g / \\|g\\|, g the last gradient  the base's, at w
``dp-sat-momentum`` w + rho * (w_prev - w) / \\|w_prev - w\\|   the base's, at w
``dp-sam``          w, then w + rho * g / \\|g\\|              none, then the base's, at w
``sam``             the same, not private                     the same
``extrapolated``    w - lookahead * g                         the base's, at w
``modelmix``        w                                         the base's, at a mixture of w, w_prev
=================== ========================================= ===================================

All but the first two take a ``base``, which makes the step (``fed_dpsat.optimizers.chain``).
"""

from fed_dpsat.optimizers.base import PrivateOptimizer, State
from fed_dpsat.optimizers.dpsat import DPSAT, DPSATMomentum
from fed_dpsat.optimizers.dpsgd import DPSGD

__all__ = ["DPSAT", "DPSGD", "DPSATMomentum", "PrivateOptimizer", "State"]
