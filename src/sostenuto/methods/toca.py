"""ToCa: full steps every few steps, in between only the most important tokens are computed (arXiv 2410.05317)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sostenuto.methods.token_cycle import TokenCycle
from sostenuto.tokens import Selection


@dataclass(frozen=True)
class ToCa(TokenCycle):
    """Token-wise caching (arXiv 2410.05317): every step between two full ones refreshes the most important tokens.

    Per branch, ``C`` is the kept output::

        full:     C ← branch(x)           for all tokens
        partial:  C[idx] ← branch(x[idx]) for idx = top-k of the score, k = int(ratio · tokens); the branch returns C

    In the authors' code every block decides for itself whether a step is full, after the first one has changed the threshold
    on which that depends; here a step has one kind. Everything else is explained with :class:`TokenCycle`.
    """

    selection: Selection = "attention"

    name: ClassVar[str] = "toca"
    paper: ClassVar[str] = "arXiv 2410.05317"
    summary: ClassVar[str] = (
        "full steps every N steps, in between only the most important tokens of MLPs and cross-attention; compiled only "
        "with selection='random'"
    )
    state: ClassVar[str] = "one output per branch, and two numbers per token and branch"
    bytes_per_token: ClassVar[str] = "b × d × branches"

    @classmethod
    def dit_xl_2(cls) -> ToCa:
        """DiT-XL/2 256², DDIM with 50 steps: N = 3, 7 % of the tokens by their attention."""
        return cls()

    @classmethod
    def dit_xl_2_ddpm250(cls) -> ToCa:
        """DiT-XL/2 256², DDPM with 250 steps: N = 4, 7 % of the tokens by their attention, front blocks more."""
        return cls(interval=4, ratio_schedule="ddpm250")

    @classmethod
    def pixart_alpha(cls) -> ToCa:
        """PixArt-α, DPM-Solver++ with 20 steps: N = 3, 30 % of the tokens by the entropy of their cross-attention."""
        return cls(
            fresh_ratio=0.3,
            selection="cross-entropy",
            ratio_schedule="pixart",
            anchor="start",
            spatial_bonus=0.4,
            tile=4,
            threshold_weight=0.2,
            middle_interval=None,
        )

    @classmethod
    def open_sora(cls) -> ToCa:
        """Open-Sora 1.2, 30 steps: N = 3, cross-attention every 6, 10 % of the MLPs' tokens, the first three steps full.

        Which tokens was not published in a form that this network's split attention allows: random ones, as DuCa has them.
        """
        return cls._evenly(
            fresh_ratio=0.1, ratio_schedule="open-sora", anchor="start", first_full_steps=3, cross_attention_every=2
        )

    @classmethod
    def flux_dev(cls, interval: int = 4, selection: Selection = "attention") -> ToCa:
        """FLUX.1-dev, 50 steps: N = 4 (also 5, 6, 8, 12), 10 % of the tokens by their attention, the first three steps full.

        For the scores every map of a full step is computed a second time; ``selection="random"`` spares that, as DuCa does.
        """
        return cls._evenly(
            selection,
            interval=interval,
            fresh_ratio=0.1,
            ratio_schedule="flux",
            anchor="last-full",
            first_full_steps=3,
        )

    @classmethod
    def hunyuan_video(cls) -> ToCa:
        """HunyuanVideo, 50 steps: N = 5, 10 % of the tokens, chosen at random as in the later port."""
        return cls._evenly(interval=5, fresh_ratio=0.1, ratio_schedule="constant", anchor="last-full")
