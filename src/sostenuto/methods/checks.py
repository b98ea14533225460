"""Refusals of parameters that make no sense, in one sentence each."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

from sostenuto.errors import MethodError
from sostenuto.measured import is_whole


def is_number(value: object) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf


def check_whole(name: str, value: object, least: int, most: int | None = None) -> None:
    """Refuse what is no whole number from ``least`` to ``most``.

    Raises:
        MethodError: with the name, the range and the value.
    """
    if not is_whole(value, least, most):
        span = f"of {least} or more" if most is None else f"from {least} to {most}"
        raise MethodError(f"{name} must be a whole number {span}, not {value!r}")


def check_finite(name: str, value: Any, least: float = -math.inf, most: float = math.inf) -> None:
    """Refuse what is no finite number from ``least`` to ``most``.

    Raises:
        MethodError: with the name, the range and the value.
    """
    if not (is_number(value) and least <= value <= most):
        bounds = [f"{word} {bound:g}" for word, bound in (("from", least), ("to", most)) if math.isfinite(bound)]
        raise MethodError(f"{name} must be {' '.join(['a finite number', *bounds])}, not {value!r}")


def check_number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
) -> None:
    """Refuse what is no finite number within these bounds: ``least`` and ``most`` themselves are in range.

    Raises:
        MethodError: with the name, the range and the value.
    """
    known = (
        ("above {:g}", operator.gt, above),
        ("of {:g} or more", operator.ge, least),
        ("below {:g}", operator.lt, below),
        ("at most {:g}", operator.le, most),
    )
    bounds = [(words.format(bound), holds, bound) for words, holds, bound in known if bound is not None]
    if not (is_number(value) and all(holds(value, bound) for _, holds, bound in bounds)):
        raise MethodError(f"{name} must be a number {' and '.join(words for words, *_ in bounds)}, not {value!r}")


def check_flag(name: str, value: object) -> None:
    """Refuse what is neither true nor false: any text would count as true.

    Raises:
        MethodError: with the name and the value.
    """
    if not isinstance(value, bool):
        raise MethodError(f"{name} is true or false, not {value!r}")


def check_choice(name: str, value: object, known: Sequence[str]) -> None:
    """Refuse what is none of the known words.

    Raises:
        MethodError: with the name, the words and the value.
    """
    if value not in known:
        raise MethodError(f"{name} must be one of {', '.join(known)}, not {value!r}")
