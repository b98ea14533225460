"""The plans of published calibrations, which compete with those that were searched."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from sostenuto import compat
from sostenuto.calibrations.base import Calibration, Settings
from sostenuto.calibrations.eb import EBCalibration
from sostenuto.calibrations.feb import FEBCalibration
from sostenuto.calibrations.smoothcache import SmoothCacheCalibration
from sostenuto.errors import MethodError
from sostenuto.plan import Action
from sostenuto.sites import Site, inspect
from sostenuto.step_state import StepState
from sostenuto.table import CacheTable, Fill
from sostenuto.tuning.measurement import Kind

PUBLISHED = ("eb", "feb", "smoothcache", "smoothcache-site")
"""What can compete; the last makes a plan of its own for every site of every block."""

_NUM_SAMPLES = 8
_ROUNDS = 5  # of EB-Cache's bisection, at most: its plans are some of many
_MARGIN = 0.01  # a bisection ends within so much of its target
_LONGEST = 5  # run of reuse
_FILLS: tuple[Fill, ...] = ("stack", "branches", "sample")  # the first of these that may be reused


def calibrations(names: Sequence[str], share: float, kinds: Sequence[Kind]) -> dict[str, Calibration]:
    """The calibrations of these names that can be made with these kinds of reuse.

    Args:
        names: of :data:`PUBLISHED`.
        share: of the uncached multiply-accumulates, that no plan may cost more than.
        kinds: what may be reused.
    """
    if share <= 2 * _MARGIN:
        return {}
    target = share - _MARGIN
    both, attention = StepState.REUSE_BOTH, StepState.REUSE_ATTENTION
    able: dict[str, Calibration] = {
        "eb": EBCalibration(
            target_fraction=target,
            max_rounds=_ROUNDS,
            allow_dearer=False,
            fill=next(fill for fill in _FILLS if Kind(fill) in kinds),
            candidates=(both, attention) if Kind.ATTENTION in kinds else (both,),
        )
    }
    if {Kind.BRANCHES, Kind.ATTENTION, Kind.MLP} <= set(kinds):
        able["feb"] = FEBCalibration(target_fraction=target, max_rounds=_ROUNDS, allow_dearer=False)
        for name, group in (("smoothcache", "type"), ("smoothcache-site", "site")):
            able[name] = SmoothCacheCalibration(
                target_fraction=target,
                max_lag=_LONGEST,
                group_by=group,  # type: ignore[arg-type]
            )
    return {name: able[name] for name in names if name in able}


def work_of(
    calibration: Calibration, macs: Mapping[str, float], rows: Callable[[int], int], table: CacheTable | None = None
) -> float:
    """The most that a calibration costs, in uncached generations of one row.

    Every step of Algorithm 1 is computed, its candidates are tried, and what was chosen is run.

    Args:
        calibration: which.
        macs: of a step of each kind, of a computed one's.
        rows: in how many rows so many samples are generated.
        table: what :func:`calibrated` made, which tells how many rounds it took.
    """
    if not isinstance(calibration, EBCalibration):
        return float(rows(_NUM_SAMPLES))
    rounds = _ROUNDS if table is None else table.calibration.get("rounds", _ROUNDS)
    generated = rounds * rows(_NUM_SAMPLES)
    whole = Kind(calibration.fill)
    names = {StepState.REUSE_ATTENTION: Kind.ATTENTION, StepState.REUSE_MLP: Kind.MLP, StepState.REUSE_BOTH: whole}
    tried = [sum(macs[names[state].value] for state in calibration.candidates_at(tau)) for tau in (0.0, 1.0)]
    return generated * (2 + max(tried))


def calibrated(calibration: Calibration, settings: Settings, path: Path | None) -> CacheTable | None:
    """The plan that a calibration makes, without a noise scale; ``None`` where it can't be made for this model.

    Args:
        calibration: which.
        settings: of the tuning; its seed is taken, its score is not.
        path: where the table is kept; beside it, as long as it isn't made, the rounds of its search.
    """
    if path is not None and path.exists():
        return CacheTable.load(path)
    noise = torch.Generator(settings.generator.device if settings.generator else "cpu").manual_seed(settings.seed)
    rounds = None if path is None else path.with_suffix("")
    plain = replace(settings, num_samples=_NUM_SAMPLES, generator=noise, score=None, show_progress=False, kept=rounds)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a plan that misses the cost is left out by the caller
            made: CacheTable = calibration.run(plain)
    except MethodError:
        return None
    table = replace(
        _by_states(made, inspect(compat.find_denoiser(settings.target))),
        eps_scale=(1.0,) * made.num_inference_steps,
    )
    if path is not None and rounds is not None:
        table.save(path)
        shutil.rmtree(rounds, ignore_errors=True)
    return table


def _by_states(table: CacheTable, sites: Sequence[Site]) -> CacheTable:
    """The table with a state for every step that lists its sites, where a state does the same at every such step."""
    does = {frozenset(site.id for site in sites if state.skips(site)): state for state in StepState}
    states = [
        state
        if isinstance(state, StepState)
        else does.get(frozenset(site for site, action in state.items() if action is not Action.COMPUTE))
        for state in table.actions
    ]
    known = [state for state in states if state is not None]
    return replace(table, actions=tuple(known)) if len(known) == len(states) else table
