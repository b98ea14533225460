"""Epsilon Scaling: divide the predicted noise by a factor slightly above 1 (arXiv 2308.15321)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from sostenuto.correct import check_noise_scale
from sostenuto.methods.base import Facts, Method


@dataclass(frozen=True)
class EpsilonScaling(Method):
    """Epsilon Scaling (arXiv 2308.15321, equation 14): ``ε ← ε / λ``, against the over-prediction of noise while sampling.

    Applied to the denoiser's output, hence to all of the update (x₀ and direction), after the guidance in effect.

    Attributes:
        scale: λ, one number or one per step in sampling order; above 1 takes noise away less strongly. EB-Cache's b is 1/λ.
    """

    scale: float | tuple[float, ...] = 1.005

    name: ClassVar[str] = "epsilon-scaling"
    paper: ClassVar[str] = "arXiv 2308.15321"
    summary: ClassVar[str] = "divides the predicted noise by λ; no caching"

    def __post_init__(self) -> None:
        check_noise_scale(self.scale)

    def noise_scale(self, facts: Facts) -> Sequence[float]:
        """1/λ for every step."""
        return [1 / scale for scale in check_noise_scale(self.scale, facts.num_steps)]
