"""The emergency switch: with ``SOSTENUTO_DISABLE=1`` in the environment nothing is attached to anything."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import cache
from typing import Any

from sostenuto.errors import EngineError
from sostenuto.stats import Statistics

VARIABLE = "SOSTENUTO_DISABLE"
_OFF = ("", "0", "false", "no", "off")

_log = logging.getLogger("sostenuto")


def is_switched_off() -> bool:
    """Whether the environment says that caching is off: any value but an empty one, 0, false, no and off."""
    return os.environ.get(VARIABLE, "").strip().lower() not in _OFF


def check_not_switched_off(what: str) -> None:
    """Refuse work that is about caching while the switch is set.

    Raises:
        EngineError: it is set.
    """
    if is_switched_off():
        raise EngineError(
            f"{VARIABLE} is set, with which nothing is cached: {what} would show the uncached sampler alone; unset it"
        )


class DisabledHandle:
    """What :func:`sostenuto.enable` returns while the switch is set: it does nothing, and its statistics say so.

    Attributes:
        method: none.
        plan: none.
        noise_scale: none.
        sites: none.
        last_actions: none.
    """

    method = plan = noise_scale = None
    sites = last_actions = ()

    def __init__(self) -> None:
        _warn()

    @property
    def stats(self) -> Statistics:
        """Statistics of nothing, with ``disabled`` set."""
        return Statistics.of_nothing()

    @property
    def predicted_cache_bytes(self) -> int:
        """0: nothing is kept."""
        return 0

    @property
    def enabled(self) -> bool:
        """False: no method is attached."""
        return False

    def share(self, pipeline: Any) -> None:
        """Does nothing."""

    def listen(self, listener: Callable[..., None]) -> None:
        """Does nothing: there are no generations to tell of."""

    def disable(self) -> None:
        """Does nothing."""

    def __enter__(self) -> DisabledHandle:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@cache
def _warn() -> None:
    """Once a process: an operator should see it, a server's log needn't be full of it."""
    _log.warning("%s is set: sostenuto attaches nothing, every step is computed", VARIABLE)
