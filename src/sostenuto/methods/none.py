"""No caching at all: the uncached sampler through the same engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sostenuto.methods.base import Method


@dataclass(frozen=True)
class NoCache(Method):
    """Compute every branch at every step; outputs are bit-identical to the stock pipeline's."""

    name: ClassVar[str] = "none"
    summary: ClassVar[str] = "computes everything: the uncached sampler, with statistics"
    denoisers: ClassVar[str] = "any"
