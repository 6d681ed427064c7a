"""The opposite of the honest update (Li et al., AAAI 2019, arXiv 1811.03761)."""

from __future__ import annotations

from fed_dpsat.lab.attacks.scaling import Scaling


def sign_flip(strength: float = 4.0) -> Scaling:
    """Sends minus `strength` times the honest update (Li et al. 2019)."""
    return Scaling(-strength)


ATTACKS = {"sign-flip": sign_flip}
