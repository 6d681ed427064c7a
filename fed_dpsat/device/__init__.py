"""A client on a device of its own: its policy, its ledger and its data."""
