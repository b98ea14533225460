"""FEB-Cache: MLP reused early, attention late, and a noise scale that falls with time (arXiv 2503.07120, v2 and v3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import nn

from sostenuto.clock import normalized_times
from sostenuto.correct import check_noise_scale
from sostenuto.errors import MethodError, TableError
from sostenuto.methods.base import Facts
from sostenuto.methods.checks import check_number, is_number
from sostenuto.methods.tabled import ScaledTableMethod
from sostenuto.table import CacheTable

Denominator = Literal["as_reported", "symmetric"]
_PARAMETERS = ("b_high", "b_low", "tau_threshold", "denominator")  # of b(τ)


def noise_scale_curve(
    taus: Sequence[float],
    b_high: float = 0.98,
    b_low: float = 0.96,
    tau_threshold: float = 0.4,
    denominator: Denominator = "as_reported",
) -> tuple[float, ...]:
    """FEB-Cache's noise scale b(τ) (arXiv 2503.07120v3), with τ from 1 (noisiest) to 0 (last step).

    ==================  =========================================================
    ``τ ≥ τ_thre``      ``b_h + (1 − b_h) · exp(−5 · (1 − τ) / (1 − τ_thre))``
    ``τ < τ_thre``      ``b_l + (b_h − b_l) · exp(5 · (τ − τ_thre) / d)``
    ==================  =========================================================

    It is 1 at τ = 1, about b_h at the threshold and near b_l at τ = 0, with a jump of ``(1 − b_h) · e⁻⁵`` at the threshold.

    Args:
        taus: the normalised times, each from 0 to 1; ``sostenuto.clock.normalized_times(num_steps)`` gives those of a
            generation in sampling order.
        b_high: b_h, the scale that the early, high-noise stage falls to; above 0.
        b_low: b_l, the scale that the late stage falls to; above 0.
        tau_threshold: τ_thre, where the late stage begins, counted from the clean end; above 0 and below 1.
        denominator: d, ``"as_reported"`` is ``1 − τ_thre``, ``"symmetric"`` is ``τ_thre``, with which the late stage falls
            as far as the early one. At the default threshold b(0) is b_l + 0.036 · (b_h − b_l) with the first and
            b_l + 0.007 · (b_h − b_l) with the second.

    Returns:
        One factor per τ.

    Raises:
        MethodError: a parameter or a τ is out of range.
    """
    _check_curve(b_high, b_low, tau_threshold, denominator)
    for tau in taus:
        if not 0 <= tau <= 1:
            raise MethodError(f"a normalised time τ must be from 0 (last step) to 1 (first step), not {tau!r}")
    late = 1 - tau_threshold if denominator == "as_reported" else tau_threshold

    def b(tau: float) -> float:
        if tau >= tau_threshold:
            return b_high + (1 - b_high) * math.exp(-5 * (1 - tau) / (1 - tau_threshold))
        return b_low + (b_high - b_low) * math.exp(5 * (tau - tau_threshold) / late)

    return tuple(b(tau) for tau in taus)


def _check_curve(b_high: float, b_low: float, tau_threshold: float, denominator: str) -> None:
    for name, value in (("b_high", b_high), ("b_low", b_low)):
        if not (is_number(value) and value > 0):
            raise MethodError(f"{name} must be a finite number above 0, not {value!r}; 1 means no scaling")
    check_number("tau_threshold", tau_threshold, above=0, below=1)
    if denominator not in ("as_reported", "symmetric"):
        raise MethodError(f"denominator must be 'as_reported' or 'symmetric', not {denominator!r}")


@dataclass(frozen=True)
class FEBCache(ScaledTableMethod):
    """FEB-Cache (arXiv 2503.07120 v2/v3): EB-Cache with MLP-only reuse, chosen by stage, and ``ε ← b(τ)·ε``.

    Attention makes the low frequencies, which are fragile while there is much noise, and the MLP the high ones, which are
    fragile afterwards. So the early steps may reuse the MLP alone and the late ones attention alone; either may reuse both.
    The states are the table's; every table of states is carried out. All blocks share the step's state, branch outputs are
    kept before their gate, and τ runs evenly over the sampler's steps, as for EB-Cache. The parameters of b(τ) are by default
    those that the table was calibrated with; of a table of other origin the published ones, 0.98, 0.96, 0.4, as reported.

    Attributes:
        table: the calibrated table, or its file; by default the one that ships for this model, where there is one. Its own
            ``eps_scale`` is not used; where FEB-Cache's calibration found a multiplier of b(τ), that is.
        eps_scale: factors to use instead of b(τ), one number or one per step.
        forecast_order: how reused branches are filled: 0, as in the paper, with the last value; 1 by linear extrapolation
            from the last two computed ones; by default the table's.
        b_high: b(τ) at the end of the early stage, above 0.
        b_low: what b(τ) falls to in the late stage, above 0.
        tau_threshold: τ at which the late stage begins, above 0 and below 1.
        denominator: of the late stage's exponent, ``"as_reported"`` or ``"symmetric"``; see :func:`noise_scale_curve`.
    """

    b_high: float | None = None
    b_low: float | None = None
    tau_threshold: float | None = None
    denominator: Denominator | None = None

    name: ClassVar[str] = "feb"
    paper: ClassVar[str] = "arXiv 2503.07120v3"
    summary: ClassVar[str] = "EB-Cache with MLP-only reuse early, attention-only late, noise scale b(τ)"

    def __post_init__(self) -> None:
        super().__post_init__()
        noise_scale_curve((), **self._given())  # refuses parameters out of range

    @classmethod
    def dit_xl_2(cls, table: CacheTable | str | Path) -> FEBCache:
        """DiT-XL/2 256², DDPM with 50 steps: b_h = 0.98, b_l = 0.96, τ_thre = 0.4, for a table of your own."""
        return cls(table, b_high=0.98, b_low=0.96, tau_threshold=0.4, denominator="as_reported")

    def prepare(self, denoiser: nn.Module, scheduler: Any) -> FEBCache:
        """Refuse a table whose calibration says what is no b(τ), too."""
        made = super().prepare(denoiser, scheduler)
        assert isinstance(made, FEBCache)
        try:
            noise_scale_curve((), **made._curve())
        except MethodError as error:
            raise TableError(f"the cache table's calibration.options: {error}") from None
        return made

    def noise_scale(self, facts: Facts) -> Sequence[float]:
        """b(τ) at every step."""
        if self.eps_scale is not None:
            return check_noise_scale(self.eps_scale, facts.num_steps)
        assert isinstance(self.table, CacheTable)
        multiplier = _multiplier(self.table)
        return [multiplier * b for b in noise_scale_curve(normalized_times(facts.num_steps), **self._curve())]

    def _given(self) -> dict[str, Any]:
        return {name: value for name in _PARAMETERS if (value := getattr(self, name)) is not None}

    def _curve(self) -> dict[str, Any]:
        """The parameters of b(τ): those given, else the calibration's; what neither says is as published."""
        assert isinstance(self.table, CacheTable)
        options = self.table.calibration.get("options") if self.table.method == self.name else None
        known = options if isinstance(options, dict) else {}
        return {name: known[name] for name in _PARAMETERS if name in known} | self._given()


def _multiplier(table: CacheTable) -> float:
    """What FEB-Cache's calibration found b(τ) should be multiplied by; 1 for tables of other origin."""
    if table.method != FEBCache.name:
        return 1.0
    value = table.calibration.get("multiplier", 1.0)
    if not (is_number(value) and value > 0):
        raise TableError(f"the cache table's calibration.multiplier must be a number above 0, not {value!r}")
    return value
