"""The tuned plans against the published methods at equal cost, on the demo model or another one that ``demo.train`` made.

    python benchmarks/tune.py --num-images 1000 --seeds 0 1 2 --output runs/tune --json docs/results/tune.json
    python benchmarks/tune.py --model runs/small --solver dpm-solver++ --steps 20 --speedups 1.5 2

Tuning, for each target by itself, and calibrations come first, each kept in the output folder (``--search-only`` ends there,
so that ``--shard`` may then share the sampling); then every row is sampled on the same noise and labels, which none of the
searches has seen. What an interrupted run has done is kept. ``--cost time`` compares at equal measured time, ``macs`` at equal
multiply-accumulates. Of a method with a choice of settings each target takes the nearest one, if it is within 15 %, slower
ones too. L2C runs a router that was trained for DDIM with as many steps: that of the demo ships, for another model pass one.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

import sostenuto
from sostenuto.calibrations import EBCalibration, FEBCalibration, SmoothCacheCalibration
from sostenuto.demo.compare import SHIPPED, Entry, Settings, demo_sample, run_entries, with_solver
from sostenuto.demo.judge import Judge
from sostenuto.demo.pipeline import load_demo_pipeline, load_trained_pipeline
from sostenuto.demo.record import record
from sostenuto.demo.show import terminal_table
from sostenuto.methods.base import Method
from sostenuto.router import Router
from sostenuto.table import CacheTable

SEARCH_SEED = 900_001  # of every search: none of the noise that the rows are judged on
FAR = 1.15  # ratio of speeds from which on a setting is no match for a target


def intervals() -> Iterator[tuple[str, Method]]:
    """The methods without a calibration, in all their settings."""
    for interval in (2, 3, 4, 5, 6):
        yield "FORA", sostenuto.FORA(interval)
        yield "FORA, linear", sostenuto.FORA(interval, forecast_order=1)
        for order in (1, 2):
            yield f"TaylorSeer, order {order}", sostenuto.TaylorSeer(interval, order, 2)
        for warmup in (2, 5, 10, 20):
            yield "AB", sostenuto.ABCache(2, warmup, interval)


class Rivals:
    """The rivals of one model and solver, with the calibrations that they need."""

    def __init__(self, pipe: Any, steps: int, folder: Path, search_images: int, router: Path | None) -> None:
        self._pipe, self._steps, self._folder, self._router = pipe, steps, folder, router
        self._score = (
            {} if not search_images else {"score": Judge().distance, "score_sample": demo_sample(search_images)}
        )

    def of(self, target: float) -> Iterator[tuple[str, Method]]:
        """The methods that are made for this speed-up."""
        share = 1 / target
        yield (
            "EB",
            sostenuto.EBCache(
                self._table(f"eb-{target:g}", lambda: EBCalibration(target_fraction=share, fill="stack"))
            ),
        )
        yield "FEB", sostenuto.FEBCache(self._table(f"feb-{target:g}", lambda: FEBCalibration(target_fraction=share)))
        yield (
            "SmoothCache",
            sostenuto.SmoothCache(
                self._table(f"smoothcache-{target:g}", lambda: SmoothCacheCalibration(target_fraction=share, max_lag=5))
            ),
        )

    def learned(self) -> Iterator[tuple[str, Method]]:
        """Learning-to-Cache, where there is a router for so many steps; its plan is run with any solver."""
        if self._router is not None and self._router.is_file():
            router = Router.load(self._router)
            for threshold in (0.05, 0.1, 0.3, 0.5):
                plan = router.to_table(threshold)
                if plan.num_inference_steps == self._steps:
                    yield "L2C", sostenuto.EBCache(replace(plan, scheduler={}))

    def _table(self, name: str, calibration: Callable[[], Any]) -> CacheTable:
        path = self._folder / f"{name}.json"
        if not path.exists():
            options = calibration()
            extra = self._score if hasattr(options, "eps_scale_grid") else {}
            table = sostenuto.calibrate(
                self._pipe,
                options,
                demo_sample(8),
                num_inference_steps=self._steps,
                generator=torch.Generator().manual_seed(SEARCH_SEED),
                show_progress=True,
                **extra,
            )
            table.save(path)
        return CacheTable.load(path)


def speed(pipe: Any, method: Method, steps: int, cost: str, pairs: int) -> float | None:
    """Speed-up over the uncached sampler; ``None`` where the method refuses this model."""

    def run(what: Method) -> tuple[float, float]:
        labels = [i % 10 for i in range(1 if cost == "macs" else 16)]
        with sostenuto.enable(pipe, what) as handle:
            began = time.perf_counter()
            pipe(labels, steps, generator=torch.Generator().manual_seed(0), output_type="latent")
            return time.perf_counter() - began, handle.stats.ideal_speedup

    try:
        _, ideal = run(method)
    except sostenuto.SostenutoError:
        return None
    if cost == "macs":
        return ideal
    return median(run(sostenuto.NoCache())[0] / run(method)[0] for _ in range(pairs))


def rows(options: argparse.Namespace, pipe: Any) -> list[Entry]:
    """What is compared."""
    folder, targets = options.output / "tables", [float(target) for target in options.speedups]
    folder.mkdir(parents=True, exist_ok=True)
    labels = torch.arange(4)

    def sample(pipe: Any, generator: torch.Generator, num_inference_steps: int) -> Any:
        chosen = (labels * 3 + torch.randint(10, (1,), generator=generator)) % 10
        return pipe(chosen.tolist(), num_inference_steps, generator=generator, output_type="pt").images

    def tuned(target: float, prefer: str) -> Method:
        found = options.output / f"tuned-by-{prefer}" / f"tuned-{target:g}x.json"
        if found.exists():
            return sostenuto.EBCache(CacheTable.load(found))
        result = sostenuto.tune(
            pipe,
            sample,
            num_inference_steps=options.steps,
            speedup=target,
            generator=torch.Generator().manual_seed(SEARCH_SEED),
            score=Judge().distance,
            score_sample=demo_sample(options.score_images),
            folder=options.output / "tuned",
            show_progress=True,
            options=sostenuto.TuneOptions(speedups=(target,), budget=options.cost, prefer=prefer),
        )
        found.parent.mkdir(exist_ok=True)
        result.point.table.save(found)
        return result.method

    shipped = SHIPPED / f"demo-ddim{options.steps}-l2c.safetensors" if options.model is None else None
    rivals = Rivals(pipe, options.steps, folder, options.search_images, options.router or shipped)
    timed = []
    for name, method in tqdm([*intervals(), *rivals.learned()], desc="cost"):
        own = speed(pipe, method, options.steps, options.cost, options.pairs)
        if own is not None:
            timed.append((name, method, own))
    entries = [Entry("uncached", sostenuto.NoCache(), options.steps, options.solver)]
    for target in targets:
        fewer = round(options.steps / target)
        entries.append(Entry(f"{target:g}x: {fewer} steps", sostenuto.NoCache(), fewer, options.solver, reference=None))
        for prefer in ("score", "nearness"):
            name = f"{target:g}x: tuned by {prefer}"
            entries.append(Entry(name, tuned(target, prefer), options.steps, options.solver))
        for name, method in rivals.of(target):
            entries.append(Entry(f"{target:g}x: {name}", method, options.steps, options.solver))
        for name in dict.fromkeys(name for name, *_ in timed):
            own = [(method, s) for n, method, s in timed if n == name]
            method, nearest = min(own, key=lambda pair: abs(math.log(pair[1] / target)))
            if abs(math.log(nearest / target)) < math.log(FAR):
                entries.append(Entry(f"{target:g}x: {name}", method, options.steps, options.solver))
    return entries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder that demo.train wrote; by default the demo's own model")
    parser.add_argument("--solver", choices=("ddpm", "ddim", "dpm-solver++"), default="ddpm")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--speedups", type=float, nargs="+", default=[1.5, 2.0, 2.5, 3.0, 4.0])
    parser.add_argument("--cost", choices=("macs", "time"), default="time")
    parser.add_argument("--num-images", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--score-images", type=int, default=128, help="images that the tuner takes a distance of")
    parser.add_argument(
        "--search-images", type=int, default=128, help="images of the rivals' own searches for b; 0: none"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--router", type=Path, help="of L2C, for another model than the demo's")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shard", type=int, nargs=2, default=(0, 1), metavar=("PART", "PARTS"))
    parser.add_argument("--search-only", action="store_true", help="tune and calibrate, sample nothing")
    parser.add_argument("--output", type=Path, default=Path("runs/tune"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    pipe = load_demo_pipeline() if options.model is None else load_trained_pipeline(options.model)
    with torch.autocast("cpu", torch.bfloat16, enabled=options.dtype == "bfloat16"), with_solver(pipe, options.solver):
        entries = rows(options, pipe)
    if options.search_only:
        return
    settings = Settings(
        options.num_images, options.batch_size, tuple(options.seeds), shard=tuple(options.shard), dtype=options.dtype
    )
    results = run_entries(options.output, entries, settings, pipe=None if options.model is None else pipe)
    if not results["rows"]:
        print(f"{results['missing']} batches are left to the other shards")
        return
    results = record(options.output, entries, settings, results)
    print(terminal_table(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
