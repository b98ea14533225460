"""How much a watched signal changed, in the one measure that methods which decide at run time go by."""

from __future__ import annotations

import torch


def relative_l1(now: torch.Tensor, before: torch.Tensor) -> float:
    """``mean|now − before| / mean|before|``, in float32 whatever the dtype of the signal; NaN or infinite where that is 0.

    Reads one number off the device, so that it can't be part of a compiled graph.
    """
    before = before.float()
    return ((now.float() - before).abs().mean() / before.abs().mean()).item()
