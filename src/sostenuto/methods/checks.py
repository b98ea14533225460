"""Refusals of parameters that make no sense, in one sentence each."""

from __future__ import annotations

import math
from typing import Any

from sostenuto.errors import MethodError


def check_whole(name: str, value: Any, least: int) -> None:
    """Refuse what is no whole number of ``least`` or more.

    Raises:
        MethodError: with the name and the value.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise MethodError(f"{name} must be a whole number of {least} or more, not {value!r}")


def check_finite(name: str, value: Any, least: float = -math.inf, most: float = math.inf) -> None:
    """Refuse what is no finite number from ``least`` to ``most``.

    Raises:
        MethodError: with the name and the value.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and math.isfinite(value) and least <= value <= most:
        return
    bounds = [f"{word} {bound:g}" for word, bound in (("from", least), ("to", most)) if math.isfinite(bound)]
    raise MethodError(f"{name} must be {' '.join(['a finite number', *bounds])}, not {value!r}")
