"""The tuned plans against the published methods at equal cost, on the demo model or another one that ``demo.train`` made.

    python benchmarks/tune.py --num-images 1000 --seeds 0 1 2 --json docs/results/tune.json
    python benchmarks/tune.py --model runs/small --output runs/lab-small --solver dpm-solver++ --steps 20

Tuning, for each target by itself, and calibrations come first, each kept in the output folder (``--search-only`` ends there,
so that ``--shard`` may then share the sampling); then every row is sampled on the same noise and labels, which none of the
searches has seen. What an interrupted run has done is kept. ``--cost time`` compares at equal measured time, ``macs`` at equal
multiply-accumulates: EB-Cache, FEB-Cache and SmoothCache are calibrated until their speed in that unit is the target's within
5 %; of a method with a choice of settings each target takes the nearest one, if it is within 15 %, slower ones too; what gets
to none is named. EB, FEB and AB are the papers' methods, EB and FEB with the last value for a gap; "EB, linear" and "AB,
clean sample" are what we recommend beside them. L2C
runs a router that was trained for DDIM with as many steps: that of the demo ships, for another model pass one.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lab import AS_PUBLISHED, SEARCH_SEED, Lab, arguments, compare
from tqdm import tqdm

import sostenuto
from sostenuto.calibrations import Calibration, EBCalibration, FEBCalibration, SmoothCacheCalibration
from sostenuto.demo.compare import SHIPPED
from sostenuto.demo.judge import Judge
from sostenuto.demo.pipeline import load_demo_pipeline, load_trained_pipeline
from sostenuto.demo.rows import Entry, demo_sample
from sostenuto.methods.base import Method
from sostenuto.router import Router
from sostenuto.table import CacheTable

LIKE = math.log(1.05)  # ratio of speeds within which a calibration has reached its target
FAR = math.log(1.15)  # from which on a setting is no match for a target
TRIES = 3  # calibrations of a method for a target
ROWS = 8  # of the tuner's samples: times of fewer say little of those of many, more make its probes dear

Named = tuple[str, Method]


@dataclass
class Rivals:
    """The published methods on one model and solver, and how fast they are there."""

    lab: Lab
    cost: str
    pairs: int
    router: Path | None
    only: Sequence[str] | None = None
    """Names of those that are asked for; by default all."""

    def _asked(self, name: str) -> bool:
        return self.only is None or name in self.only

    def _speed(self, method: Method) -> float | None:
        return self.lab.speed(method, self.cost, self.pairs)

    def of(self, target: float) -> tuple[list[Named], list[str]]:
        """The methods at this speed-up, and in words those that don't get there."""
        settings: dict[str, list[Method]] = {}
        for name, method in [*self.calibrated(target), *intervals(), *self.learned()]:
            if self._asked(name):
                settings.setdefault(name, []).append(method)
        there, absent = [], []
        if self._asked("L2C") and "L2C" not in settings:
            absent.append("L2C: no router for this model and so many steps")
        for name, methods in settings.items():
            timed = [(speed, method) for method in methods if (speed := self._speed(method)) is not None]
            if not timed:
                absent.append(f"{name}: refused by this model")
                continue
            nearest, method = min(timed, key=lambda pair: abs(math.log(pair[0] / target)))
            if abs(math.log(nearest / target)) < FAR:
                there.append((name, method))
            else:
                absent.append(f"{name}: {extent([speed for speed, _ in timed], nearest)}")
        return there, absent

    def calibrated(self, target: float) -> Iterator[Named]:
        """The methods that are calibrated for a cost, each in the settings that were tried to get to this speed-up."""
        scales = self.lab.scales
        eb: dict[str, Any] = {"eps_scale_grid": scales}
        feb: dict[str, Any] = {"eps_scale_grid": (*scales, 1.02, 1.03)}  # what its falling b(τ) is multiplied by
        ways: list[tuple[str, Callable[[float], Calibration], Callable[[CacheTable], Method]]] = [
            ("EB", lambda share: EBCalibration(target_fraction=share, **eb, **AS_PUBLISHED), sostenuto.EBCache),
            ("EB, linear", lambda share: EBCalibration(target_fraction=share, fill="stack", **eb), sostenuto.EBCache),
            ("FEB", lambda share: FEBCalibration(target_fraction=share, **feb, **AS_PUBLISHED), sostenuto.FEBCache),
            (
                "SmoothCache",
                lambda share: SmoothCacheCalibration(target_fraction=share, max_lag=5),
                sostenuto.SmoothCache,
            ),
        ]
        for name, calibration, method in ways:
            if not self._asked(name):
                continue
            share = 1 / target
            for _ in range(TRIES):
                file = name.lower().replace(", ", "-")
                own = method(self.lab.calibrated(f"{file}-{target:g}", calibration(share)))
                yield name, own
                speed = self._speed(own)
                if speed is None or abs(math.log(speed / target)) < LIKE:
                    break
                share = min(1.0, round(share * speed / target, 4))

    def learned(self) -> Iterator[Named]:
        """Learning-to-Cache, where there is a router for so many steps; its plan is run with any solver."""
        if self.router is not None and self.router.is_file():
            router = replace(Router.load(self.router), scheduler={})
            if router.num_inference_steps == self.lab.num_inference_steps:
                for threshold in (0.05, 0.1, 0.5, 0.9, 0.95, 0.99):
                    yield "L2C", sostenuto.L2C(router, threshold)


def intervals() -> Iterator[Named]:
    """The methods without a calibration, in all their settings."""
    for interval in (2, 3, 4, 5, 6):
        yield "FORA", sostenuto.FORA(interval)
        yield "FORA, linear", sostenuto.FORA(interval, forecast_order=1)
        for order in (1, 2):
            yield f"TaylorSeer, order {order}", sostenuto.TaylorSeer(interval, order, 2)
        for warmup in (2, 5, 10, 20):
            yield "AB", sostenuto.ABCache(2, warmup, interval)
            yield "AB, clean sample", sostenuto.ABCache(2, warmup, interval, extrapolates="sample")


def extent(speeds: Sequence[float], nearest: float) -> str:
    """How far a method goes that has no setting near a target."""
    if nearest == max(speeds):
        return f"at most {nearest:.2f}×"
    return f"{nearest:.2f}× at least" if nearest == min(speeds) else f"{nearest:.2f}× is the nearest"


def tuned(lab: Lab, target: float, prefer: str, cost: str, score_images: int) -> Method:
    """The tuned plan for a speed-up."""
    labels = torch.arange(ROWS)

    def sample(pipe: Any, generator: torch.Generator, num_inference_steps: int) -> Any:
        chosen = (labels * 3 + torch.randint(10, (1,), generator=generator)) % 10
        return pipe(chosen.tolist(), num_inference_steps, generator=generator, output_type="pt").images

    def make() -> CacheTable:
        return sostenuto.tune(
            lab.pipe,
            sample,
            num_inference_steps=lab.num_inference_steps,
            speedup=target,
            generator=torch.Generator().manual_seed(SEARCH_SEED),
            score=Judge().distance,
            score_sample=demo_sample(score_images),
            folder=lab.folder / "tuned" / lab.key(score_images, ROWS),
            show_progress=True,
            options=options,
        ).point.table

    options = sostenuto.TuneOptions(speedups=(target,), budget=cost, prefer=prefer)
    table = lab.kept(f"tuned-by-{prefer}-{target:g}", (options, score_images, ROWS), make)
    return sostenuto.EBCache(table)


def rows(options: argparse.Namespace, lab: Lab) -> tuple[list[Entry], list[str]]:
    """What is compared, and in words what could not be."""
    shipped = SHIPPED / f"demo-ddim{options.steps}-l2c.safetensors" if options.model is None else None
    rivals = Rivals(lab, options.cost, options.pairs, options.router or shipped, options.rivals)
    entries, absent = [lab.uncached()], []
    for target in tqdm(options.speedups, desc="searches"):
        fewer = lab.fewer(1 / target)
        named = [(f"tuned by {p}", tuned(lab, target, p, options.cost, options.score_images)) for p in options.prefer]
        there, missing = rivals.of(target)
        entries.append(replace(fewer, name=f"{target:g}x: {fewer.name}"))
        entries += [lab.row(f"{target:g}x: {name}", method) for name, method in [*named, *there]]
        absent += [f"{target:g}×: {words}" for words in missing]
    return entries, absent


PREFERENCES = ("score", "nearness")
NAMES = (
    "EB", "EB, linear", "FEB", "SmoothCache", "FORA", "FORA, linear", "TaylorSeer, order 1", "TaylorSeer, order 2", "AB",
    "AB, clean sample", "L2C",
)  # fmt: skip


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", type=Path, help="folder that demo.train wrote; by default the demo's own model")
    parser.add_argument("--solver", choices=("ddpm", "ddim", "dpm-solver++"), default="ddpm")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--speedups", type=float, nargs="+", default=[1.5, 2.0, 2.5, 3.0, 4.0])
    parser.add_argument("--cost", choices=("macs", "time"), default="time")
    parser.add_argument("--prefer", choices=PREFERENCES, nargs="+", default=PREFERENCES, help="what to tune by")
    parser.add_argument(
        "--rivals",
        nargs="+",
        choices=NAMES,
        metavar="NAME",
        help='these alone, such as FEB "EB, linear"; by default all',
    )
    parser.add_argument("--search-images", type=int, default=128, help="for each value of b; 0: not searched")
    parser.add_argument("--score-images", type=int, default=128, help="images that the tuner takes a distance of")
    parser.add_argument("--router", type=Path, help="of L2C, for another model than the demo's")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--search-only", action="store_true", help="tune and calibrate, sample nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    pipe = load_demo_pipeline() if options.model is None else load_trained_pipeline(options.model)
    lab = Lab(pipe, options.output, options.solver, options.steps, options.dtype, options.search_images)
    entries, absent = rows(options, lab)
    if not options.search_only:
        compare(options, entries, pipe, cost=options.cost, absent=absent)


if __name__ == "__main__":
    main()
