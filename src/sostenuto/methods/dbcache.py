"""DBCache: the first blocks always run and tell whether the middle ones are worth running (cache-dit); FirstBlockCache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from sostenuto.block_tap import BlocksTap
from sostenuto.errors import MethodError
from sostenuto.forecast import check_forecast_order
from sostenuto.methods.base import Facts, Method
from sostenuto.methods.checks import check_choice, check_finite, check_number, check_whole, is_whole
from sostenuto.signals import relative_l1
from sostenuto.sites import Site, block_range, stack_range

# Front blocks and most steps in a row → threshold, of cache-dit's benchmark.
_FLUX_DEV = {(8, None): 0.08, (8, 2): 0.12, (8, 3): 0.12, (4, 3): 0.12, (4, 4): 0.12}


@dataclass(frozen=True)
class DBCache(Method):
    """Dual-block cache (cache-dit), and with one block in front and none behind FirstBlockCache (ParaAttention).

    The front blocks always run. What they add to their input, r, is compared with r of the last computed step:
    ``d = mean|r − r₀| / mean|r₀|``, taken in float32. While ``d < threshold`` the middle blocks are skipped and their kept
    residual is added; the back blocks always run and correct. Each pass of a step decides for itself.

    Attributes:
        front_blocks: F_n, blocks that always run and give the signal, 1 or more.
        back_blocks: B_n, blocks behind the skipped ones that always run, 0 or more; one block at least is left between.
        threshold: bound of d. At 0 and below nothing is ever cached; at 1 and above everything that the counts below allow.
        warmup: steps at the beginning of the generation that are computed, 0 or more; the first one is in any case.
        max_cached: most steps of a generation that are cached; ``None``: no bound.
        max_consecutive: most steps in a row that are cached, 1 or more; ``None``: no bound.
        forecast_order: how the middle residual is filled: 0 with the last value, 1 by linear extrapolation from the last two
            computed ones, 2 by the quadratic through three (TaylorSeer's divided differences); up to 4.
        compare_to: the step whose r is r₀: ``"last_computed"``, or ``"previous"`` as in some ports.
        max_accumulated: bound, above 0, of the sum of d over the steps cached in a row, this one included; ``None``: no bound.
        warmup_interval: of the warm-up every so many steps are computed, 1 or more; d and the counts decide about the others.
        steps_computation_mask: for every step of the scheduler 1, must be computed, or 0, may be cached; it takes the place of
            the warm-up. Where a generation begins is computed in any case.
        steps_computation_policy: who decides about the steps marked 0: ``"dynamic"``, d and the counts; ``"static"``, nobody:
            all of them are cached.
        keep: what is kept of the middle blocks: the ``"residual"`` that they add to their input, or the ``"hidden"`` states
            that they return, with which a cached step forgets its own input.
    """

    front_blocks: int = 8
    back_blocks: int = 0
    threshold: float = 0.08
    warmup: int = 8
    max_cached: int | None = None
    max_consecutive: int | None = None
    forecast_order: int = 0
    compare_to: Literal["last_computed", "previous"] = "last_computed"
    max_accumulated: float | None = field(default=None, kw_only=True)
    warmup_interval: int = field(default=1, kw_only=True)
    steps_computation_mask: tuple[int, ...] | None = field(default=None, kw_only=True)
    steps_computation_policy: Literal["dynamic", "static"] = field(default="dynamic", kw_only=True)
    keep: Literal["residual", "hidden"] = field(default="residual", kw_only=True)

    name: ClassVar[str] = "dbcache"
    paper: ClassVar[str] = "cache-dit"
    summary: ClassVar[str] = "skips the middle blocks while what the first ones add hardly changes"
    compiles: ClassVar[bool] = False
    state: ClassVar[str] = (
        "one residual of the middle blocks per order of the forecast and one more, one of the front blocks"
    )
    bytes_per_token: ClassVar[str] = "b × d × (order + 2)"

    def __post_init__(self) -> None:
        check_whole("DBCache's front_blocks", self.front_blocks, least=1)
        check_whole("DBCache's back_blocks", self.back_blocks, least=0)
        check_finite("DBCache's threshold", self.threshold)
        check_whole("DBCache's warmup", self.warmup, least=0)
        if self.max_cached is not None:
            check_whole("DBCache's max_cached", self.max_cached, least=0)
        if self.max_consecutive is not None:
            check_whole("DBCache's max_consecutive", self.max_consecutive, least=1)
        check_forecast_order(self.forecast_order)
        if self.compare_to not in ("last_computed", "previous"):
            raise MethodError(f"DBCache's compare_to must be 'last_computed' or 'previous', not {self.compare_to!r}")
        if self.max_accumulated is not None:
            check_number("DBCache's max_accumulated", self.max_accumulated, above=0)
        check_whole("DBCache's warmup_interval", self.warmup_interval, least=1)
        check_choice("DBCache's steps_computation_policy", self.steps_computation_policy, ("dynamic", "static"))
        check_choice("DBCache's keep", self.keep, ("residual", "hidden"))
        self._check_mask()

    def _check_mask(self) -> None:
        mask = self.steps_computation_mask
        if mask is None:
            if self.steps_computation_policy == "static":
                raise MethodError(
                    "DBCache's steps_computation_policy 'static' needs a steps_computation_mask, which says what is computed"
                )
            return
        if not (isinstance(mask, tuple) and mask and all(is_whole(mark, least=0, most=1) for mark in mask)):
            raise MethodError(
                f"DBCache's steps_computation_mask must be a tuple of 0 and 1, one per step, not {mask!r}"
            )
        if not mask[0]:
            raise MethodError(
                "DBCache's steps_computation_mask must begin with 1: at step 0 there is nothing to reuse yet"
            )

    @classmethod
    def first_block_cache(cls, threshold: float = 0.05) -> DBCache:
        """FirstBlockCache: F1 B0 without warm-up; 0.05 is its default, 0.08 to 0.12 are usual for FLUX."""
        return cls(front_blocks=1, back_blocks=0, threshold=threshold, warmup=0)

    @classmethod
    def flux_dev(cls, front_blocks: int = 8, max_consecutive: int | None = None) -> DBCache:
        """FLUX.1-dev, 50 steps: F8 B0, warm-up 4, threshold 0.08 (1.80×).

        With 2 or 3 steps in a row the threshold is 0.12 (1.93×, 2.05×), and with F4 and 3 or 4 (2.47×, 2.66×).
        """
        if (front_blocks, max_consecutive) not in _FLUX_DEV:
            known = ", ".join(map(str, _FLUX_DEV))
            raise MethodError(
                f"for FLUX.1-dev (front_blocks, max_consecutive) were published as {known}, not "
                f"{(front_blocks, max_consecutive)}: make a DBCache of your own"
            )
        threshold = _FLUX_DEV[front_blocks, max_consecutive]
        return cls(front_blocks, back_blocks=0, threshold=threshold, warmup=4, max_consecutive=max_consecutive)

    @classmethod
    def qwen_image_lightning(cls, front_blocks: int = 16, back_blocks: int = 16) -> DBCache:
        """Qwen-Image-Lightning, 4 steps: F16 B16, warm-up 2, one step in a row, threshold 0.8 (1.12×); F1 B0 is 1.33×."""
        return cls(front_blocks, back_blocks, threshold=0.8, warmup=2, max_consecutive=1)

    def prepare(self, denoiser: nn.Module, scheduler: Any) -> DBCache:
        """Refuse a network that has no block left between front and back."""
        first, last = stack_range(denoiser)
        count = last - first + 1
        if self.front_blocks + self.back_blocks >= count:
            raise MethodError(
                f"DBCache's front_blocks and back_blocks are {self.front_blocks} and {self.back_blocks}, but the network has "
                f"{count} blocks: leave one between them to be skipped"
            )
        return self

    def sites(self, denoiser: nn.Module) -> list[Site]:
        """The middle blocks."""
        first, last = stack_range(denoiser)
        return [
            block_range(denoiser, first + self.front_blocks, last - self.back_blocks, residual=self.keep == "residual")
        ]

    def tap(self, site: Site, denoiser: nn.Module) -> BlocksTap:
        """Watches what the front blocks add."""
        return BlocksTap(site, denoiser, watch="front-residual")

    def policy(self, facts: Facts) -> _Policy:
        """Compare what the front blocks add.

        Raises:
            MethodError: ``steps_computation_mask`` is for another number of steps.
        """
        mask = self.steps_computation_mask
        if mask is not None and len(mask) != facts.num_steps:
            raise MethodError(
                f"DBCache's steps_computation_mask has {len(mask)} steps, the sampler runs {facts.num_steps}: give one "
                "mark per step"
            )
        return _Policy(self, facts.first_step)


class _Policy:
    def __init__(self, method: DBCache, first_step: int) -> None:
        self._method, self.forecast_order = method, method.forecast_order
        self._first_step = first_step
        self._reference: torch.Tensor | None = None
        self._cached = self._in_a_row = 0
        self._accumulated = 0.0  # change over the steps cached in a row

    def skips(self, step: int, num_steps: int, signal: torch.Tensor, computed: Sequence[int]) -> bool:
        """Whether the signal is close enough and the counts allow it."""
        is_static = self._method.steps_computation_policy == "static"
        caches = bool(computed) and not self._must_compute(step)
        caches = caches and (is_static or (self._may_cache() and self._is_close(signal)))
        self._cached += caches
        self._in_a_row = self._in_a_row + 1 if caches else 0
        self._accumulated = self._accumulated if caches else 0.0
        if not caches or self._method.compare_to == "previous":
            self._reference = signal.detach()
        return caches

    def _must_compute(self, step: int) -> bool:
        mask, since = self._method.steps_computation_mask, step - self._first_step
        if mask is not None:
            return mask[step] == 1
        return since < self._method.warmup and since % self._method.warmup_interval == 0

    def _may_cache(self) -> bool:
        most, most_in_a_row = self._method.max_cached, self._method.max_consecutive
        return (most is None or self._cached < most) and (most_in_a_row is None or self._in_a_row < most_in_a_row)

    def _is_close(self, signal: torch.Tensor) -> bool:
        threshold, most = self._method.threshold, self._method.max_accumulated
        if threshold <= 0 or (threshold >= 1 and most is None):
            return threshold >= 1
        assert self._reference is not None
        change = relative_l1(signal, self._reference)
        self._accumulated += change
        # From a threshold of 1 on the front residual may change by more than its own size.
        return (threshold >= 1 or change < threshold) and (most is None or self._accumulated < most)

    @property
    def num_bytes(self) -> int:
        """Of the reference."""
        return 0 if self._reference is None else self._reference.nbytes
