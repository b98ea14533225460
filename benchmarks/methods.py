"""Every method on the demo model at equal cost: 50 DDIM steps, of each method the setting nearest to the speed-up.

    python benchmarks/methods.py --num-images 5000 --dtype bfloat16 --output runs/methods --json docs/results/methods.json

Calibrated methods are calibrated first, on 8 samples (DiTFastAttn on 4). Then every setting is counted in one small
generation, and of each method the setting nearest to each target (within 15 %) is sampled with the same noise and labels; a
method that gets to none of them has one row at the most it does. EB-Cache's and FEB-Cache's noise scale is searched by the
distance of some images, as their papers do, and so is one for a second row of some others; no search sees the noise of the
rows. There is no guidance, so that what caches between its halves has nothing to do. The measured speed-up is in the results
besides. What an interrupted run has done is kept in the output folder, and several processes can share the sampling:
`--shard 0 2` and `--shard 1 2`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import sostenuto
from sostenuto.calibrations import (
    Calibration,
    DiTFastAttnCalibration,
    EBCalibration,
    FEBCalibration,
    MagCacheCalibration,
    SmoothCacheCalibration,
    TeaCacheCalibration,
)
from sostenuto.demo.compare import Entry, Settings, demo_sample, run_entries, with_solver
from sostenuto.demo.judge import Judge
from sostenuto.demo.pipeline import load_demo_pipeline
from sostenuto.demo.show import terminal_table
from sostenuto.files import publish_json
from sostenuto.methods.base import Method

STEPS = 50
FRACTIONS = (0.64, 0.48, 0.32)  # of the multiply-accumulates, for the methods that are calibrated to a cost
NEAR = math.log(1.15)
COMBINED = ("FORA", "ToCa", "L2C", "TaylorSeer, order 2", "SmoothCache")  # sampled with a noise scale of their own, too
SCALES = (0.97, 0.98, 0.99, 1.0, 1.01)  # of every search for b
SEARCH_SEED = 900_001  # of every calibration and search: none of the noise that the rows are judged on
SAMPLES = 8
GREEDY_SAMPLES = 4  # DiTFastAttn tries every layer at every step, with a run of the network for each candidate


@dataclass
class Workshop:
    """Calibrations and counts, each made once and kept in a folder."""

    pipe: Any
    folder: Path
    search_images: int

    def calibrated(self, name: str, calibration: Calibration, result: type, num_samples: int = SAMPLES) -> Any:
        """What a calibration made, from its file where there is one."""
        path = self.folder / "calibrated" / f"{name}.json"
        if not path.exists():
            tqdm.write(f"{name} is calibrated on {num_samples} samples", file=sys.stderr)
            scored: dict[str, Any] = {}
            if self.search_images and isinstance(calibration, EBCalibration):
                scored = {"score": Judge().distance, "score_sample": demo_sample(self.search_images)}
            made = sostenuto.calibrate(
                self.pipe,
                calibration,
                demo_sample(num_samples),
                num_inference_steps=STEPS,
                num_samples=num_samples,
                generator=torch.Generator().manual_seed(SEARCH_SEED),
                show_progress=True,
                **scored,
            )
            made.save(path)
        return result.load(path)

    def with_noise_scale(self, method: Method) -> Method:
        """The method with the constant b that gives the smallest distance of a few images."""
        path = self.folder / "calibrated" / f"scale-{_digest(method)}.json"
        if not path.exists():
            distances = {}
            for b in tqdm(SCALES, desc=f"noise scale of {method.name}"):
                with sostenuto.enable(self.pipe, method | sostenuto.EpsilonScaling(1 / b)):
                    images = demo_sample(self.search_images)(self.pipe, torch.Generator().manual_seed(SEARCH_SEED))
                distances[b] = Judge().distance(images)
            best = min(distances, key=distances.__getitem__)
            publish_json(path, {"method": repr(method), "distances": distances, "b": best}, indent=1)
        return method | sostenuto.EpsilonScaling(1 / json.loads(path.read_text())["b"])

    def speedup(self, method: Method) -> float:
        """By multiply-accumulates, of a generation of ten images."""
        path = self.folder / "counted.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        if (key := _digest(method)) not in known:
            with sostenuto.enable(self.pipe, method) as handle:
                self.pipe([*range(10)], STEPS, generator=torch.Generator().manual_seed(0), output_type="latent")
                known[key] = handle.stats.ideal_speedup
            publish_json(path, known, indent=1)
        return known[key]


def _digest(method: Method) -> str:
    return hashlib.sha256(repr(method).encode()).hexdigest()[:16]


def settings_of_every_method(shop: Workshop, only: list[str] | None = None) -> dict[str, list[Method]]:
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
            eb = partial(shop.calibrated, f"eb-{fraction}-{order}", recipe, sostenuto.CacheTable)
            add(f"EB-Cache{suffix}", sostenuto.EBCache, eb)
        feb_options = FEBCalibration(forecast_order=0, **options)
        feb = partial(shop.calibrated, f"feb-{fraction}", feb_options, sostenuto.CacheTable)
        add("FEB-Cache", sostenuto.FEBCache, feb)
        own = SmoothCacheCalibration(target_fraction=fraction, max_lag=4)
        smooth = partial(shop.calibrated, f"smoothcache-{fraction}", own, sostenuto.CacheTable)
        add("SmoothCache", sostenuto.SmoothCache, smooth)
        add("SmoothCache | linear", linear(sostenuto.SmoothCache), smooth)
        measured = MagCacheCalibration(1 - fraction, retention=0.1)
        add(
            "MagCache",
            sostenuto.MagCache,
            partial(shop.calibrated, f"mag-{fraction}", measured, sostenuto.MagCacheRatios),
        )
        fitted = TeaCacheCalibration(target_skipped=1 - fraction)
        add("TeaCache", sostenuto.TeaCache, partial(shop.calibrated, f"tea-{fraction}", fitted, sostenuto.TeaCacheFit))
    for theta in (0.15, 0.6):  # the largest published one, and far beyond: attention is a small share of this network
        search = DiTFastAttnCalibration(theta=theta)
        greedy = partial(shop.calibrated, f"ditfastattn-{theta}", search, sostenuto.CacheTable, GREEDY_SAMPLES)
        add("DiTFastAttn", sostenuto.DiTFastAttn, greedy)
    for threshold in (0.02, 0.05, 0.1, 0.3, 0.5, 0.9):
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
    grid: dict[str, list[Method]], speedup: Callable[[Method], float], targets: list[float]
) -> list[tuple[float | None, str, Method]]:
    """Target, name and setting of every row: the nearest setting within 15 %; target ``None`` for a method without any."""
    rows: list[tuple[float | None, str, Method]] = []
    for name, methods in grid.items():
        counted = [(speedup(method), method) for method in methods]
        own: list[tuple[float | None, str, Method]] = []
        for target in targets:
            found, method = min(counted, key=lambda pair: abs(math.log(pair[0] / target)))
            if abs(math.log(found / target)) <= NEAR:
                own.append((target, name, method))
        rows += own or [(None, name, max(counted, key=lambda pair: pair[0])[1])]
    return sorted(rows, key=lambda row: row[0] or 0)


def entries(shop: Workshop, grid: dict[str, list[Method]], targets: list[float]) -> list[Entry]:
    """The rows; the first is the uncached sampler."""
    found = [Entry("uncached", sostenuto.NoCache(), STEPS, "ddim")]
    for target in targets:
        steps = round(STEPS / target)
        found.append(Entry(f"{target:g}x: {steps} steps", sostenuto.NoCache(), steps, "ddim", reference=None))
    for target, name, method in tqdm(chosen(grid, shop.speedup, targets), desc="noise scales"):
        speed = "at most" if target is None else f"{target:g}x"
        found.append(Entry(f"{speed}: {name}", method, STEPS, "ddim"))
        if name in COMBINED and shop.search_images:
            found.append(Entry(f"{speed}: {name} | ε-scaling", shop.with_noise_scale(method), STEPS, "ddim"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-images", type=int, default=5000)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--speedups", type=float, nargs="+", default=[1.5, 2.0, 3.0])
    parser.add_argument("--search-images", type=int, default=200, help="per value of b; 0: not searched, 1")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the matrix products")
    parser.add_argument("--shard", type=int, nargs=2, default=(0, 1), help="this process's part, and their number")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", help="names of methods")
    parser.add_argument("--output", type=Path, default=Path("runs/methods"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    pipe = load_demo_pipeline()
    shop = Workshop(pipe, options.output, options.search_images)
    with with_solver(pipe, "ddim"), torch.autocast("cpu", torch.bfloat16, enabled=options.dtype == "bfloat16"):
        grid = settings_of_every_method(shop, options.only)
        rows = entries(shop, grid, options.speedups)
    settings = Settings(options.num_images, options.batch_size, dtype=options.dtype, shard=tuple(options.shard))
    results = run_entries(options.output, rows, settings)
    if results.get("missing"):
        print(f"{results['missing']} batches are left to the other processes: run again when they are done")
        return
    results["settings"] = {entry.name: repr(entry.method)[:200] for entry in rows}
    print(terminal_table(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
