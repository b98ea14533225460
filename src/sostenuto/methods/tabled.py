"""What methods share whose plan is a calibrated cache table: loading it, and refusing one that doesn't fit."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from sostenuto.correct import check_noise_scale
from sostenuto.errors import MethodError, TableError
from sostenuto.forecast import check_forecast_order
from sostenuto.methods.base import Facts, Method
from sostenuto.plan import Plan
from sostenuto.sites import Site
from sostenuto.step_state import StepState
from sostenuto.table import CacheTable
from sostenuto.tables import shipped_table


@dataclass(frozen=True)
class TableMethod(Method):
    """Base of the methods that carry out a :class:`~sostenuto.table.CacheTable`.

    Attributes:
        table: the table, or its file; by default the one that ships for this method and model, where there is one.
        forecast_order: how skipped branches are filled: 0 with the last value, 1 by linear extrapolation, …; by default
            the table's.
    """

    table: CacheTable | str | Path | None = None
    forecast_order: int | None = field(default=None, kw_only=True)

    calibrated: ClassVar[bool] = True
    state: ClassVar[str] = "one output of every branch that is reused, one more for a linear forecast"
    bytes_per_token: ClassVar[str] = "b × d × branches"

    def __post_init__(self) -> None:
        if self.table is not None and not isinstance(self.table, (CacheTable, str, Path)):
            raise MethodError(f"{type(self).__name__}'s table is a CacheTable or the path of one, not {self.table!r}")
        if self.forecast_order is not None:
            check_forecast_order(self.forecast_order)

    @property
    def known_table(self) -> CacheTable | None:
        """The table, or what its file holds; ``None`` where that is not known before it is prepared for a network."""
        with suppress(TableError):  # which is told when the method is enabled
            return None if self.table is None else loaded(self.table)
        return None

    @property
    def skips_every_kind(self) -> bool:
        """Where the table is known, and reuses all branches of a step."""
        return (table := self.known_table) is not None and StepState.REUSE_BOTH in table.actions

    @property
    def num_inference_steps(self) -> int | None:
        """The table's."""
        return self.table.num_inference_steps if isinstance(self.table, CacheTable) else None

    def prepare(self, denoiser: nn.Module, scheduler: Any) -> TableMethod:
        """Load the table and refuse one that was made for something else."""
        table = shipped_table(denoiser, scheduler, self.name) if self.table is None else loaded(self.table)
        table.check(denoiser, scheduler)
        if any(scale != 1 for scale in table.eps_scale) and not isinstance(self, ScaledTableMethod):
            raise MethodError(
                f"the cache table scales the predicted noise, which {type(self).__name__} does not: run it with "
                "EBCache(table), or drop its factors with dataclasses.replace(table, eps_scale=())"
            )
        if self.forecast_order is not None:
            table = table.filled(self.forecast_order)
        made = replace(self, table=table)
        table.plan(made.sites(denoiser))  # refuses sites that the network lacks
        return made

    def sites(self, denoiser: nn.Module) -> list[Site]:
        """The table's."""
        assert isinstance(self.table, CacheTable)
        return self.table.sites(denoiser)

    def plan(self, facts: Facts) -> Plan:
        """The table's actions at this network's sites."""
        assert isinstance(self.table, CacheTable)
        self.table.check_steps(facts.timesteps)
        return self.table.plan(facts.sites)


@dataclass(frozen=True)
class ScaledTableMethod(TableMethod):
    """Base of the methods that also scale the predicted noise.

    Attributes:
        eps_scale: factors of the predicted noise, one number or one per step, instead of the method's own.
    """

    eps_scale: float | tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eps_scale is not None:
            check_noise_scale(self.eps_scale)

    def prepare(self, denoiser: nn.Module, scheduler: Any) -> TableMethod:
        """Refuse factors of another number of steps, too."""
        made = super().prepare(denoiser, scheduler)
        if self.eps_scale is not None:
            assert isinstance(made.table, CacheTable)
            check_noise_scale(self.eps_scale, made.table.num_inference_steps)
        return made

    @property
    def scales_noise(self) -> bool:
        """Unless every factor is 1."""
        return self.eps_scale is None or any(s != 1 for s in check_noise_scale(self.eps_scale))


def loaded(table: CacheTable | str | Path) -> CacheTable:
    """The table itself, read from its file where that is what is given."""
    return table if isinstance(table, CacheTable) else CacheTable.load(table)
