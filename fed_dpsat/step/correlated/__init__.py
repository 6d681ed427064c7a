"""Correlated noise: mechanisms whose noise cancels in partial sums, for one charge over all steps.

``base`` says what a mechanism is, ``sensitivity`` what a participant may do, and ``choose`` finds one by its name.
"""
