"""What the numbers in a folder were found with: another setting is refused, so that none is taken for what it isn't."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sostenuto import compat
from sostenuto.calibrations.base import Settings
from sostenuto.cost import autocast_state
from sostenuto.engine import scheduler_of
from sostenuto.errors import InputError
from sostenuto.files import publish_json
from sostenuto.machine import where
from sostenuto.measured import fingerprint, is_number, read_json
from sostenuto.tuning.instrumented import BEGUN
from sostenuto.tuning.options import TuneOptions
from sostenuto.tuning.rehearsal import SAME, Rehearsal, same

MACHINE = "machine"
"""What times were taken on; only what is reckoned in them depends on it."""
_SKETCHES = ("sample", "score_sample")
FOUND = ("measurement.npz", BEGUN, "trials.json", "response.json")
"""The files of a folder that hold what was found; the second as long as an instrumented run isn't done."""


def setting(settings: Settings, options: TuneOptions) -> dict[str, Any]:
    """What is known before anything runs."""
    denoiser = compat.unwrapped(compat.find_denoiser(settings.target))
    sampler = scheduler_of(settings.target, settings.scheduler)
    weights = sum(float(parameter.detach().double().abs().sum()) for parameter in denoiser.parameters())
    # What begins with an underscore is diffusers' own bookkeeping, in an order that changes from process to process.
    chosen = {key: value for key, value in dict(getattr(sampler, "config", {})).items() if not key.startswith("_")}
    config = json.dumps(chosen, sort_keys=True, default=str)
    dtypes = [
        next(denoiser.parameters()).dtype,
        *(f"autocast to {dtype} on {kind}" for kind, dtype in autocast_state()),
    ]
    return {
        "model": fingerprint(denoiser),
        "weights": f"{weights:.8e}",
        "dtype": ", ".join(str(dtype).replace("torch.", "") for dtype in dtypes),
        "scheduler": f"{type(sampler).__name__} {hashlib.sha256(config.encode()).hexdigest()[:12]}",
        "num_inference_steps": settings.num_inference_steps,
        "num_samples": settings.num_samples,
        "seed": settings.seed,
        "trial_samples": options.trial_samples,
        "kinds": None if options.kinds is None else sorted(options.kinds),
        MACHINE: where(next(denoiser.parameters()).device),
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
    """Make the folder that of these settings.

    Args:
        folder: is made where there is none.
        made_with: the settings.
        begun: whether the folder may lack some of them, which are then added.
        timed: whether times decide, so that those of another machine are none.

    Raises:
        InputError: it holds what was found with others; the message names what differs and the remedy.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.json"
    known: Any = read_json(path, "record of a tuning") if path.exists() else {}
    if not isinstance(known, dict):
        raise InputError(f"{path} is no record of a tuning: use another folder")
    if not begun and not any(any(folder.glob(name)) for name in FOUND):
        known = {}  # of a call that was refused before it found anything
    if known.get(MACHINE) and not timed:
        made_with = {**made_with, MACHINE: known[MACHINE]}
    for key in made_with if known else ():
        before, now = known.get(key), made_with[key]
        if _is_same(before, now) or (begun and before is None):
            continue
        if key not in _SKETCHES:
            raise InputError(f"{folder} holds a tuning with another {key} ({before}, now {now}): use another folder")
        raise InputError(
            f"{folder} holds a tuning with another {key}: its sizes, labels, prompts, guidance or noise were others; use "
            "another folder (where nothing was changed: draw all noise from the generator that it is given)"
        )
    publish_json(path, {**known, **made_with}, indent=1)


def _is_same(before: Any, now: Any) -> bool:
    """Whether two entries say the same; sketches and scores but for rounding."""
    if isinstance(now, float) and is_number(before):
        return math.isclose(before, now, rel_tol=SAME)
    if before == now or not (isinstance(before, list) and isinstance(now, list)):
        return before == now
    try:
        return same(before, now)
    except (TypeError, ValueError, IndexError):
        return False  # another kind of list, or a damaged one


def _name_of(function: Callable[..., Any]) -> str:
    """The qualified name of a function, a method, what a partial is of, or an object's class."""
    named = getattr(function, "func", function)
    named = named if hasattr(named, "__qualname__") else type(named)
    return f"{named.__module__}.{named.__qualname__}"
