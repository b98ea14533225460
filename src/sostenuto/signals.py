"""How much a watched signal changed, in the one measure that methods which decide at run time go by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

_GROUP: ContextVar[Any] = ContextVar("group", default=None)


@contextmanager
def sharded_over(group: Any) -> Iterator[None]:
    """Measure signals over all processes of a group, each of which holds an equal part of them, so that all decide alike.

    A denoiser under diffusers' context parallelism needs nothing: its group is found. Around the calls of one that shards its
    tokens by other means every process of the group enters this.

    Args:
        group: a process group of ``torch.distributed``, or ``None`` for one process.
    """
    token = _GROUP.set(group)
    try:
        yield
    finally:
        _GROUP.reset(token)


def current_group() -> Any:
    """The group of :func:`sharded_over`, or ``None``."""
    return _GROUP.get()


def relative_l1(now: torch.Tensor, before: torch.Tensor) -> float:
    """``mean|now − before| / mean|before|``, in float32 whatever the dtype of the signal; NaN or infinite where that is 0.

    Reads one number off the device, so that it can't be part of a compiled graph.
    """
    before = before.float()
    means = torch.stack([(now.float() - before).abs().mean(), before.abs().mean()])
    if (group := current_group()) is not None:
        torch.distributed.all_reduce(means, group=group)
    return (means[0] / means[1]).item()
