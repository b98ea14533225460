"""Every method on the demo model at equal cost: 50 DDIM steps, of each method the setting nearest to the speed-up.

    python benchmarks/methods.py --num-images 5000 --dtype bfloat16 --json docs/results/methods.json

Calibrated methods are calibrated first, on 8 samples (DiTFastAttn on 4). Then every setting is timed beside the uncached
sampler (``--cost macs``: counted), and of each method the setting nearest to each target (within 15 %) is sampled with the
same noise and labels; a method that gets to none of them has one row at the most it does. EB-Cache's and FEB-Cache's noise
scale is searched by the distance of some images, as their papers do, and so is one for some others, which have a second row
where that found another b than 1; no search sees the noise of the rows. There is no guidance, so that what caches between its
halves has nothing to do. What an interrupted run has done is kept in the output folder, and processes can share the sampling:
``--shard 0 2`` and ``--shard 1 2``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from lab import SCALES, SEARCH_SEED, Lab, arguments, compare
from tqdm import tqdm

import sostenuto
from sostenuto.calibrations import (
    DiTFastAttnCalibration,
    EBCalibration,
    FEBCalibration,
    MagCacheCalibration,
    SmoothCacheCalibration,
    TeaCacheCalibration,
)
from sostenuto.demo.judge import Judge
from sostenuto.demo.pipeline import load_demo_pipeline
from sostenuto.demo.rows import Entry, demo_sample
from sostenuto.files import publish_json
from sostenuto.methods.base import Method
from sostenuto.table import CacheTable

STEPS = 50
FRACTIONS = (0.64, 0.48, 0.32)  # of the multiply-accumulates, for the methods that are calibrated to a cost
NEAR = math.log(1.15)
COMBINED = ("FORA", "ToCa", "L2C", "TaylorSeer, order 2", "SmoothCache")  # for which a noise scale is searched, too
FEB_SCALES = (*SCALES, 1.02, 1.03)  # what its falling b(τ) is multiplied by
GREEDY_SAMPLES = 4  # DiTFastAttn tries every layer at every step, with a run of the network for each candidate


def best_scale(lab: Lab, method: Method) -> float:
    """The constant b with which the method gives the smallest distance of a few images."""
    path = lab.folder / "made" / f"scale-{lab.key(method, SCALES, lab.search_images)}.json"
    if not path.exists():
        distances = {}
        for b in tqdm(SCALES, desc=f"noise scale of {method.name}"):
            with lab.sampler(), sostenuto.enable(lab.pipe, method | sostenuto.EpsilonScaling(1 / b)):
                images = demo_sample(lab.search_images)(lab.pipe, torch.Generator().manual_seed(SEARCH_SEED))
            distances[b] = Judge().distance(images)
        best = min(distances, key=distances.__getitem__)
        publish_json(path, {"method": repr(method), "distances": distances, "b": best}, indent=1)
    return json.loads(path.read_text())["b"]


def settings_of_every_method(lab: Lab, only: list[str] | None = None) -> dict[str, list[Method]]:
    """The settings of each method, by its name; of some methods only where they are listed."""
    grid: dict[str, list[Method]] = {}

    def add(name: str, make: Callable[..., Method], *arguments: Any, **options: Any) -> None:
        if only is None or name in only:
            made = [part() if callable(part) else part for part in arguments]  # calibrated where it is needed
            grid.setdefault(name, []).append(make(*made, **options))

    def linear(make: Callable[..., Method]) -> Callable[..., Method]:
        return lambda *arguments: make(*arguments) | sostenuto.Forecast(1)

    for fraction in FRACTIONS:
        options: dict[str, Any] = dict(target_fraction=fraction, max_consecutive_reuse=4, eps_scale_grid=SCALES)
        for order, suffix in ((0, ""), (1, " | linear")):  # the last value is the papers'
            recipe: Any = EBCalibration(fill="stack", forecast_order=order, **options)
            eb = partial(lab.calibrated, f"eb-{fraction}-{order}", recipe)
            add(f"EB-Cache{suffix}", sostenuto.EBCache, eb)
        feb_options = FEBCalibration(forecast_order=0, **{**options, "eps_scale_grid": FEB_SCALES})
        feb = partial(lab.calibrated, f"feb-{fraction}", feb_options)
        add("FEB-Cache", sostenuto.FEBCache, feb)
        own = SmoothCacheCalibration(target_fraction=fraction, max_lag=4)
        smooth = partial(lab.calibrated, f"smoothcache-{fraction}", own)
        add("SmoothCache", sostenuto.SmoothCache, smooth)
        add("SmoothCache | linear", linear(sostenuto.SmoothCache), smooth)
        measured = MagCacheCalibration(1 - fraction, retention=0.1)
        add(
            "MagCache",
            sostenuto.MagCache,
            partial(lab.calibrated, f"mag-{fraction}", measured, sostenuto.MagCacheRatios),
        )
        fitted = TeaCacheCalibration(target_skipped=1 - fraction)
        add("TeaCache", sostenuto.TeaCache, partial(lab.calibrated, f"tea-{fraction}", fitted, sostenuto.TeaCacheFit))
    for theta in (0.1, 0.15):  # the largest are published; attention is a small share of this network
        search = DiTFastAttnCalibration(theta=theta)
        greedy = partial(lab.calibrated, f"ditfastattn-{theta}", search, CacheTable, GREEDY_SAMPLES)
        add("DiTFastAttn", sostenuto.DiTFastAttn, greedy)
    for threshold in (0.02, 0.05, 0.1, 0.3, 0.5, 0.9, 0.95, 0.99):
        add("L2C", sostenuto.L2C, threshold=threshold)
    for threshold in (0.05, 0.1, 0.15, 0.2, 0.3, 0.5):
        add("DBCache", sostenuto.DBCache, 1, 0, threshold, warmup=2)
        add("DBCache | linear", sostenuto.DBCache, 1, 0, threshold, warmup=2, forecast_order=1)
    for interval in (2, 3, 4, 5, 6):
        add("FORA", sostenuto.FORA, interval)
        add("FORA | linear", linear(sostenuto.FORA), interval)
        for order in (1, 2, 3):
            add(f"TaylorSeer, order {order}", sostenuto.TaylorSeer, interval, order, 2)
        add("TaylorSeer, official", sostenuto.TaylorSeer, interval, 3, 2, differences="last-gap")
        add("AB-Cache", sostenuto.ABCache, 2, 3, interval)
        add("ToCa", sostenuto.ToCa, interval)
        add("DuCa", sostenuto.DuCa, interval)
        add("Δ-DiT", sostenuto.DeltaDiT, interval)
        add("PAB", sostenuto.PAB, interval, window=(100, 850))
    return grid


def chosen(
    grid: dict[str, list[Method]], speedup: Callable[[Method], float | None], targets: list[float]
) -> list[tuple[float | None, str, Method]]:
    """Target, name and setting of every row: the nearest setting within 15 %; target ``None`` for a method without any."""
    rows: list[tuple[float | None, str, Method]] = []
    for name, methods in grid.items():
        counted = [(found, method) for method in methods if (found := speedup(method)) is not None]
        own: list[tuple[float | None, str, Method]] = []
        for target in targets:
            found, method = min(counted, key=lambda pair: abs(math.log(pair[0] / target)))
            if abs(math.log(found / target)) <= NEAR:
                own.append((target, name, method))
        rows += own or [(None, name, max(counted, key=lambda pair: pair[0])[1])]
    return sorted(rows, key=lambda row: row[0] or 0)


def entries(
    lab: Lab, grid: dict[str, list[Method]], targets: list[float], cost: str, pairs: int
) -> tuple[list[Entry], dict[str, float]]:
    """The rows, the first of which is the uncached sampler; and the b of those for which one was searched besides."""
    found, scales = [lab.uncached()], {}
    for target in targets:
        fewer = lab.fewer(1 / target)
        found.append(replace(fewer, name=f"{target:g}x: {fewer.name}"))
    for target, name, method in chosen(grid, lambda method: lab.speed(method, cost, pairs), targets):
        speed = "at most" if target is None else f"{target:g}x"
        found.append(lab.row(f"{speed}: {name}", method))
        if name in COMBINED and lab.search_images:
            b = scales[found[-1].name] = best_scale(lab, method)
            if b != 1:  # or else it is the row above
                found.append(lab.row(f"{speed}: {name} | ε-scaling", method | sostenuto.EpsilonScaling(1 / b)))
    return found, scales


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(num_images=5000)
    parser.add_argument("--speedups", type=float, nargs="+", default=[1.5, 2.0, 3.0])
    parser.add_argument("--cost", choices=("macs", "time"), default="time")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--search-images", type=int, default=200, help="for each value of b; 0: not searched")
    parser.add_argument("--only", nargs="+", help="names of methods")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    pipe = load_demo_pipeline()
    lab = Lab(pipe, options.output, "ddim", STEPS, options.dtype, options.search_images)
    grid = settings_of_every_method(lab, options.only)
    rows, scales = entries(lab, grid, options.speedups, options.cost, options.pairs)
    settings = {entry.name: repr(entry.method)[:200] for entry in rows}
    compare(options, rows, pipe, cost=options.cost, settings=settings, noise_scales=scales)


if __name__ == "__main__":
    main()
