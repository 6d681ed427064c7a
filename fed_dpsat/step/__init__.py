"""A client's private training, pure numerics: sample, query, per-example gradients, clip, sum, noise, update.

It knows neither Flower nor Ray.
"""
