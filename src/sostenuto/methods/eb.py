"""EB-Cache: a calibrated table of reuse and a scaled noise prediction (arXiv 2503.07120)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from sostenuto.correct import check_noise_scale
from sostenuto.methods import published
from sostenuto.methods.base import Facts
from sostenuto.methods.tabled import ScaledTableMethod
from sostenuto.table import CacheTable

# As in the authors' file: 0 compute, 2 reuse both; they never reuse attention alone.
_DIT_XL_2 = (*(0, 2, 2) * 3, 2, *(0, 2) * 9, *(0,) * 22)


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

    @classmethod
    def dit_xl_2(
        cls, order: Literal["timestep_index", "sampling"] = "timestep_index", eps_scale: float = 0.955
    ) -> EBCache:
        """DiT-XL/2 256², DDPM with 50 steps: the table of the authors' code (34 steps computed) and the paper's b = 0.955.

        Their loop reads the table from the clean end, so the 22 noisiest steps are computed; ``order="sampling"`` reads it from
        the noisy end, where tables of their Algorithm 1 reuse most. Their script divides by 0.965, which is
        ``eps_scale=1 / 0.965``. The table costs more than the paper's row at b = 0.955, whose own was not published.
        """
        table = CacheTable.from_numbers(
            _DIT_XL_2, order, model=published.DIT_XL_2, scheduler={"class": "DDPMScheduler"}
        )
        return cls(table, eps_scale=eps_scale)

    @property
    def scales_noise(self) -> bool:
        """Unless every factor is 1, here or in the table."""
        table = self.known_table if self.eps_scale is None else None
        return super().scales_noise if table is None else any(s != 1 for s in table.eps_scale)

    def noise_scale(self, facts: Facts) -> Sequence[float]:
        """b at every step."""
        assert isinstance(self.table, CacheTable)
        return self.table.eps_scale if self.eps_scale is None else check_noise_scale(self.eps_scale, facts.num_steps)
