"""Networks, one file per family, each with a table ``MODELS`` of short names that ``plugins`` reads.

============ ================================================
module       names
============ ================================================
``linear``   ``linear``
``mlp``      ``mlp``
``cnn``      ``tanh-cnn-small``, ``tanh-cnn``
``resnet``   ``resnet20-gn``, ``wrn16-4-gn``, ``resnet10-gn``
``dpnasnet`` ``dpnasnet-cifar``, ``dpnasnet-fashion-mnist``
============ ================================================

A model is a factory ``(input_shape, num_classes) -> nn.Module``; ``input_shape`` is one example's, without
the batch: ``(64,)``, ``(1, 28, 28)``. The module maps ``x[B, *input_shape]`` to logits ``[B, num_classes]``.
What every one of them keeps, and ``tests/models/test_models.py`` checks:

- An example's logits do not depend on the rest of its batch, nor on train or eval mode: otherwise clipping
  one example's gradient would not bound its contribution.
- No operation is in place, so ``vmap(grad(...))`` over ``functional_call`` works on it.
- Initial weights come from torch's global generator: seed it (``torch.manual_seed``) before the call.
- A shape that the model cannot take raises ``ModelError`` when it is built, and says what to use instead.

Nothing here normalises its input; the dataset does.
"""
