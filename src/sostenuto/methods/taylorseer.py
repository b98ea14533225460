"""TaylorSeer: forecast every branch by a Taylor polynomial of its computed outputs (arXiv 2503.06923)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import nn

from sostenuto.forecast import check_forecast_order, lagrange_weights, taylor_weights
from sostenuto.methods.base import Facts, Method, whole_steps
from sostenuto.methods.checks import check_choice, check_flag, check_whole
from sostenuto.plan import Plan
from sostenuto.sites import Site, inspect, stack


@dataclass(frozen=True)
class TaylorSeer(Method):
    """TaylorSeer (arXiv 2503.06923): branches are computed every ``interval`` steps and forecast in between.

    The forecast is ``Σ_i F_i x^i / i!`` with the last computed output ``F_0``, its derivatives ``F_1 … F_O`` from backward
    differences, and x the steps since. It is linear in the last O + 1 computed outputs, so those are kept, not the
    factors: differences are taken when they are needed, in float32. Where fewer were computed the order falls.

    The official code divides differences of every order by the newest gap alone, which is wrong where the spacing varies
    (after the first steps, and before a computed last one), and takes ``x^i / i!`` where Newton's formula has the product of
    the distances. ``differences="divided"`` is the exact polynomial through the outputs; up to order 1 both are the same.

    Attributes:
        interval: the paper's N, 1 (no caching) or more.
        order: the paper's O, 0 (last value) to 4.
        first_enhance: so many steps at the beginning are computed, 1 or more; the interval counts from the last of them.
        compute_last: whether the last step is computed in any case. The official code does not.
        differences: ``"divided"``, or ``"last-gap"`` for the official recursion.
        lite: keep the output of the last block alone and skip all blocks, instead of keeping every branch: O + 1 tensors in
            all. Gates and shifts of the blocks are then not those of the current step.
    """

    interval: int = 4
    order: int = 2
    first_enhance: int = 3
    compute_last: bool = False
    differences: Literal["divided", "last-gap"] = "divided"
    lite: bool = False

    name: ClassVar[str] = "taylorseer"
    paper: ClassVar[str] = "arXiv 2503.06923"
    summary: ClassVar[str] = "computes all branches every N steps, forecasts them by a Taylor polynomial in between"
    state: ClassVar[str] = "order + 1 outputs of every branch; lite: order + 1 hidden states in all"
    bytes_per_token: ClassVar[str] = "b × d × branches × (order + 1)"

    def __post_init__(self) -> None:
        check_whole("TaylorSeer's interval", self.interval, least=1)
        check_forecast_order(self.order, "TaylorSeer's order")
        check_whole("TaylorSeer's first_enhance", self.first_enhance, least=1)
        check_choice("TaylorSeer's differences", self.differences, ("divided", "last-gap"))
        check_flag("TaylorSeer's compute_last", self.compute_last)
        check_flag("TaylorSeer's lite", self.lite)

    @classmethod
    def dit_xl_2(cls, interval: int = 3, order: int = 3) -> TaylorSeer:
        """DiT-XL/2, DDIM, 50 steps: published N = 3, O = 3, also N = 5, O = 3; the authors recommend N = 4, O = 4."""
        return cls(interval=interval, order=order, first_enhance=2, differences="last-gap")

    @classmethod
    def flux_dev(cls, interval: int = 6, order: int = 2) -> TaylorSeer:
        """FLUX.1-dev, 50 steps: published N = 3, 6 and 7 with O = 2 (the code's own default is N = 6, O = 1)."""
        return cls(interval=interval, order=order, first_enhance=3, differences="last-gap")

    @classmethod
    def hunyuan_video(cls) -> TaylorSeer:
        """HunyuanVideo, 50 steps: published N = 5, O = 1."""
        return cls(interval=5, order=1, first_enhance=1, differences="last-gap")

    @classmethod
    def hidream(cls) -> TaylorSeer:
        """HiDream: published N = 4, O = 2."""
        return cls(interval=4, order=2, first_enhance=1, differences="last-gap")

    @classmethod
    def qwen_image(cls, interval: int = 6) -> TaylorSeer:
        """Qwen-Image, 50 steps: published N = 3 and N = 6; order and first steps are not, they are FLUX's here."""
        return cls(interval=interval, order=2, first_enhance=3, differences="last-gap")

    def sites(self, denoiser: nn.Module) -> list[Site]:
        """All branches, or the hidden states after the last block."""
        if self.lite:
            return [stack(denoiser, residual=False)]
        return inspect(denoiser)

    def plan(self, facts: Facts) -> Plan:
        """Compute the first steps of the generation and then every ``interval``-th."""
        last_enhanced = facts.first_step + self.first_enhance - 1
        skip = [p > last_enhanced and (p - last_enhanced) % self.interval != 0 for p in range(facts.num_steps)]
        if self.compute_last:
            skip[-1] = False
        weights = lagrange_weights if self.differences == "divided" else taylor_weights
        return replace(whole_steps(facts, skip, self.order), weights=weights)
