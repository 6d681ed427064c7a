"""Ways to the same sum of clipped per-example gradients; ``fed_dpsat.step.gradients.per_example`` is the door to them.

=========== ========================================================== =============================
engine      how                                                        takes
=========== ========================================================== =============================
``vmap``    ``torch.func``, every per-example gradient in memory       any loss (the reference)
``planned`` one backward pass; per layer the cheapest exact way        ``ModelLoss``
``opacus``  the hooks of Opacus, as a familiar cross-check             ``ModelLoss``
``auto``    ``planned`` where it can, else ``vmap``                    any loss
=========== ========================================================== =============================
"""
