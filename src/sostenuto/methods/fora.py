"""FORA: compute every N steps, reuse all branches in between (arXiv 2407.01425)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from sostenuto.forecast import check_forecast_order
from sostenuto.methods.base import Facts, Method, whole_steps
from sostenuto.methods.checks import check_choice, check_whole
from sostenuto.plan import Plan


@dataclass(frozen=True)
class FORA(Method):
    """Fast-Forward Caching (arXiv 2407.01425): all branches are computed every ``interval`` steps.

    The official code counts from the clean end: a step is computed when its descending index ``S − 1 − p`` is a multiple of
    the interval, so that the last step always is (``anchor="end"``); ``anchor="start"`` counts from its first step.

    Attributes:
        interval: the paper's N, 1 (no caching) or more.
        anchor: which end the interval is counted from.
        forecast_order: how the gap is filled: 0, as in the paper, with the last value; 1 by linear extrapolation; …
    """

    interval: int = 2
    anchor: Literal["end", "start"] = "end"
    forecast_order: int = 0

    name: ClassVar[str] = "fora"
    paper: ClassVar[str] = "arXiv 2407.01425"
    summary: ClassVar[str] = "computes all branches every N steps, reuses them in between"
    state: ClassVar[str] = "one output of every branch, one more per order of the forecast"
    bytes_per_token: ClassVar[str] = "b × d × branches"

    def __post_init__(self) -> None:
        check_whole("FORA's interval", self.interval, least=1)
        check_choice("FORA's anchor", self.anchor, ("end", "start"))
        check_forecast_order(self.forecast_order)

    @classmethod
    def dit_xl_2(cls, interval: int = 3) -> FORA:
        """DiT-XL/2 256², DDIM with 50 steps: N = 3 (N = 2 to 5 were published)."""
        return cls(interval=interval)

    @classmethod
    def pixart_alpha(cls, interval: int = 3) -> FORA:
        """PixArt-α 256², DPM-Solver++ with 20 steps: N = 3 (N = 2 to 4 were published)."""
        return cls(interval=interval)

    @classmethod
    def flux_dev(cls, interval: int = 3) -> FORA:
        """FLUX.1-dev, 50 steps: N = 3 (also 6): 18 computed (10), which is nearest to the published FLOPs."""
        return cls(interval=interval)

    @classmethod
    def hunyuan_video(cls) -> FORA:
        """HunyuanVideo, 50 steps: N = 5, counted from the first step: 10 computed, as the published FLOPs tell."""
        return cls(interval=5, anchor="start")

    @classmethod
    def qwen_image(cls, interval: int = 4) -> FORA:
        """Qwen-Image, 50 steps: N = 4 (also 6), counted from the first step: 13 computed, as the published FLOPs tell."""
        return cls(interval=interval, anchor="start")

    def plan(self, facts: Facts) -> Plan:
        """Compute at the first step and at every multiple of the interval."""
        first, last = facts.first_step, facts.num_steps - 1
        skip = [
            p > first and (p - first if self.anchor == "start" else last - p) % self.interval != 0
            for p in range(facts.num_steps)
        ]
        return whole_steps(facts, skip, self.forecast_order)
