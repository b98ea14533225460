"""What a tuning is known by, and what its folder was found with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sostenuto.calibrations import claims
from sostenuto.calibrations.base import Settings
from sostenuto.tuning.instrumented import BEGUN
from sostenuto.tuning.options import TuneOptions
from sostenuto.tuning.rehearsal import Rehearsal

FOUND = ("measurement.npz", BEGUN, "trials.json", "response.json")
"""The files of a folder that hold what was found; the second as long as an instrumented run isn't done."""


def setting(settings: Settings, options: TuneOptions) -> dict[str, Any]:
    """What is known before anything runs."""
    return {
        **claims.measured_with(settings),
        "trial_samples": options.trial_samples,
        "kinds": None if options.kinds is None else sorted(options.kinds),
    }


def rehearsed(settings: Settings, sample: Rehearsal, scored: Rehearsal | None) -> dict[str, Any]:
    """What the rehearsals showed of the samples, and of the score, where there is one."""
    found: dict[str, Any] = {"sample": [list(pair) for pair in sample.sketch]}
    if settings.score is not None and scored is not None:
        found |= {
            "score": _name_of(settings.score),
            "scored rows": scored.rows,
            "score_sample": [list(pair) for pair in scored.sketch],
            "score of noise": scored.score,
        }
    return found


def claim(folder: Path, made_with: dict[str, Any], begun: bool = False, timed: bool = True) -> None:
    """Make the folder that of a tuning with these settings, see :func:`sostenuto.calibrations.claims.claim`."""
    claims.claim(folder, "tuning", made_with, FOUND, begun, timed)


def _name_of(function: Callable[..., Any]) -> str:
    """The qualified name of a function, a method, what a partial is of, or an object's class."""
    named = getattr(function, "func", function)
    named = named if hasattr(named, "__qualname__") else type(named)
    return f"{named.__module__}.{named.__qualname__}"
