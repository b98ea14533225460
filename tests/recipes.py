"""Methods at random with, written down by hand, what each must do: for the model-based test."""

from __future__ import annotations

from hypothesis import strategies as st

from naive_sampling import Recipe, Row
from sostenuto import (
    FORA,
    ABCache,
    Action,
    CacheTable,
    DeltaDiT,
    EBCache,
    EpsilonScaling,
    Forecast,
    NoCache,
    StepState,
    TaylorSeer,
    TeaCache,
)

BLOCKS = 3
BRANCHES = [f"transformer_blocks.{block}.{name}" for block in range(BLOCKS) for name in ("attn1", "ff")]
STACK = f"blocks:0:{BLOCKS - 1}"
_REUSED = {"compute": (), "reuse-attn": ("attn1",), "reuse-mlp": ("ff",)}
_ACTIONS = {"c": Action.COMPUTE, "r": Action.REUSE, "f": Action.FORECAST}


def _whole(skip: list[bool], order: int, sites: list[str] = BRANCHES) -> list[Row]:
    return [dict.fromkeys(sites, "f" if order else "r") if skipped else {} for skipped in skip]


@st.composite
def fora(draw) -> Recipe:
    interval, anchor, order = draw(st.integers(1, 4)), draw(st.sampled_from(["start", "end"])), draw(st.integers(0, 2))
    scale = draw(st.sampled_from([1.0, 1.25]))

    def rows(steps: int, first: int) -> list[Row]:
        counts = [p - first if anchor == "start" else steps - 1 - p for p in range(steps)]
        return _whole([p > first and count % interval > 0 for p, count in enumerate(counts)], order)

    method = FORA(interval, anchor) | Forecast(order) if order else FORA(interval, anchor)
    method = method | EpsilonScaling(scale) if scale != 1 else method
    return Recipe("fora", method, rows, order + 1, scale=1 / scale)


@st.composite
def table(draw) -> Recipe:
    order, steps = draw(st.integers(0, 2)), draw(st.integers(2, 8))
    letters = "crf" if order else "cr"
    row = st.fixed_dictionaries({site: st.sampled_from(letters) for site in BRANCHES})
    drawn = [dict.fromkeys(BRANCHES, "c"), *draw(st.lists(row, min_size=steps - 1, max_size=steps - 1))]
    scale = draw(st.sampled_from([1.0, 0.75]))
    actions = tuple({site: _ACTIONS[letter] for site, letter in row.items()} for row in drawn)
    rows = [{site: letter for site, letter in row.items() if letter != "c"} for row in drawn]
    made = CacheTable(actions, eps_scale=(scale,) * steps, forecast_order=order)
    return Recipe("table", EBCache(made), lambda *_: rows, order + 1, scale=scale, steps=steps)


@st.composite
def stack_table(draw) -> Recipe:
    states, steps = st.sampled_from(list(StepState)), draw(st.integers(2, 8))
    drawn = [StepState.COMPUTE, *draw(st.lists(states, min_size=steps - 1, max_size=steps - 1))]
    order = draw(st.integers(0, 1))
    gap = "f" if order else "r"
    rows = [
        {STACK: gap}
        if state is StepState.REUSE_BOTH
        else {site: gap for site in BRANCHES if site.endswith(_REUSED[state.value])}
        for state in drawn
    ]
    made = CacheTable(tuple(drawn), forecast_order=order, fill="stack")
    return Recipe("stack table", EBCache(made), lambda *_: rows, order + 1, ranges=(STACK,), steps=steps)


@st.composite
def adams_bashforth(draw) -> Recipe:
    order, warmup, interval = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    mode = draw(st.sampled_from(["lagrange", "literal", "recursive"]))

    def rows(steps: int, first: int) -> list[Row]:
        counts = [p - first for p in range(steps)]
        return _whole([i >= warmup and i % interval > 0 for i in counts], order - 1, ["output"])

    method = ABCache(order, warmup, interval, mode, "step")
    return Recipe("ab", method, rows, order, mode != "lagrange", mode == "recursive" and order > 1)


@st.composite
def clean_sample(draw) -> Recipe:
    order, warmup, interval = draw(st.integers(1, 2)), draw(st.integers(1, 4)), draw(st.integers(1, 4))

    def rows(steps: int, first: int) -> list[Row]:
        counts = [p - first for p in range(steps)]
        return _whole([i >= warmup and i % interval > 0 for i in counts], order - 1, ["output"])

    method = ABCache(order, warmup, interval, abscissa="step", extrapolates="sample")
    return Recipe("ab", method, rows, order, clean=True)


@st.composite
def taylor(draw) -> Recipe:
    interval, order, enhance = draw(st.integers(1, 4)), draw(st.integers(0, 3)), draw(st.integers(1, 3))

    def rows(steps: int, first: int) -> list[Row]:
        last = first + enhance - 1
        return _whole([p > last and (p - last) % interval > 0 for p in range(steps)], order)

    return Recipe("taylorseer", TaylorSeer(interval, order, enhance), rows, order + 1)


@st.composite
def delta(draw) -> Recipe:
    interval, switch, cached = draw(st.integers(1, 4)), draw(st.integers(0, 4)), draw(st.integers(1, BLOCKS))
    front, rear = f"blocks:0:{cached - 1}", f"blocks:{BLOCKS - cached}:{BLOCKS - 1}"

    def rows(steps: int, first: int) -> list[Row]:
        computed = [(p - first) % interval == 0 or p == switch for p in range(steps)]
        return [{} if computed[p] else {rear if p < switch else front: "r"} for p in range(steps)]

    ranges = tuple(dict.fromkeys((front, rear)))
    return Recipe("delta-dit", DeltaDiT(interval, switch, cached), rows, ranges=ranges, least=switch)


@st.composite
def tea(draw) -> Recipe:
    threshold = draw(st.sampled_from([0.0, 0.2, 1.0, 5.0]))
    return Recipe("teacache", TeaCache(threshold=threshold), ranges=(STACK,), threshold=threshold)


RECIPES = st.one_of(
    st.just(Recipe("none", NoCache())),
    fora(),
    table(),
    stack_table(),
    adams_bashforth(),
    clean_sample(),
    taylor(),
    delta(),
    tea(),
)
