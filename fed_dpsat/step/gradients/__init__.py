"""Ways to the same sum of clipped per-example gradients; ``fed_dpsat.step.gradients.per_example`` is the door to them.

=========== =================================================================================== ==============
engine      how                                                                                 takes
=========== =================================================================================== ==============
``auto``    one backward pass; for each parameter the cheapest exact way (also ``planned``)     any loss
``vmap``    one backward pass, with a row of each parameter for each example                    any loss
``opacus``  ``auto``, and the gradients of Opacus' hooks have to agree with it                  ``ModelLoss``
=========== =================================================================================== ==============

A pass runs within a level of ``vmap`` (``level``), so no operation sees two examples. What ``vmap`` refuses has one
pass per example (``loop``). Modules, in the order of a sum:

============================== ===============================================================================
``loss``, ``call``             what a module makes of a batch, at parameters that are given
``level``, ``passes``, ``state`` one pass: its level, what it may not do, what it leaves as it was
``capture``                    the pass itself: each call of a module and its answer
``routes``, ``rowwise``, ``rnn`` which calls are answered for the whole batch
``linear`` ... ``recurrent``   layers: forward, backward, contributions
``contribution``, ``product``  what a layer adds to an example's gradient: norms first, then a weighted sum
``gathered``, ``derived``, ``shared`` contributions by parameter: of functions of it, and of several uses
``planned``, ``plain``, ``loop`` the engines
============================== ===============================================================================
"""
