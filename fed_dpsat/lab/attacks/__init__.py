"""Clients that do not play by the rules, one file per idea: to see what a strategy is worth before somebody else does.

An attack is a plug-in like any other (``attack = "sign-flip"``, ``attackers = 0.2``, ``attack_args``). It may change
what an attacker trains on, what it sends, or both; it still sends a valid reply with the event that it was charged,
since anything else is dropped before a strategy sees it.
"""

from fed_dpsat.client.attackers import Attack, Attackers, Scene, choose_attackers

__all__ = ["Attack", "Attackers", "Scene", "choose_attackers"]
