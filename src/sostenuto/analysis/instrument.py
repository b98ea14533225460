"""What an instrument is: what it measures, how that is drawn, what the papers claim of it, and what this model shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sostenuto.analysis.subject import Subject

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Data = dict[str, Any]


@dataclass(frozen=True)
class Instrument:
    """One figure of a paper, for any model.

    Attributes:
        name: what users type after ``--only``.
        work: about what it costs, in uncached generations of all samples; what others have sampled already counts there.
        title: of the figure.
        source: the paper and its figure or table.
        claim: what the paper claims.
        method: how it is measured here, in a sentence or two.
        measure: takes the numbers; plain data, ready for JSON.
        draw: draws them.
        finding: says in words, from the numbers alone, what this model shows.
    """

    name: str
    work: float
    title: str
    source: str
    claim: str
    method: str
    measure: Callable[[Subject], Data]
    draw: Callable[[Data], Figure]
    finding: Callable[[Data], str]
