"""What the numbers in a folder were found with: another setting is refused, so that none is taken for what it isn't."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sostenuto import compat
from sostenuto.calibrations.base import Settings
from sostenuto.cost import autocast_state
from sostenuto.distributed.world import gather, world
from sostenuto.engine import scheduler_of
from sostenuto.errors import InputError
from sostenuto.files import publish_json
from sostenuto.measured import fingerprint, is_number, read_json

MACHINE = "machine"
"""What times were taken on; only what is reckoned in them depends on it."""
Sketch = Sequence[Sequence[float]]
"""Root mean square and one projection of each of some tensors."""
SAME = 0.01
"""Relative difference of what is the same: embeddings and sums are rounded in other ways on other machines."""
SEARCHED = ("kappa-*.json", "b-*.json")
"""The files of a folder in which a calibration's search keeps what its runs found: of every threshold and noise scale."""
_SKETCHES = ("sample", "score_sample")


def measured_with(settings: Settings) -> dict[str, Any]:
    """What is known of model, sampler and samples before anything runs."""
    denoiser = compat.unwrapped(compat.find_denoiser(settings.target))
    sampler = scheduler_of(settings.target, settings.scheduler)
    weights = sum(float(_wide(weight.detach()).abs().sum()) for _, weight in compat.weights_of(denoiser))
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
        MACHINE: settings.machine,
    }


def _wide(weight: torch.Tensor) -> torch.Tensor:
    """In float64, where its device has that."""
    return weight.float() if weight.device.type == "mps" else weight.double()


def claim(
    folder: Path,
    what: str,
    made_with: dict[str, Any],
    found: Sequence[str],
    begun: bool = False,
    timed: bool = True,
    record: str = "run.json",
) -> None:
    """Make the folder that of these settings, which the first process writes; all must call it.

    Args:
        folder: is made where there is none.
        what: is kept there, in words.
        made_with: the settings.
        found: patterns of the files that hold what was found.
        begun: whether the folder may lack some of them, which are then added.
        timed: whether times decide, so that those of another machine are none.
        record: the file that says what the folder was found with.

    Raises:
        InputError: it holds what was found with others; the message names what differs and the remedy.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / record
    known: Any = read_json(path, f"record of a {what}") if path.exists() else {}
    if not isinstance(known, dict):
        raise InputError(f"{path} is no record of a {what}: use another folder")
    if not begun and not any(any(folder.glob(name)) for name in found):
        known = {}  # of a call that was refused before it found anything
    elif not begun and not known:
        raise InputError(
            f"{folder} holds what a {what} found, without its record {record}: delete it, or use another folder"
        )
    if MACHINE in made_with:
        now = gather(made_with[MACHINE])[0]  # the first one's is written
        made_with = {**made_with, MACHINE: now if timed else known.get(MACHINE, now)}
    for key in made_with if known else ():
        before, now = known.get(key), made_with[key]
        if _is_same(before, now) or (before is None and (begun or key == MACHINE)):  # older records name no machine
            continue
        if key not in _SKETCHES:
            raise InputError(
                f"{folder} holds a {what} with another {key} ({before}, now {now}): use another folder, or delete it"
            )
        raise InputError(
            f"{folder} holds a {what} with another {key}: its sizes, labels, prompts, guidance or noise were others; use "
            "another folder (where nothing was changed: draw all noise from the generator that it is given)"
        )
    if world().is_main:
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


def same(one: Sketch, other: Sketch) -> bool:
    """Whether two sketches are of the same tensors, but for rounding."""
    pairs = list(zip(one, other, strict=False))
    alike = all(abs(x - y) <= SAME * max(a[0], b[0]) for a, b in pairs for x, y in zip(a, b, strict=True))
    return alike and len(one) == len(other)
