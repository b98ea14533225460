"""Measures one row, and makes sense of it: times, counts, quality, and for what is missing the reason."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from sostenuto.bench import dry, quality
from sostenuto.bench.cases import PEER, UNCACHED, Case, Settings, key_of
from sostenuto.bench.generation import Counted, Timed, medians
from sostenuto.bench.machine import prepare
from sostenuto.bench.pairs import Pairs, halves_of, run_pairs
from sostenuto.bench.rows import Row
from sostenuto.bench.specs import method_of
from sostenuto.bench.subjects import Subject, build_subject
from sostenuto.errors import InputError
from sostenuto.plan import concise


def measure(case: Case, settings: Settings, folder: Path | None = None) -> Row:
    """The row of a case; one with its error where it can't be measured.

    Args:
        case: what is measured.
        settings: of the run.
        folder: where the first images are saved; ``None`` saves none.
    """
    prepare(settings)
    row = begun(case, settings)
    try:
        if case.kind == "count":
            return dry.count(case, row)
        return _measured(case, settings, row, folder)
    except Exception as error:  # whatever another library raises becomes its row
        return replace(row, error=" ".join(f"{type(error).__name__}: {error}".split())[:500])


def begun(case: Case, settings: Settings) -> Row:
    """The row with what is known before anything was measured."""
    return Row(
        key=key_of(case, settings),
        name=case.name,
        method=case.method,
        model=case.model,
        num_inference_steps=case.num_inference_steps,
        suite=case.suite,
        scheduler=case.scheduler,
        mode=case.mode,
        baseline=case.baseline,
        axis=case.axis,
        value=case.value,
        seed=settings.seed,
        printed=case.printed,
    )


def _measured(case: Case, settings: Settings, row: Row, folder: Path | None) -> Row:
    subject = build_subject(case.model, case.batch_size or 0, settings)
    own, other = halves_of(case, subject)
    with subject.scheduled(case.scheduler):
        scheduler = type(subject.owner.scheduler).__name__
    own_count, stats = own.count(subject, settings.seed)
    other_count = own_count if case.is_reference else other.count(subject, settings.seed)[0]
    row = replace(
        row,
        parameters=own.side.parameters,
        peer=own.side.peer,
        scheduler=scheduler,
        batch_size=subject.batch_size,
        cache_bytes_peak=None if stats is None else stats.cache_bytes_peak,
        plan=None if stats is None else concise(stats.plan),
    )
    return _filled(case, row, subject, run_pairs(case, settings, subject, own, other), (own_count, other_count), folder)


def _filled(
    case: Case,
    row: Row,
    subject: Subject,
    pairs: Pairs,
    counts: tuple[Counted, Counted],
    folder: Path | None,
) -> Row:
    own, other = counts
    missing: dict[str, str] = {}
    ratios = [b.wall_s / a.wall_s for a, b in zip(pairs.own, pairs.other, strict=True)]
    ideal = other.macs / own.macs if own.macs else None
    if ideal is None:
        missing["ideal_speedup"] = missing["efficiency"] = "nothing that is counted ran"
    if row.cache_bytes_peak is None:
        keeps = (
            "the uncached sampler keeps nothing" if case.method == UNCACHED else "the library doesn't say what it keeps"
        )
        missing["cache_bytes_peak"] = keeps
        missing["plan"] = (
            "every step is computed" if case.method == UNCACHED else "the library doesn't say what it skips"
        )
    if case.mode == "eager":
        missing |= dict.fromkeys(("graphs", "graph_breaks", "recompiles"), "eager mode")
    if pairs.own[0].device_bytes_peak is None:
        missing |= dict.fromkeys(("device_bytes_peak", "baseline_device_bytes_peak"), "torch counts it on a GPU only")
    steps = step_figures(pairs.own, pairs.other, own.step_macs, other.step_macs)
    missing |= {name: reason for name, reason in steps.missing.items() if name not in missing}
    walls = [run.wall_s for run in pairs.own]
    values: dict[str, Any] = {}
    outputs, reference = [run.output for run in pairs.own], [run.output for run in pairs.other]
    for found, reasons in (
        quality.judged(subject, outputs),
        ({}, dict.fromkeys((*quality.PAIRED, "relative_error"), "it is the baseline itself"))
        if case.is_reference
        else quality.compared(subject, outputs, reference, case.same_noise),
    ):
        values |= found
        missing |= reasons
    values["n"] = sum(len(output) for output in outputs) if subject.makes_images else None
    if folder is not None and subject.makes_images:
        name = f"samples/{row.key}.png"
        failed = quality.save_samples(folder / name, pairs.own[0].output)
        values["samples"] = None if failed else name
        missing |= {"samples": failed} if failed else {}
    filled = replace(
        row,
        repeats=len(walls),
        wall_s=median(walls),
        wall_s_min=min(walls),
        wall_s_max=max(walls),
        baseline_wall_s=median(run.wall_s for run in pairs.other),
        speedup=median(ratios),
        speedup_min=min(ratios),
        speedup_max=max(ratios),
        macs=own.macs,
        baseline_macs=other.macs,
        ideal_speedup=ideal,
        efficiency=None if ideal is None else median(ratios) / ideal,
        step_s=medians([run.step_s for run in pairs.own]),
        baseline_step_s=medians([run.step_s for run in pairs.other]),
        step_macs=own.step_macs,
        baseline_step_macs=other.step_macs,
        computed_step_overhead=steps.overhead,
        computed_step_overhead_s=steps.overhead_s,
        skipped_step_share=steps.share,
        device_bytes_peak=max(run.device_bytes_peak or 0 for run in pairs.own) or None,
        baseline_device_bytes_peak=max(run.device_bytes_peak or 0 for run in pairs.other) or None,
        **(
            {"graphs": pairs.graphs, "graph_breaks": pairs.graph_breaks, "recompiles": pairs.recompiles}
            if case.mode == "compiled"
            else {}
        ),
        **{name: value for name, value in values.items() if not isinstance(value, float) or math.isfinite(value)},
    )
    return replace(filled, missing=dict.fromkeys(filled.blank, "not a finite number") | missing)


@dataclass(frozen=True)
class StepFigures:
    """What steps cost beside the baseline's same steps: see :class:`~sostenuto.bench.rows.Row`."""

    overhead: float | None
    overhead_s: float | None
    share: float | None
    missing: dict[str, str]


def step_figures(
    own: Sequence[Timed], other: Sequence[Timed], macs: Sequence[int], other_macs: Sequence[int]
) -> StepFigures:
    """Pair every step with the baseline's same step of the same pair, and take medians over all of them.

    A step computes all where it executes as many multiply-accumulates as the baseline's most expensive one; the steps with
    the fewest, if fewer, are the skipped ones.
    """
    names = ("computed_step_overhead", "computed_step_overhead_s", "skipped_step_share")
    runs = (*(run.step_s for run in own), *(run.step_s for run in other), macs, other_macs)
    if len({len(run) for run in runs}) != 1 or not macs:
        return StepFigures(None, None, None, dict.fromkeys(names, "the baseline has other steps"))
    full, least = max(other_macs), min(macs)
    computed = [step for step, n in enumerate(macs) if n >= full and other_macs[step] >= full]
    skipped = [step for step, n in enumerate(macs) if n == least and least < full]

    def over_pairs(steps: Sequence[int], of: Callable[[float, float], float]) -> float | None:
        values = [of(a.step_s[step], b.step_s[step]) for a, b in zip(own, other, strict=True) for step in steps]
        return median(values) if values else None

    missing: dict[str, str] = dict.fromkeys(names[:2], "no step computes all") if not computed else {}
    missing |= {names[2]: "no step is skipped"} if not skipped else {}
    return StepFigures(
        over_pairs(computed, lambda a, b: a / b - 1),
        over_pairs(computed, lambda a, b: a - b),
        over_pairs(skipped, lambda a, b: a / b),
        missing,
    )


def check(case: Case) -> None:
    """Refuse a case whose method is misspelt before anything runs; peers are left to their rows.

    Raises:
        InputError: there is no such method or parameter.
    """
    for text in (case.method, case.baseline):
        if text != UNCACHED and not text.startswith(PEER):
            method_of(text, case.num_inference_steps)
    if case.batch_size is not None and case.batch_size < 1:
        raise InputError(f"{case.name}: batch_size must be 1 or more, not {case.batch_size}")
