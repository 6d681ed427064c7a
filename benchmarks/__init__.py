"""Benchmarks of private steps, federated rounds and the accountant."""
