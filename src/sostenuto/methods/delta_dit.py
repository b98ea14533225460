"""Δ-DiT: reuse what the rear blocks add in the early steps, what the front blocks add in the late ones (arXiv 2406.01125)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from sostenuto.errors import MethodError
from sostenuto.methods.base import Facts, Method
from sostenuto.methods.checks import check_number, check_whole
from sostenuto.plan import Action, Plan
from sostenuto.sites import Site, block_range, stack_range


@dataclass(frozen=True)
class DeltaDiT(Method):
    """Δ-DiT (arXiv 2406.01125): the change ``Δ = x_out − x_in`` of a range of blocks is kept and added to the current input.

    Before the switch step the range is the rear ``num_cached_blocks`` blocks, which shape details, while outlines form; from
    it on it is the front ones. All blocks run at every multiple of the interval, counted from the generation's first step, and
    at the switch step, where the other range's Δ does not exist yet. With more than half of the blocks cached the two ranges
    overlap; a computed step keeps only the Δ that a later step reads. There is no official code: that the interval is not
    counted anew from the switch step is our reading.

    Attributes:
        interval: the paper's N, 1 (no caching) or more.
        switch_step: the paper's b: as a whole number a step, 0 (always the front) or more; as a fraction, 0.0 to 1.0 (always
            the rear), of the number of steps.
        num_cached_blocks: the paper's N_c: as a whole number, 1 or more; as a fraction above 0.0, of the network's blocks.
    """

    interval: int = 2
    switch_step: int | float = 0.6
    num_cached_blocks: int | float = 0.75

    name: ClassVar[str] = "delta-dit"
    paper: ClassVar[str] = "arXiv 2406.01125"
    summary: ClassVar[str] = "reuses what the rear blocks add early, what the front blocks add late"
    state: ClassVar[str] = "one residual of a range of blocks"
    bytes_per_token: ClassVar[str] = "b × d"

    def __post_init__(self) -> None:
        check_whole("DeltaDiT's interval", self.interval, least=1)
        for name, least in (("switch_step", 0), ("num_cached_blocks", 1)):
            value = getattr(self, name)
            if isinstance(value, float):
                above = {"above": 0} if least else {"least": 0}
                check_number(f"DeltaDiT's {name}, as a fraction,", value, **above, most=1)
            else:
                check_whole(f"DeltaDiT's {name}", value, least)

    @classmethod
    def dit_xl_2(cls) -> DeltaDiT:
        """DiT-XL/2, 20 steps: N = 2, b = 12; N_c = 21 of 28 is not confirmed."""
        return cls(interval=2, switch_step=12 / 20, num_cached_blocks=21)

    @classmethod
    def flux_dev(cls, interval: int = 2) -> DeltaDiT:
        """FLUX.1-dev, 50 steps, as others ran it: always the single-stream blocks, 38 of 57; N = 2 or 3."""
        return cls(interval=interval, switch_step=1.0, num_cached_blocks=38)

    @classmethod
    def pixart_alpha(cls) -> DeltaDiT:
        """PixArt-α, 20 steps: N = 2, b = 12; N_c = 21 of 28 is not confirmed."""
        return cls(interval=2, switch_step=12 / 20, num_cached_blocks=21)

    def sites(self, denoiser: nn.Module) -> list[Site]:
        """The front range and the rear range; one range where all blocks are cached."""
        first, last = stack_range(denoiser)
        count = last - first + 1
        cached = max(1, _absolute(self.num_cached_blocks, count))
        if cached > count:
            raise MethodError(f"DeltaDiT's num_cached_blocks is {cached}, but the network has {count} blocks")
        front = block_range(denoiser, first, first + cached - 1)
        rear = block_range(denoiser, last - cached + 1, last)
        return [front] if cached == count else [front, rear]

    def plan(self, facts: Facts) -> Plan:
        """Between computed steps the rear range is reused before the switch step, the front range from it on."""
        switch = _absolute(self.switch_step, facts.num_steps)
        if switch > facts.num_steps:
            raise MethodError(f"DeltaDiT's switch_step is {switch}, but the sampler runs {facts.num_steps} steps")
        front, rear = facts.sites[0], facts.sites[-1]
        rows = []
        for p in range(facts.num_steps):
            computed = (p - facts.first_step) % self.interval == 0 or p == switch
            reused = None if computed else rear if p < switch else front
            rows.append(tuple(Action.REUSE if site is reused else Action.COMPUTE for site in facts.sites))
        return Plan(tuple(rows))


def _absolute(value: int | float, count: int) -> int:
    """A number as it is, a fraction as the nearest number out of ``count``."""
    return int(value * count + 0.5) if isinstance(value, float) else value
