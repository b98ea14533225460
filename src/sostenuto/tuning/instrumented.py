"""The generations of an instrumented run, kept one by one, so that an interrupted run goes on after the last of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sostenuto.calibrations.base import Settings, made_for
from sostenuto.clock import Tick
from sostenuto.engine import Handle
from sostenuto.errors import InputError
from sostenuto.files import publish
from sostenuto.probe import Prober
from sostenuto.tuning.generate import Generated, generate
from sostenuto.tuning.instrument import Instrument, tapped_for
from sostenuto.tuning.measurement import SEVERAL, Kind, Measurement, reaches

BEGUN = "measuring-*.pt"
"""The files of runs that aren't done."""

_KEPT = ("rows", "num_steps", "pauses", "noise")


def instrumented_run(
    settings: Settings,
    folder: Path | None,
    kinds: tuple[Kind, ...],
    all_kinds: tuple[Kind, ...],
    done: Callable[[int], object],
) -> Measurement:
    """Measure some kinds of reuse.

    Args:
        settings: what is generated.
        folder: where every generation is kept; ``None``: nowhere.
        kinds: what is measured.
        all_kinds: on the sites of these.
        done: is told of the rows of every generation but the last.

    Raises:
        InputError: what was kept can't be read.
    """
    name = BEGUN.replace("*", "-".join(kind.value for kind in kinds))
    path = None if folder is None else folder / name
    here = settings.machine
    begun, state, machine = (Generated(), None, here) if path is None or not path.exists() else _read(path)
    machine = here if machine in ("", here) else SEVERAL
    instruments: list[Instrument] = []
    identity: dict[str, Any] = {}

    def drive(handle: Handle, tick: Tick, prober: Prober) -> Any:
        if not instruments:
            instruments.append(Instrument(handle, reaches(kinds, tick.num_steps, all_kinds), tick.num_steps))
            if state is not None:
                instruments[0].resume(state)
            identity.update(made_for(handle))
        return instruments[0](tick, prober)

    rows = begun.rows

    def keep(run: Generated) -> None:
        nonlocal rows
        done(run.rows - rows)
        rows = run.rows
        if path is not None:
            with publish(path) as partial:
                kept = {name: getattr(run, name) for name in _KEPT}
                torch.save(kept | {"state": instruments[0].state(), "machine": machine}, partial)

    run = generate(settings, 0, tapped_for(all_kinds), drive, begun=begun, after=keep)
    measured = instruments[0].result(run.rows, float(np.median(run.pauses)))
    return replace(measured, made_for=identity, machine=machine)


def forget_begun(folder: Path) -> None:
    """Remove what was kept of runs that are done."""
    for path in folder.glob(BEGUN):
        path.unlink(missing_ok=True)


def _read(path: Path) -> tuple[Generated, dict[str, Any], str]:
    """What was generated, what had been measured, and on which machine."""
    try:
        kept = torch.load(path, weights_only=True)
        if "counts" not in kept["state"]:
            raise ValueError("an older version wrote it")
        return Generated(**{name: kept[name] for name in _KEPT}), kept["state"], str(kept.get("machine", ""))
    except Exception as error:  # what a damaged file raises is nowhere listed
        raise InputError(f"{path} can't be read ({error}): delete it, or use another folder") from None
