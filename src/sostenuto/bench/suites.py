"""The named suites: which rows each one measures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from sostenuto.bench.cases import PEER, UNCACHED, Case
from sostenuto.bench.peers import available_peers
from sostenuto.bench.published import DIT_XL, LARGE, Printed
from sostenuto.bench.specs import nearest
from sostenuto.errors import InputError

Mode = Literal["eager", "compiled"]


@dataclass(frozen=True)
class Suite:
    """A named set of rows.

    Attributes:
        name: what users type.
        summary: one line.
        cases: ``cases(device)``: its rows, the uncached sampler before what is measured against it.
        repeats: pairs per row, unless the command says otherwise.
    """

    name: str
    summary: str
    cases: Callable[[str], Iterator[Case]]
    repeats: int = 5


def cases_of(names: Sequence[str], device: str) -> list[Case]:
    """The rows of these suites.

    Raises:
        InputError: there is no such suite.
    """
    odd = next((name for name in names if name not in SUITES), None)
    if odd is not None:
        raise InputError(f"there is no suite {odd!r}; {nearest(odd, SUITES)}")
    return [replace(case, suite=name) for name in names for case in SUITES[name].cases(device)]


def grid(
    models: Sequence[str],
    methods: Sequence[str],
    schedulers: Sequence[str | None],
    steps: Sequence[int],
    modes: Sequence[Mode],
) -> list[Case]:
    """Every method on every model with every scheduler and number of steps, the uncached sampler before the others."""
    every = [UNCACHED, *(method for method in methods if method != UNCACHED)]
    return [
        Case(name=method, method=method, model=model, scheduler=scheduler, num_inference_steps=n, mode=mode)
        for model in models
        for scheduler in schedulers
        for n in steps
        for mode in modes
        for method in every
    ]


_SMALL = ("dit", "flux", "dit-xs")


def _overhead(device: str) -> Iterator[Case]:
    for model in _SMALL:
        for mode in _modes("eager", "compiled"):
            of = dict(model=model, num_inference_steps=12, mode=mode)
            yield Case(f"{model} {mode}: all computed", "none", **of)  # type: ignore[arg-type]
            yield Case(f"{model} {mode}: branches reused", "reuse-branches:interval=4", **of)  # type: ignore[arg-type]
            yield Case(f"{model} {mode}: stack reused", "reuse-stack:interval=4", **of)  # type: ignore[arg-type]
            # Against reuse at the same steps: what the forecast costs beside it.
            forecast = "fora:interval=2,anchor=start,forecast_order=2"
            baseline = "fora:interval=2,anchor=start"
            yield Case(f"{model} {mode}: forecast over reuse", forecast, baseline=baseline, **of)  # type: ignore[arg-type]


def _modes(*modes: Mode) -> tuple[Mode, ...]:
    return modes


def _efficiency(device: str) -> Iterator[Case]:
    for mode in _modes("eager", "compiled"):
        yield Case(f"all computed, {mode}", "none", mode=mode)
        yield Case(f"EB-Cache 1.5×, {mode}", "eb:table='demo-ddpm50-1.5x'", mode=mode)
        yield Case(f"EB-Cache 2.5×, {mode}", "eb:table='demo-ddpm50-2.5x'", mode=mode)
        yield Case(f"FORA N=2, {mode}", "fora:interval=2", mode=mode)
    for model in ("dit", "flux"):
        for mode in _modes("eager", "compiled"):
            for interval in (2, 3, 4):
                yield Case(f"{model} FORA N={interval}, {mode}", f"fora:interval={interval}", model, mode=mode)
                yield Case(f"{model} stack N={interval}, {mode}", f"reuse-stack:interval={interval}", model, mode=mode)


def _demo_quality(device: str) -> Iterator[Case]:
    yield Case("uncached", UNCACHED)
    for steps in (33, 20):
        yield Case(f"{steps} steps", UNCACHED, num_inference_steps=steps, baseline_steps=50)
    for name, method in (
        ("EB-Cache 1.5×", "eb:table='demo-ddpm50-1.5x'"),
        ("EB-Cache 2.5×", "eb:table='demo-ddpm50-2.5x'"),
        ("FEB-Cache 1.5×", "feb:table='demo-ddpm50-feb-1.5x'"),
        ("FORA N=2", "fora:interval=2"),
        ("FORA N=2, linear", "fora:interval=2,forecast_order=1"),
        ("FORA N=3", "fora:interval=3"),
        ("TaylorSeer N=3 O=2", "taylorseer:interval=3,order=2"),
        ("AB-Cache", "ab:order=2,warmup=3,interval=2"),
        ("ToCa N=3", "toca:interval=3"),
        ("DuCa N=3", "duca:interval=3"),
        ("Δ-DiT N=2", "delta-dit:interval=2"),
        ("PAB", "pab:spatial_range=2"),
        ("DBCache", "dbcache:front_blocks=1,back_blocks=0,warmup=1,threshold=0.1"),
    ):
        yield Case(name, method)
    solver = "DPMSolverMultistepScheduler"
    of = dict(num_inference_steps=20, scheduler=solver, baseline_steps=50, baseline_scheduler="DDPMScheduler")
    yield Case("DPM-Solver++ 20", UNCACHED, **of)  # type: ignore[arg-type]
    yield Case("DPM-Solver++ 20, FORA N=2, linear", "fora:interval=2,forecast_order=1", **of)  # type: ignore[arg-type]


def _dit_xl(device: str) -> Iterator[Case]:
    if not device.startswith("cuda"):
        yield Case("DiT-XL/2 256²: one step", UNCACHED, "dit-xl-2-256", num_inference_steps=1)
    yield from _printed(DIT_XL, device)


def _flux_like(device: str) -> Iterator[Case]:
    yield Case("flux: uncached", UNCACHED, "flux")
    for name, method in (
        ("FORA N=3", "fora:interval=3,anchor=start"),
        ("TaylorSeer N=3 O=2", "taylorseer:interval=3,order=2"),
        ("DBCache", "dbcache:front_blocks=1,back_blocks=0,warmup=1,threshold=0.1"),
        ("ToCa N=4, random tokens", "toca:interval=4,selection=random,spatial_bonus=0.0"),
        ("stack N=3", "reuse-stack:interval=3"),
    ):
        yield Case(f"flux: {name}", method, "flux")
    yield from _printed(LARGE, device)


def _printed(rows: Sequence[Printed], device: str) -> Iterator[Case]:
    """Measured where there is a GPU to print seconds beside the papers', only counted elsewhere."""
    for row in rows:
        yield Case(
            name=row.name,
            method=row.method,
            model=row.model,
            num_inference_steps=row.num_inference_steps,
            scheduler=row.scheduler,
            kind="measure" if device.startswith("cuda") else "count",
            baseline_steps=row.baseline_steps,
            printed=row.values(),
        )


_SETTINGS = {"diffusers-taylorseer": ":modules=branches"}
# Of random weights no threshold means anything: there it lets through what the library lets be skipped.
_SKIPS_ALL = _SETTINGS | {
    "cache-dit": ":residual_diff_threshold=1.0,max_warmup_steps=1",
    "cache-dit-taylorseer": ":residual_diff_threshold=1.0,max_warmup_steps=1",
    "diffusers-first-block-cache": ":threshold=1.0",
    "para-attn": ":residual_diff_threshold=1.0",
}


def _peers(device: str) -> Iterator[Case]:
    for model in ("dit", "flux", "demo"):
        trained = model == "demo"
        settings, threshold = (_SETTINGS, 0.1) if trained else (_SKIPS_ALL, 1.0)
        yield Case(f"{model}: uncached", UNCACHED, model)
        for name, method in (
            ("EB-Cache, stack N=2", "reuse-stack:interval=2"),
            ("FORA N=2", "fora:interval=2,anchor=start"),
            ("TaylorSeer N=2 O=1", "taylorseer:interval=2,order=1"),
            ("FirstBlockCache of ours", f"dbcache:front_blocks=1,back_blocks=0,warmup=1,threshold={threshold}"),
        ):
            yield Case(f"{model}: {name}", method, model)
        for peer in sorted(available_peers()):
            yield Case(f"{model}: {peer}", f"{PEER}{peer}{settings.get(peer, '')}", model)


def _partial(device: str) -> Iterator[Case]:
    of = dict(model="dit", num_inference_steps=9)  # 9: two whole cycles of one full step and three partial ones
    yield Case("uncached", UNCACHED, **of)  # type: ignore[arg-type]
    for ratio in (0.0, 0.25, 0.5, 0.75, 1.0):
        method = f"toca:interval=4,fresh_ratio={ratio},ratio_schedule=constant,selection=random"
        method += ",spatial_bonus=0.0,threshold_weight=0.0,middle_interval=None,anchor=start"
        yield Case(f"ToCa N=4, {ratio:.0%} of the tokens", method, **of)  # type: ignore[arg-type]


def _growth(device: str) -> Iterator[Case]:
    method, steps = "reuse-branches:interval=2", 4
    for layers in (3, 6, 12, 24):
        yield Case(f"depth {layers}", method, f"dit:layers={layers},width=192", steps, axis="depth", value=layers)
    for side in (8, 16, 24, 32):
        model = f"dit:layers=4,width=192,tokens={side * side}"
        yield Case(f"tokens {side * side}", method, model, steps, axis="tokens", value=side * side)
    for batch in (1, 2, 4, 8):
        yield Case(
            f"batch {batch}", method, "dit:layers=4,width=192", steps, batch_size=batch, axis="batch", value=batch
        )
    for n in (4, 8, 16, 32):
        yield Case(f"steps {n}", method, "dit:layers=4,width=192", n, axis="steps", value=n)


_ALL = (
    Suite(
        "overhead", "what the engine costs: a computed step, a reused one, a forecast one; bytes of state", _overhead, 9
    ),
    Suite(
        "efficiency", "measured over ideal speed-up of the demo's tables and of FORA, eager and compiled", _efficiency
    ),
    Suite("demo-quality", "every ready method on the trained demo model: quality against time", _demo_quality),
    Suite("dit-xl", "DiT-XL/2 with random weights beside the papers' tables: counted, on a GPU also timed", _dit_xl, 3),
    Suite(
        "flux-like",
        "a small two-stream, one-stream model; FLUX.1-dev, PixArt-Σ, CogVideoX-2B beside the papers",
        _flux_like,
        3,
    ),
    Suite("peers", "what a user would pick instead, beside ours, on three models", _peers),
    Suite("partial", "what steps cost that refresh a share of the tokens, against that share", _partial, 3),
    Suite("growth", "time and memory against depth, tokens, batch and steps", _growth, 3),
)

SUITES: dict[str, Suite] = {suite.name: suite for suite in _ALL}
"""All of them by name."""
