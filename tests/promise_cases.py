"""One example of every method for the promise matrix: on a tiny network, with a setting that skips and one that doesn't."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from diffusers import DDPMScheduler
from torch import nn

from conftest import build_tiny
from sostenuto import (
    FORA,
    L2C,
    PAB,
    ABCache,
    Action,
    CacheTable,
    DBCache,
    DeepCache,
    DeltaDiT,
    DiTFastAttn,
    DuCa,
    EBCache,
    EpsilonScaling,
    FEBCache,
    Forecast,
    MagCache,
    NoCache,
    Router,
    SmoothCache,
    StepState,
    TaylorSeer,
    TeaCache,
    TimeShift,
    ToCa,
)
from sostenuto.methods.base import Method
from unets import build_plain

C, A, M, B = StepState
ALL_COMPUTED = CacheTable((C,) * 6)
TABLE = CacheTable((C, B, A, C, B, C), eps_scale=(0.98,) * 6)
STACK = CacheTable((C, C, B, A, B, C), eps_scale=(0.98,) * 6, forecast_order=1, fill="stack")
SAMPLE = CacheTable((C, C, B, A, B, C), eps_scale=(0.98,) * 6, forecast_order=1, fill="sample")
SITES = tuple(f"transformer_blocks.{block}.{branch}" for block in range(3) for branch in ("attn1", "ff"))


def _router(gate: float) -> Router:
    """Three cache steps; every second gate is this logit, the others are open."""
    return Router(((gate, 9.0) * 3,) * 3, SITES, 6)


def _unet() -> nn.Module:
    return build_plain(1, num_class_embeds=11)


def _attention(letters: str) -> CacheTable:
    """All three self-attentions of the tiny network compute, reuse or run over a window together."""
    actions = {"C": Action.COMPUTE, "R": Action.REUSE, "W": Action.WINDOW}
    return CacheTable(
        tuple({f"transformer_blocks.{block}.attn1": actions[letter] for block in range(3)} for letter in letters)
    )


@dataclass(frozen=True)
class Case:
    """A method under test."""

    name: str
    method: Callable[[], Method]
    neutral: Callable[[], Method]
    """The same with nothing skipped or changed."""
    build: Callable[[], nn.Module] = build_tiny
    skips: bool = True
    inner: str = "transformer_blocks.1.ff"
    """A module deep inside."""

    def inner_module(self, model: nn.Module) -> nn.Module:
        return model.get_submodule(self.inner)


CASES = [
    Case("none", NoCache, NoCache, skips=False),
    Case("eb", lambda: EBCache(TABLE), lambda: EBCache(ALL_COMPUTED)),
    Case("eb, stack", lambda: EBCache(STACK), lambda: EBCache(ALL_COMPUTED)),
    Case("feb", lambda: FEBCache(CacheTable((C, M, B, C, A, C))), lambda: FEBCache(ALL_COMPUTED, eps_scale=1.0)),
    Case("ab", lambda: ABCache(warmup=2, interval=2), lambda: ABCache(warmup=6)),
    Case("ab, recursive", lambda: ABCache(3, 3, 3, "recursive"), lambda: ABCache(3, 6, 3, "recursive")),
    Case(
        "ab, sample",
        lambda: ABCache(warmup=2, interval=2, extrapolates="sample"),
        lambda: ABCache(warmup=6, extrapolates="sample"),
    ),
    Case("eb, sample", lambda: EBCache(SAMPLE), lambda: EBCache(ALL_COMPUTED)),
    Case("fora", lambda: FORA(2), lambda: FORA(1)),
    Case("toca", lambda: ToCa(fresh_ratio=0.2, middle_interval=None), lambda: ToCa(interval=1)),
    Case("duca", lambda: DuCa(fresh_ratio=0.2, middle_interval=None), lambda: DuCa(interval=1)),
    Case(
        "toca | eb scaling",
        lambda: ToCa(interval=2) | EpsilonScaling(1 / 0.98),
        lambda: ToCa(interval=1) | EpsilonScaling(1.0),
    ),
    Case("delta-dit", lambda: DeltaDiT(2, 0.5, 2), lambda: DeltaDiT(1)),
    Case("l2c", lambda: L2C(_router(-9.0)), lambda: L2C(_router(9.0))),
    Case("ditfastattn", lambda: DiTFastAttn(_attention("CWRWCR"), 3), lambda: DiTFastAttn(_attention("CCCCCC"), 3)),
    Case("pab", lambda: PAB(2, 2, 2, (0, 999), {700: ((1,), 1)}), lambda: PAB(1, 1, 1)),
    Case("smoothcache", lambda: SmoothCache(replace(TABLE, eps_scale=())), lambda: SmoothCache(ALL_COMPUTED)),
    Case("deepcache", lambda: DeepCache(2), lambda: DeepCache(1), _unet, inner="conv_in"),
    Case("taylorseer", lambda: TaylorSeer(2, 2, 2), lambda: TaylorSeer(1)),
    Case("taylorseer, lite", lambda: TaylorSeer(3, 1, 2, lite=True), lambda: TaylorSeer(1, lite=True)),
    Case("teacache", lambda: TeaCache(threshold=1.0), lambda: TeaCache(threshold=0.0)),
    Case("dbcache", lambda: DBCache(1, 1, 1.0, warmup=2, max_accumulated=1.5), lambda: DBCache(1, 1, 0.0)),
    Case("magcache", lambda: MagCache((1.0,) * 6, 0.1, 2), lambda: MagCache((1.0,) * 6, max_consecutive=0)),
    Case("epsilon-scaling", EpsilonScaling, lambda: EpsilonScaling(1.0), skips=False),
    Case("time-shift", TimeShift, lambda: TimeShift(cutoff=1000), skips=False),
    Case("fora | epsilon-scaling", lambda: FORA(2) | EpsilonScaling(1.01), lambda: FORA(1) | EpsilonScaling(1.0)),
    Case("fora | forecast", lambda: FORA(3) | Forecast(1), lambda: FORA(1) | Forecast(1)),
    Case(
        "ditfastattn | eb, mlp",
        lambda: DiTFastAttn(_attention("CWRWCR"), 3) | EBCache(CacheTable((C, M, C, M, M, C), forecast_order=1)),
        lambda: DiTFastAttn(_attention("CCCCCC"), 3) | EBCache(ALL_COMPUTED),
    ),
    Case(
        "taylorseer | epsilon-scaling",
        lambda: TaylorSeer(3, 1) | EpsilonScaling(1.01),
        lambda: TaylorSeer(1) | EpsilonScaling(1.0),
    ),
    Case(
        "deepcache | epsilon-scaling",
        lambda: DeepCache(2) | EpsilonScaling(1.01),
        lambda: DeepCache(1) | EpsilonScaling(1.0),
        _unet,
        inner="conv_in",
    ),
    Case(
        "l2c | epsilon-scaling",
        lambda: L2C(_router(-9.0)) | EpsilonScaling(1.01),
        lambda: L2C(_router(9.0)) | EpsilonScaling(1.0),
    ),
    Case(
        "magcache | time-shift",
        lambda: MagCache((1.0,) * 6, 0.1, 2) | TimeShift(),
        lambda: MagCache((1.0,) * 6, max_consecutive=0) | TimeShift(cutoff=1000),
    ),
]


def build(case: Case) -> nn.Module:
    return case.build()


def new_scheduler(case: Case) -> DDPMScheduler:
    return DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
