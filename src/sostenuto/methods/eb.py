"""EB-Cache: a calibrated table of reuse and a scaled noise prediction (arXiv 2503.07120)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from sostenuto.correct import check_noise_scale
from sostenuto.methods.base import Facts
from sostenuto.methods.tabled import ScaledTableMethod
from sostenuto.table import CacheTable


@dataclass(frozen=True)
class EBCache(ScaledTableMethod):
    """EB-Cache (arXiv 2503.07120): at each step compute all, reuse attention, or reuse attention and MLP; then ``ε ← b·ε``.

    All blocks share the step's state, as in the paper. Branch outputs are kept before their gate, so that gates and shifts
    are those of the current timestep also where a branch is reused.

    Attributes:
        table: the calibrated table, or its file; by default the one that ships for this model, where there is one.
        eps_scale: the paper's b, one number or one per step; by default the table's. Below 1 leaves more noise in, above 1
            takes out more. The authors' script divides by its ``--delta``: ``b = 1 / delta``.
        forecast_order: how reused branches are filled: 0, as in the paper, with the last value; 1 by linear extrapolation
            from the last two computed ones; by default the table's.
    """

    name: ClassVar[str] = "eb"
    paper: ClassVar[str] = "arXiv 2503.07120"
    summary: ClassVar[str] = "calibrated table of reuse per step and branch, predicted noise scaled"

    @property
    def scales_noise(self) -> bool:
        """Unless every factor is 1, here or in the table."""
        if self.eps_scale is None and isinstance(self.table, CacheTable):
            return any(s != 1 for s in self.table.eps_scale)
        return super().scales_noise

    def noise_scale(self, facts: Facts) -> Sequence[float]:
        """b at every step."""
        assert isinstance(self.table, CacheTable)
        return self.table.eps_scale if self.eps_scale is None else check_noise_scale(self.eps_scale, facts.num_steps)
