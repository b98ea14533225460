"""The cache tables and routers that ship with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from sostenuto.errors import MethodError, TableError
from sostenuto.router import Router
from sostenuto.table import CacheTable

_FOLDER = Path(__file__).parent


def shipped_table(denoiser: nn.Module, scheduler: Any, method: str) -> CacheTable:
    """The first shipped table, by file name, that this method's calibration made for this network and scheduler.

    Raises:
        MethodError: there is none.
    """
    for path in sorted(_FOLDER.glob("*.json")):
        table = CacheTable.load(path)
        if table.method != method:
            continue
        try:
            table.check(denoiser, scheduler)
        except TableError:
            continue
        return table
    raise MethodError(
        f"no {method} table ships for this {type(denoiser).__name__} with {type(scheduler).__name__}: make one with "
        "sostenuto.calibrate and pass it as table=…"
    )


def shipped_routers(denoiser: nn.Module, scheduler: Any) -> dict[int, Router]:
    """The shipped routers that were made for this network and scheduler, by their number of steps.

    Raises:
        MethodError: there is none.
    """
    found: dict[int, Router] = {}
    for path in sorted(_FOLDER.glob("*.safetensors")):
        router = Router.load(path)
        try:
            router.check(denoiser, scheduler)
        except TableError:
            continue
        found.setdefault(router.num_inference_steps, router)
    if not found:
        raise MethodError(
            f"no router ships for this {type(denoiser).__name__} with {type(scheduler).__name__}: train one with "
            "sostenuto.calibrate and pass it as router=…"
        )
    return found


def shipped_router(denoiser: nn.Module, scheduler: Any, num_inference_steps: int) -> Router:
    """The shipped router for this network, scheduler and number of steps.

    Raises:
        MethodError: there is none.
    """
    routers = shipped_routers(denoiser, scheduler)
    if num_inference_steps not in routers:
        raise MethodError(
            f"routers ship for {', '.join(map(str, sorted(routers)))} steps, the sampler runs {num_inference_steps}: pass "
            "one of these as num_inference_steps, or train a router with sostenuto.calibrate"
        )
    return routers[num_inference_steps]
