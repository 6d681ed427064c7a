"""Audits: lower bounds on epsilon from real attacks, to compare with the upper bound of the ledger.

An audit can refute a guarantee. It cannot confirm one: a weak attack has a low bound too.
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
