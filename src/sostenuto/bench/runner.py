"""Measures one row: pairs of generations in turn (A B A B …), so that drift of the machine cancels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from sostenuto import compat
from sostenuto.bench import dry, quality
from sostenuto.bench.cases import PEER, UNCACHED, Case, Settings, key_of
from sostenuto.bench.generation import Counted, Timed, counted, few_collections, medians, timed
from sostenuto.bench.machine import attention_backend, prepare
from sostenuto.bench.rows import Row
from sostenuto.bench.sides import Side, side_of
from sostenuto.bench.specs import method_of
from sostenuto.bench.subjects import Subject, build_subject
from sostenuto.errors import InputError

Progress = Callable[[], object]


def measure(case: Case, settings: Settings, folder: Path | None = None, progress: Progress = lambda: None) -> Row:
    """The row of a case; one with its error where it can't be measured.

    Args:
        case: what is measured.
        settings: of the run.
        folder: where the first images are saved; ``None`` saves none.
        progress: called after every pair.
    """
    prepare(settings)
    row = begun(case, settings)
    try:
        if case.kind == "count":
            return dry.count(case, row)
        return _measured(case, settings, row, folder, progress)
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


@dataclass
class _Pairs:
    """What was measured of both sides, pair by pair."""

    own: list[Timed] = field(default_factory=list)
    other: list[Timed] = field(default_factory=list)
    graphs: int = 0
    graph_breaks: int = 0
    recompiles: int = 0


def _measured(case: Case, settings: Settings, row: Row, folder: Path | None, progress: Progress) -> Row:
    subject = build_subject(case.model, case.batch_size or 0, settings)
    with subject.scheduled(case.scheduler):
        side = side_of(case.method, subject, case.num_inference_steps)
        row = replace(
            row,
            parameters=side.parameters,
            peer=side.peer,
            scheduler=type(subject.owner.scheduler).__name__,
            batch_size=subject.batch_size,
        )
        own_count, cache_bytes = _counted(subject, side, case.num_inference_steps, settings)
    other_steps, other_scheduler = (
        case.baseline_steps or case.num_inference_steps,
        case.baseline_scheduler or case.scheduler,
    )
    with subject.scheduled(other_scheduler):
        other = side_of(case.baseline, subject, other_steps)
        other_count = own_count if case.is_reference else _counted(subject, other, other_steps, settings)[0]
    with ExitStack() as stack:
        stack.enter_context(attention_backend(settings.attention))
        stack.enter_context(few_collections())
        pairs = _run(stack, case, settings, (subject, side), other, progress)
    row = replace(row, cache_bytes_peak=cache_bytes)
    return _filled(case, row, subject, pairs, (own_count, other_count), folder, settings)


def _counted(subject: Subject, side: Side, num_inference_steps: int, settings: Settings) -> tuple[Counted, int | None]:
    """What one generation executes, and the most bytes of features that ours keep."""
    with side.attached(subject) as handle:
        count = counted(subject, settings.seed, num_inference_steps)
        return count, None if handle is None else handle.stats.cache_bytes_peak


def _run(
    stack: ExitStack, case: Case, settings: Settings, own: tuple[Subject, Side], other: Side, progress: Progress
) -> _Pairs:
    """The pairs: first the baseline, then the row's own side, from the same seed, and so on in turn."""
    subject, side = own
    pairs = _Pairs()
    plain = subject
    generate, generate_other = _eager(subject, side), _eager(subject, other)
    if case.mode == "compiled":
        compat.reset_compiler()
        plain = subject if case.is_reference else build_subject(case.model, case.batch_size or 0, settings)
        if plain is not subject:
            _share_weights(plain, subject)
            generate_other = stack.enter_context(_compiled(plain, other, _Pairs(), settings))
        generate = stack.enter_context(_compiled(subject, side, pairs, settings))
    for repeat in range(-settings.warmup, settings.repeats):
        seed = settings.seed + max(0, repeat)
        timed_other = None
        if not case.is_reference:
            with plain.scheduled(case.baseline_scheduler or case.scheduler):
                timed_other = generate_other(seed, case.baseline_steps or case.num_inference_steps, repeat < 0)
        with subject.scheduled(case.scheduler):
            timed_own = generate(seed, case.num_inference_steps, repeat < 0)
        if repeat >= 0:
            pairs.own.append(timed_own)
            pairs.other.append(timed_other or timed_own)
        progress()
    return pairs


Generate = Callable[[int, int, bool], Timed]


def _eager(subject: Subject, side: Side) -> Generate:
    """Enable, generate, disable: some peers reach beyond the pipeline that they are enabled on."""

    def generate(seed: int, steps: int, warming: bool) -> Timed:
        with side.attached(subject):
            return timed(subject, seed, steps)

    return generate


@contextmanager
def _compiled(subject: Subject, side: Side, pairs: _Pairs, settings: Settings) -> Iterator[Generate]:
    """Enabled and compiled throughout: graphs are kept from one generation to the next."""
    if side.compile_first:
        subject.denoiser.compile(backend=settings.compiler)
    with side.attached(subject):
        if not side.compile_first:
            subject.denoiser.compile(backend=settings.compiler)

        def generate(seed: int, steps: int, warming: bool) -> Timed:
            before = compat.compiler_counts()
            result = timed(subject, seed, steps)
            after = compat.compiler_counts()
            pairs.graphs += after.graphs - before.graphs
            pairs.graph_breaks += after.graph_breaks - before.graph_breaks
            pairs.recompiles += 0 if warming else after.graphs - before.graphs
            return result

        yield generate


def _share_weights(one: Subject, other: Subject) -> None:
    """Let two copies of a network lie in the same memory, as one model's would."""
    for own, theirs in zip(one.denoiser.parameters(), other.denoiser.parameters(), strict=True):
        own.data = theirs.data


def _filled(
    case: Case,
    row: Row,
    subject: Subject,
    pairs: _Pairs,
    counts: tuple[Counted, Counted],
    folder: Path | None,
    settings: Settings,
) -> Row:
    own, other = counts
    missing: dict[str, str] = {}
    ratios = [b.wall_s / a.wall_s for a, b in zip(pairs.own, pairs.other, strict=True)]
    ideal = other.macs / own.macs if own.macs else None
    if ideal is None:
        missing["ideal_speedup"] = missing["efficiency"] = "nothing that is counted ran"
    if row.cache_bytes_peak is None and case.method != UNCACHED:
        missing["cache_bytes_peak"] = "the library doesn't say what it keeps"
    if case.mode == "eager":
        missing |= dict.fromkeys(("graphs", "graph_breaks", "recompiles"), "eager mode")
    if pairs.own[0].device_bytes_peak is None:
        missing |= dict.fromkeys(("device_bytes_peak", "baseline_device_bytes_peak"), "torch counts it on a GPU only")
    steps = step_figures(pairs.own, pairs.other, own.step_macs, other.step_macs)
    missing |= {name: reason for name, reason in steps.missing.items() if name not in missing}
    walls = [run.wall_s for run in pairs.own]
    values: dict[str, Any] = {}
    if settings.quality:
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
    return replace(
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
        missing=missing,
    )


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
