"""Private statistics of the clients' data before training: ``fed-dpsat stats``."""
