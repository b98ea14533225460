"""The cache tables that ship with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from sostenuto.errors import MethodError, TableError
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
