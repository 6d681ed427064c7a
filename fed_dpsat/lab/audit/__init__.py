"""Audits: lower bounds on epsilon from attacks that were carried out, beside the ledger's upper bound.

An audit can find that a promise is broken. It cannot show that one is kept: a weak attack has a low bound too.
"""

from fed_dpsat.lab.audit.canaries import OneRunAudit, audit_one_run
from fed_dpsat.lab.audit.client_game import ClientGame, play_clients
from fed_dpsat.lab.audit.game import Game, GameResult, play
from fed_dpsat.lab.audit.membership import MembershipCurve, membership_curve

__all__ = [
    "ClientGame",
    "Game",
    "GameResult",
    "MembershipCurve",
    "OneRunAudit",
    "audit_one_run",
    "membership_curve",
    "play",
    "play_clients",
]
