"""How much a watched signal changed, in the one measure that methods which decide at run time go by."""

from __future__ import annotations

import torch

from sostenuto.distributed.lockstep import current_groups


def relative_l1(now: torch.Tensor, before: torch.Tensor) -> float:
    """``mean|now − before| / mean|before|``, in float32 whatever the dtype of the signal; NaN or infinite where that is 0.

    Over the processes of :func:`~sostenuto.sharded_over`, each of which holds an equal part. Reads one number off the device,
    so that it can't be part of a compiled graph.
    """
    before = before.float()
    means = torch.stack([(now.float() - before).abs().mean(), before.abs().mean()])
    for group in current_groups():
        torch.distributed.all_reduce(means, group=group)
    return (means[0] / means[1]).item()
