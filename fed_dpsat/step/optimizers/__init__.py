"""Private optimizers, one file per method.

=================== ============================================ ==============================================
name                query                                        update
=================== ============================================ ==============================================
``dp-sgd``          w                                            SGD on the private gradient
``adam``            w                                            Adam, noise out of the second moment
``dp-sat``          w + rho * g / \\|g\\|, g the last gradient     that of its base, at w
``dp-sat-momentum`` w + rho * (w_prev - w) / \\|w_prev - w\\|      that of its base, at w
``dp-sam``          w, then w + rho * g / \\|g\\|                 none, then that of its base, at w
``sam``             the same, not private                        the same
``extrapolated``    w - lookahead * g                            that of its base, at w
``modelmix``        w                                            that of its base, at a mixture of w, w_prev
``disk``            w and w + gamma d, weighted, d = w - w_prev  that of its base, along a filter of gradients
``dplis``           the mean over K draws around w               that of its base
``saf``             w, and a loss that remembers old outputs     that of its base
``random-freeze``   w, without the coordinates frozen this round that of its base, of active coordinates
``zeroth-order``    two losses along one public direction        that of its base, along that direction
=================== ============================================ ==============================================

All but the first two take a ``base``, which makes the step (``chain``). Those that ask for more
than one plain gradient do it by a ``fed_dpsat.step.query.Query``.
"""

from fed_dpsat.step.optimizers.base import PrivateOptimizer, State
from fed_dpsat.step.optimizers.dpsat import DPSAT, DPSATMomentum
from fed_dpsat.step.optimizers.dpsgd import DPSGD

__all__ = ["DPSAT", "DPSGD", "DPSATMomentum", "PrivateOptimizer", "State"]
