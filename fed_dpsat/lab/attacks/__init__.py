"""Malicious clients for tests of strategies, one file per attack.

An attack is a plug-in (``attack = "sign-flip"``, ``attackers = 0.2``, ``attack_args``). It may change the training data
of an attacker, its update, or both. It still sends a valid reply with the charged event, because the server drops any
other reply before a strategy sees it.
"""

from fed_dpsat.client.attackers import Attack, Attackers, Scene, choose_attackers

__all__ = ["Attack", "Attackers", "Scene", "choose_attackers"]
