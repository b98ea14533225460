"""Which settings of a method come nearest to a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import nn

from sostenuto import methods
from sostenuto.errors import InputError, SostenutoError
from sostenuto.methods.base import Facts, Method
from sostenuto.plan import Action

_SHIPPED = Path(methods.__file__).parents[1] / "tables"
_INTERVALS = range(2, 9)
_CANDIDATES: dict[str, Callable[[], Iterable[Method]]] = {
    "none": lambda: [methods.NoCache()],
    "eb": lambda: [methods.EBCache(path) for path in sorted(_SHIPPED.glob("*x.json")) if "-feb-" not in path.name],
    "feb": lambda: [methods.FEBCache(path) for path in sorted(_SHIPPED.glob("*-feb-*x.json"))],
    "fora": lambda: [methods.FORA(n) for n in _INTERVALS],
    "fora-linear": lambda: [methods.FORA(n, forecast_order=1) for n in _INTERVALS],
    "taylorseer": lambda: [methods.TaylorSeer(interval=n, order=2) for n in _INTERVALS],
    "ab": lambda: [methods.ABCache(order=2, interval=n) for n in _INTERVALS],
    "ab-sample": lambda: [methods.ABCache(order=2, warmup=2, interval=n, extrapolates="sample") for n in _INTERVALS],
    "duca": lambda: [methods.DuCa(interval=n) for n in _INTERVALS],
    "toca": lambda: [methods.ToCa(interval=n) for n in _INTERVALS],
    "dbcache": lambda: [methods.DBCache.first_block_cache(threshold) for threshold in (0.02, 0.05, 0.1, 0.2, 0.4)],
}
_RUN_TIME_BUDGETS = (1.2, 1.5, 2.0, 3.0, 4.0)  # a first guess: what a threshold saves is known after the run


def names() -> list[str]:
    """The methods that can be chosen; ``fora-linear`` is FORA with linear forecasts, ``ab-sample`` AB-Cache of x₀."""
    return list(_CANDIDATES)


def choose(name: str, speedup: float, denoiser: nn.Module, scheduler: Any, timesteps: tuple[float, ...]) -> Method:
    """The settings of a method whose predicted speed-up is nearest to the budget.

    Args:
        name: one of :func:`names`.
        speedup: the budget, 1 or more.
        denoiser: the network.
        scheduler: its scheduler.
        timesteps: of the generation, in sampling order.

    Raises:
        InputError: the name is unknown, the budget below 1, or nothing of the method fits this model and number of steps.
    """
    if name not in _CANDIDATES:
        raise InputError(f"{name!r} is no method of the studio: choose one of {', '.join(_CANDIDATES)}")
    if not 1 <= speedup <= 20:
        raise InputError(f"the budget must be a speed-up of 1 to 20, not {speedup!r}")
    found: list[tuple[float, int, Method]] = []
    reason = ""
    for index, method in enumerate(_CANDIDATES[name]()):
        try:
            predicted = predicted_speedup(method, denoiser, scheduler, timesteps)
        except SostenutoError as error:
            reason = str(error)
            continue
        if predicted is None:
            predicted = _RUN_TIME_BUDGETS[min(index, len(_RUN_TIME_BUDGETS) - 1)]
        found.append((abs(predicted - speedup), index, method))
    if not found:
        raise InputError(f"{name} doesn't fit here: {reason}")
    return min(found)[2]


def predicted_speedup(
    method: Method, denoiser: nn.Module, scheduler: Any, timesteps: tuple[float, ...]
) -> float | None:
    """The share of sites that a plan computes, inverted; ``None`` for what decides while it runs."""
    ready = method.prepare(denoiser, scheduler)
    sites = ready.sites(denoiser)
    facts = Facts(sites, timesteps, denoiser, scheduler)
    plan = ready.plan(facts)
    if plan is None:
        return None if ready.policy(facts) is not None else 1.0
    branches = [index for index, site in enumerate(sites) if not site.kind.is_whole] or list(range(len(sites)))
    spent = 0.0
    for step, row in enumerate(plan.actions):
        for index in branches:
            if row[index] is Action.PARTIAL:
                spent += plan.ratios[step][index]
            elif row[index] not in (Action.REUSE, Action.FORECAST, Action.SKIP):
                spent += 1
    return len(branches) * plan.num_steps / max(spent, 1)
