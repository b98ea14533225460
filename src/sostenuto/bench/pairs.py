"""Pairs of generations in turn (A B A B …), eager or compiled, so that drift of the machine cancels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from sostenuto import compat
from sostenuto.bench.cases import Case, Settings
from sostenuto.bench.generation import Counted, Timed, counted, few_collections, timed
from sostenuto.bench.machine import attention_backend
from sostenuto.bench.sides import Side, side_of
from sostenuto.bench.subjects import Subject, build_subject
from sostenuto.seeds import BENCHMARKED, noise_seed
from sostenuto.stats import Statistics


@dataclass(frozen=True)
class Half:
    """One half of every pair: what is enabled, and the sampler.

    Attributes:
        side: what is enabled.
        scheduler: class of the scheduler; ``None`` for the model's own.
        num_inference_steps: its steps.
    """

    side: Side
    scheduler: str | None
    num_inference_steps: int

    def count(self, subject: Subject, seed: int) -> tuple[Counted, Statistics | None]:
        """What one generation executes, and what ours says of it."""
        with subject.scheduled(self.scheduler), self.side.attached(subject) as handle:
            count = counted(subject, seed, self.num_inference_steps)
            return count, None if handle is None else handle.stats


@dataclass
class Pairs:
    """What was measured of both halves, pair by pair, and what the compiler did for the first."""

    own: list[Timed] = field(default_factory=list)
    other: list[Timed] = field(default_factory=list)
    graphs: int = 0
    graph_breaks: int = 0
    recompiles: int = 0


def halves_of(case: Case, subject: Subject) -> tuple[Half, Half]:
    """The row's own half and its baseline.

    Raises:
        InputError: a method, peer or scheduler isn't known.
        MethodError: a peer can't run on this model here.
    """

    def half(text: str, scheduler: str | None, steps: int) -> Half:
        with subject.scheduled(scheduler):
            return Half(side_of(text, subject, steps), scheduler, steps)

    steps = case.num_inference_steps
    own = half(case.method, case.scheduler, steps)
    return own, half(case.baseline, case.baseline_scheduler or case.scheduler, case.baseline_steps or steps)


def run_pairs(case: Case, settings: Settings, subject: Subject, own: Half, other: Half) -> Pairs:
    """Run the warm-up and the pairs: first the baseline, then the row's own half, from the same seed, and so on in turn."""
    pairs = Pairs()
    with ExitStack() as stack:
        stack.enter_context(attention_backend(settings.attention))
        if case.mode == "eager":
            generate, generate_other = _eager(subject, own), _eager(subject, other)
        else:
            compat.reset_compiler()
            plain = subject if case.is_reference else build_subject(case.model, case.batch_size or 0, settings)
            _share_weights(plain, subject)
            generate = generate_other = stack.enter_context(_compiled(subject, own, pairs, settings))
            if not case.is_reference:
                generate_other = stack.enter_context(_compiled(plain, other, Pairs(), settings))
        stack.enter_context(few_collections())
        for repeat in range(-settings.warmup, settings.repeats):
            seed, warming = noise_seed(settings.seed, BENCHMARKED + max(0, repeat)), repeat < 0
            baseline = None if case.is_reference else generate_other(seed, warming)
            result = generate(seed, warming)
            if not warming:
                pairs.own.append(result)
                pairs.other.append(baseline or result)
    return pairs


Generate = Callable[[int, bool], Timed]


def _eager(subject: Subject, half: Half) -> Generate:
    """Enable, generate, disable: some peers reach beyond the pipeline that they are enabled on."""

    def generate(seed: int, warming: bool) -> Timed:
        with subject.scheduled(half.scheduler), half.side.attached(subject):
            return timed(subject, seed, half.num_inference_steps)

    return generate


@contextmanager
def _compiled(subject: Subject, half: Half, pairs: Pairs, settings: Settings) -> Iterator[Generate]:
    """Enabled and compiled throughout: graphs are kept from one generation to the next."""
    with ExitStack() as stack:
        stack.enter_context(subject.scheduled(half.scheduler))
        if half.side.compile_first:
            subject.denoiser.compile(backend=settings.compiler)
        stack.enter_context(half.side.attached(subject))
        if not half.side.compile_first:
            subject.denoiser.compile(backend=settings.compiler)

        def generate(seed: int, warming: bool) -> Timed:
            before = compat.compiler_counts()
            result = timed(subject, seed, half.num_inference_steps)
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
