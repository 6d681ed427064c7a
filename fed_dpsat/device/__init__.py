"""A client on a device of its own: what it allows, what it has spent, and the data it holds."""
