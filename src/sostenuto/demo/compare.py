"""The demo's own comparison: EB-Cache's tables for about 1.5x and 2.5x, their parts, fewer steps, and its rivals."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import torch

import sostenuto
from sostenuto.calibrations import EBCalibration, calibrate
from sostenuto.demo.judge import Judge
from sostenuto.demo.pipeline import DemoPipeline, load_demo_pipeline
from sostenuto.demo.rows import NUM_STEPS, Entry, Settings, demo_sample
from sostenuto.demo.run import run_entries
from sostenuto.methods import FORA, ABCache, EBCache, EpsilonScaling, NoCache
from sostenuto.step_state import StepState
from sostenuto.switch import check_not_switched_off
from sostenuto.table import CacheTable

SHIPPED = Path(sostenuto.__file__).parent / "tables"
SEARCH_SEED = 900_001  # of calibrations and searches: none of the noise that rows are judged on


def make_tables(pipe: DemoPipeline, judge: Judge, search_images: int, show: bool) -> tuple[CacheTable, CacheTable]:
    """The tables for about 1.5x and 2.5x: calibrated here, b chosen by the distance of a small set of images."""
    light, strong = (
        calibrate(
            pipe,
            options,
            demo_sample(8),
            num_inference_steps=NUM_STEPS,
            score=judge.distance,
            score_sample=demo_sample(search_images),
            generator=torch.Generator().manual_seed(SEARCH_SEED),
            show_progress=show,
        )
        for options in CALIBRATIONS
    )
    return light, strong


# With one tensor for the whole stack a step that reuses everything costs next to nothing, so that the measured speed-up is
# close to that by multiply-accumulates. The strong table stays at 1/2.5: below that the distance rises steeply. It does best
# when it reuses whole steps early and computes the end: single branches reused late cost texture.
CALIBRATIONS = (
    EBCalibration(
        target_fraction=0.64,
        max_consecutive_reuse=2,
        fill="stack",
        candidates=(StepState.REUSE_BOTH,),
        kappa_start=0.6,
        eps_scale_grid=(0.975, 0.985, 1.01),
    ),
    EBCalibration(
        target_fraction=0.4,
        fill="stack",
        max_consecutive_reuse=3,
        candidates=(StepState.REUSE_BOTH,),
        last_computed=7,
        kappa_start=2.5,
        eps_scale_grid=(0.975, 0.985, 1.01),
    ),
)


def entries(light: CacheTable, strong: CacheTable) -> list[Entry]:
    """The rows of the comparison; the first is the uncached sampler."""
    b = fmean(light.eps_scale)
    return [
        Entry("uncached", NoCache()),
        Entry("33 steps", NoCache(), 33, reference=None),
        Entry("20 steps", NoCache(), 20, reference=None),
        Entry("FORA N=2", FORA(2)),
        Entry("FORA N=3", FORA(3)),
        Entry("ε-scaling alone", EpsilonScaling(1 / b)),
        Entry("1.5× table alone", EBCache(light, eps_scale=1.0)),
        Entry("2.5× table alone", EBCache(strong, eps_scale=1.0)),
        Entry("EB-Cache 1.5×", EBCache(light)),
        Entry("EB-Cache 2.5×", EBCache(strong)),
        Entry("AB-Cache 4.5×", ABCache(2, warmup=2, interval=5, extrapolates="sample")),
        Entry("DPM-Solver++ 20", NoCache(), 20, "dpm-solver++", reference=None),
        Entry("DPM-Solver++ 13", NoCache(), 13, "dpm-solver++", reference=None),
        Entry("DPM-Solver++ 20, cached", CACHED_SOLVER, 20, "dpm-solver++", reference="DPM-Solver++ 20"),
    ]


# On an ODE solver the gap wants a forecast and no scaling.
CACHED_SOLVER = FORA(2, forecast_order=1)


def compare(folder: Path, settings: Settings, show: bool = True) -> dict[str, Any]:
    """Run what is missing of the comparison and return its results.

    Args:
        folder: where batches, tables and results lie; made if need be.
        settings: sizes and seeds.
        show: progress bars.

    Returns:
        The content of ``--json``: ``rows``, ``n``, ``seed``, ``machine`` and more.

    Raises:
        EngineError: caching is switched off.
    """
    check_not_switched_off("the comparison")
    folder.mkdir(parents=True, exist_ok=True)
    pipe, judge = load_demo_pipeline(), Judge()
    return run_entries(folder, entries(*_tables(folder, pipe, judge, settings, show)), settings, show)


def _tables(
    folder: Path, pipe: DemoPipeline, judge: Judge, settings: Settings, show: bool
) -> tuple[CacheTable, CacheTable]:
    paths = [folder / "table-1.5x.json", folder / "table-2.5x.json"]
    if not all(path.exists() for path in paths):
        if settings.search_images:
            tables = make_tables(pipe, judge, settings.search_images, show)
        else:
            tables = tuple(CacheTable.load(SHIPPED / path.name.replace("table", "demo-ddpm50")) for path in paths)
        for path, table in zip(paths, tables, strict=True):
            table.save(path)
    return CacheTable.load(paths[0]), CacheTable.load(paths[1])
