"""MagCache: skip all blocks while the accumulated change in size of their residual stays small (arXiv 2506.09045)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from sostenuto.errors import MethodError, TableError
from sostenuto.measured import Measured, check_numbers
from sostenuto.methods import published
from sostenuto.methods.base import Facts, Method, whole_steps
from sostenuto.methods.checks import check_finite, check_whole
from sostenuto.plan import Plan
from sostenuto.sites import Site, stack

# Of FLUX.1-dev, 28 steps, from the authors' code.
_FLUX_DEV = (
    *(1.0, 1.21094, 1.11719, 1.07812, 1.0625, 1.03906, 1.03125, 1.03906, 1.02344, 1.03125, 1.02344, 0.98047, 1.01562),
    *(1.00781, 1.0, 1.00781, 1.0, 1.00781, 1.0, 1.0, 0.99609, 0.99609, 0.98047, 0.98828, 0.96484, 0.95703, 0.93359),
    0.89062,
)


_DEFAULTS = {"threshold": 0.06, "max_consecutive": 3, "retention": 0.2}  # diffusers'


@dataclass(frozen=True)
class MagCacheRatios(Measured):
    """The magnitude ratios of a model and sampler, one per step in sampling order.

    Attributes:
        ratios: ``γ_p = mean_tokens(‖r_p‖ / ‖r_{p−1}‖)`` of the residual r of all blocks, above 0; the first one is 1.
    """

    ratios: tuple[float, ...]

    format: ClassVar[str] = "sostenuto-magcache"
    what: ClassVar[str] = "ratio table"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "ratios", check_ratios(self.ratios))


@dataclass(frozen=True)
class MagCache(Method):
    """MagCache (arXiv 2506.09045): how the size of the residual changes depends on the model and sampler, hardly on the prompt.

    From the last computed step on the ratios are multiplied, and what the product deviates from 1 is summed up as the error
    of skipping: ``prod ← prod·γ_p, err ← err + |1 − prod|``. A step is skipped, ``x_out = x_in + R``, while ``err ≤ δ`` and no
    more than K were skipped in a row. All of it follows from the ratios alone, so the plan is known before the first step.

    A ratio table of another length is read at the nearest index. The steps kept at the beginning are rounded as in the authors'
    code for FLUX, ``⌊retention·S + ½⌋`` (that for HunyuanVideo and Qwen-Image rounds down); the last step is not forced to
    compute. All passes of a step follow one plan.

    Attributes:
        ratios: γ for each step, or the measured :class:`MagCacheRatios`, or its file.
        threshold: the paper's δ, 0 (skips only what changes nothing) or more; by default what the calibration chose for a
            cost, else 0.06.
        max_consecutive: the paper's K, most steps skipped in a row, 0 (no caching) or more; by default as for the threshold,
            else 3.
        retention: share of the steps at the beginning that are computed, 0 to 1; the first one is in any case. By default as
            for the threshold, else 0.2.
        always_computed: indices into the ratio table that are never skipped.
    """

    ratios: tuple[float, ...] | MagCacheRatios | str | Path | None = None
    threshold: float | None = None
    max_consecutive: int | None = None
    retention: float | None = None
    always_computed: tuple[int, ...] = ()

    name: ClassVar[str] = "magcache"
    paper: ClassVar[str] = "arXiv 2506.09045"
    summary: ClassVar[str] = "skips all blocks by the measured change in size of what they add"
    calibrated: ClassVar[bool] = True
    state: ClassVar[str] = "one residual of all blocks"
    bytes_per_token: ClassVar[str] = "b × d"

    def __post_init__(self) -> None:
        if isinstance(self.ratios, (list, tuple)):
            try:
                object.__setattr__(self, "ratios", check_ratios(self.ratios))
            except TableError as error:
                raise MethodError(f"MagCache's {error}") from None
        elif self.ratios is not None and not isinstance(self.ratios, (MagCacheRatios, str, Path)):
            raise MethodError(f"MagCache's ratios are numbers, a MagCacheRatios or its file, not {self.ratios!r}")
        if self.threshold is not None:
            check_finite("MagCache's threshold", self.threshold, 0)
        if self.max_consecutive is not None:
            check_whole("MagCache's max_consecutive", self.max_consecutive, least=0)
        if self.retention is not None:
            check_finite("MagCache's retention", self.retention, 0, 1)
        if not isinstance(self.always_computed, (list, tuple)):
            raise MethodError(f"MagCache's always_computed lists indices, not {self.always_computed!r}")
        for index in self.always_computed:
            check_whole("each entry of MagCache's always_computed", index, least=0)

    @classmethod
    def flux_dev(cls) -> MagCache:
        """FLUX.1-dev, 28 steps: δ = 0.24, K = 5, retention 0.1 (2.8×); the authors' code never skips step 11."""
        ratios = MagCacheRatios(
            _FLUX_DEV, model=published.FLUX_DEV, scheduler={"class": "FlowMatchEulerDiscreteScheduler"}
        )
        return cls(ratios, threshold=0.24, max_consecutive=5, retention=0.1, always_computed=(11,))

    @classmethod
    def hunyuan_video(
        cls,
        ratios: tuple[float, ...] | MagCacheRatios | str | Path,
        threshold: float = 0.24,
        max_consecutive: int = 6,
    ) -> MagCache:
        """HunyuanVideo: δ = 0.24, K = 6, retention 0.2 (2.8×), for ratios of your own; 0.12 and 4 are slower and closer."""
        return cls(ratios, threshold=threshold, max_consecutive=max_consecutive, retention=0.2)

    @classmethod
    def wan_1_3b(cls, ratios: tuple[float, ...] | MagCacheRatios | str | Path) -> MagCache:
        """Wan 2.1 1.3B: δ = 0.12, K = 4, retention 0.2, for ratios of your own."""
        return cls(ratios, threshold=0.12, max_consecutive=4, retention=0.2)

    @classmethod
    def wan_14b(cls, ratios: tuple[float, ...] | MagCacheRatios | str | Path) -> MagCache:
        """Wan 2.1 14B: δ = 0.24, K = 6, retention 0.2, for ratios of your own."""
        return cls(ratios, threshold=0.24, max_consecutive=6, retention=0.2)

    @classmethod
    def qwen_image(cls, ratios: tuple[float, ...] | MagCacheRatios | str | Path) -> MagCache:
        """Qwen-Image: δ = 0.06, K = 2, retention 0.2 (1.5×), for ratios of your own."""
        return cls(ratios, threshold=0.06, max_consecutive=2, retention=0.2)

    def prepare(self, denoiser: nn.Module, scheduler: Any) -> MagCache:
        """Load the ratios and refuse those that were measured on something else."""
        ratios = self.ratios
        if ratios is None:
            raise MethodError(
                "MagCache needs the ratios of this model and sampler: sostenuto.calibrate(pipe, 'magcache', …) measures "
                "them; pass them as ratios=…"
            )
        if isinstance(ratios, (str, Path)):
            ratios = MagCacheRatios.load(ratios)
        if isinstance(ratios, MagCacheRatios):
            ratios.check(denoiser, scheduler)
            chosen = {name: ratios.calibration[name] for name in _DEFAULTS if name in ratios.calibration}
            left = {name: value for name, value in chosen.items() if getattr(self, name) is None}
            return replace(self, ratios=ratios, **left)._checked(len(ratios.ratios))
        return replace(self, ratios=ratios)._checked(len(ratios))

    def _checked(self, num_ratios: int) -> MagCache:
        beyond = [index for index in self.always_computed if index >= num_ratios]
        if beyond:
            raise MethodError(f"MagCache's always_computed names entry {beyond[0]}, but there are {num_ratios} ratios")
        return self

    def sites(self, denoiser: nn.Module) -> list[Site]:
        """The residual of all blocks."""
        return [stack(denoiser)]

    def plan(self, facts: Facts) -> Plan:
        """Skip as long as the accumulated deviation allows."""
        table = self.ratios.ratios if isinstance(self.ratios, MagCacheRatios) else self.ratios
        assert isinstance(table, tuple)
        return whole_steps(facts, self.skipped(table, facts.num_steps, facts.first_step))

    def skipped(self, ratios: Sequence[float], num_steps: int, first_step: int = 0) -> list[bool]:
        """Which steps are skipped with these ratios, in sampling order; steps before ``first_step`` are left out."""
        given = ((default, getattr(self, name)) for name, default in _DEFAULTS.items())
        threshold, most, retention = (default if value is None else value for default, value in given)
        kept = first_step + max(1, int(retention * (num_steps - first_step) + 0.5))
        skip: list[bool] = []
        product, error, skipped = 1.0, 0.0, 0
        for p, index in enumerate(nearest_indices(len(ratios), num_steps)):
            if p < kept:
                skip.append(False)
                continue
            product *= ratios[index]
            error += abs(1 - product)
            skipped += 1
            skip.append(error <= threshold and skipped <= most and index not in self.always_computed)
            if not skip[-1]:
                product, error, skipped = 1.0, 0.0, 0
        return skip


def check_ratios(ratios: Any) -> tuple[float, ...]:
    """The ratios as floats.

    Raises:
        TableError: there are none, or one of them is not finite and above 0.
    """
    values = check_numbers("ratios", ratios)
    for step, value in enumerate(values):
        if value <= 0:
            raise TableError(f"ratios must be above 0, but the one of step {step} is {value:g}")
    return values


def nearest_indices(length: int, num_steps: int) -> Sequence[int]:
    """For each step the nearest entry of a table of this length, ``round(p·(length − 1)/(S − 1))``."""
    return [round(p * (length - 1) / max(1, num_steps - 1)) for p in range(num_steps)]
