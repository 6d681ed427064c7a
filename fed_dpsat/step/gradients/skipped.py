"""What transformers asks of a whole batch, to save work: is any token masked? No example may hear of another's mask.

It does not ask where a tensor has no values yet (``is_tracing``). A batch within a ``Level`` is such a tensor: its mask
is made in any case, and attention gives the same without it.
"""

from __future__ import annotations

import sys
from typing import Any

from torch._C import _functorch as functorch

MASKS = "transformers.masking_utils"


def ask_no_batch() -> None:
    """From now on; where transformers is not imported there is nothing to do."""
    masks: Any = sys.modules.get(MASKS)
    asked = getattr(masks, "is_tracing", None)
    if asked is None or hasattr(asked, "of_transformers"):
        return

    def is_tracing(tensor: Any = None) -> bool:
        return bool(asked(tensor) or (tensor is not None and functorch.is_functorch_wrapped_tensor(tensor)))

    is_tracing.of_transformers = asked  # type: ignore[attr-defined]
    masks.is_tracing = is_tracing
