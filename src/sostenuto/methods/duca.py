"""DuCa: between full steps, steps that refresh some tokens and steps that skip the whole stack (arXiv 2412.18911)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from sostenuto.methods.checks import check_choice
from sostenuto.methods.token_cycle import StepKind, TokenCycle
from sostenuto.sites import Site, inspect, stack

PatternStart = Literal["code_mod", "conservative_first", "aggressive_first"]


@dataclass(frozen=True)
class DuCa(TokenCycle):
    """Dual feature caching (arXiv 2412.18911): conservative and aggressive steps alternate between two full ones.

    ::

        full:          all branches are computed, H ← hidden state behind the last block
        conservative:  as a partial step of ToCa, H ← hidden state behind the last block
        aggressive:    no block runs; the final norm and projection, with the current timestep, are given H

    The paper and its first version choose tokens by small values (``selection="value-norm"``), the second finds random ones
    as good. Aggressive steps leave what branches keep and the tokens' staleness untouched. Everything else is explained with
    :class:`TokenCycle`.

    Attributes:
        pattern_start: what comes first in a cycle. In the DiT code steps with an odd offset ``i mod thr`` are conservative,
            those with an even one aggressive (``"code_mod"``). The paper alternates from the full step on, leaving open how:
            ``"conservative_first"``, as in the code for FLUX and HunyuanVideo, or ``"aggressive_first"``.
    """

    fresh_ratio: float = 0.05
    spatial_bonus: float = 0.8
    pattern_start: PatternStart = "code_mod"

    name: ClassVar[str] = "duca"
    paper: ClassVar[str] = "arXiv 2412.18911"
    summary: ClassVar[str] = (
        "full steps every N steps, in between some tokens alternately with nothing but the last layer"
    )
    state: ClassVar[str] = "one output per branch, the last hidden state, and two numbers per token and branch"
    bytes_per_token: ClassVar[str] = "b × d × (branches + 1)"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("DuCa's pattern_start", self.pattern_start, ("code_mod", "conservative_first", "aggressive_first"))

    def sites(self, denoiser: nn.Module) -> list[Site]:
        """All branches, and the stack as a whole, whose output is H."""
        return [*inspect(denoiser), stack(denoiser, residual=False)]

    def between(self, offset: int, since_full: int) -> StepKind:
        """Conservative or aggressive, in turns."""
        counted = offset if self.pattern_start == "code_mod" else since_full
        conservative = (counted % 2 == 1) is not (self.pattern_start == "aggressive_first")
        return StepKind.PARTIAL if conservative else StepKind.AGGRESSIVE

    @classmethod
    def dit_xl_2(cls, interval: int = 3) -> DuCa:
        """DiT-XL/2 256², DDIM with 50 steps: N = 3 (also 5), 5 % of the tokens."""
        return cls(interval=interval)

    @classmethod
    def pixart_alpha(cls) -> DuCa:
        """PixArt-α, DPM-Solver++ with 20 steps: N = 3, 75 % of the tokens, full steps evenly spread."""
        return cls(
            fresh_ratio=0.75,
            ratio_schedule="pixart",
            anchor="start",
            spatial_bonus=0.4,
            tile=4,
            threshold_weight=0.0,
            middle_interval=None,
        )

    @classmethod
    def open_sora(cls) -> DuCa:
        """Open-Sora 1.2, rectified flow with 30 steps: F C A, cross-attention F C A C C A, 10 %, the first three steps full."""
        return cls._evenly(
            fresh_ratio=0.1, ratio_schedule="open-sora", anchor="start", first_full_steps=3, cross_attention_every=2
        )

    @classmethod
    def flux_dev(cls, interval: int = 5) -> DuCa:
        """FLUX.1-dev, 50 steps: N = 5 (also 7, 10), 10 % of the tokens, the first three steps full."""
        return cls._counted_upward(interval, 0.1, "flux", first_full_steps=3)

    @classmethod
    def hunyuan_video(cls) -> DuCa:
        """HunyuanVideo, 50 steps: N = 5, 10 % of the tokens."""
        return cls._counted_upward(5, 0.1)

    @classmethod
    def qwen_image(cls, interval: int = 9, fresh_ratio: float = 0.2) -> DuCa:
        """Qwen-Image, 50 steps: N = 9, 20 % of the tokens (also N = 12 with 10 %)."""
        return cls._counted_upward(interval, fresh_ratio)

    @classmethod
    def _counted_upward(
        cls, interval: int, fresh_ratio: float, ratio_schedule: str = "constant", first_full_steps: int = 1
    ) -> DuCa:
        return cls._evenly(
            interval=interval,
            fresh_ratio=fresh_ratio,
            ratio_schedule=ratio_schedule,
            anchor="last-full",
            first_full_steps=first_full_steps,
            pattern_start="conservative_first",
        )
