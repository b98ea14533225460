"""What the comparisons on the demo model share: their options, what is calibrated for them and kept, and how they end."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

import sostenuto
from sostenuto.calibrations import Calibration, EBCalibration
from sostenuto.demo.compare import SEARCH_SEED
from sostenuto.demo.judge import Judge
from sostenuto.demo.pipeline import DemoPipeline
from sostenuto.demo.record import record
from sostenuto.demo.rows import Entry, Settings, demo_sample, digest, with_solver
from sostenuto.demo.run import run_entries, weights_digest
from sostenuto.demo.show import terminal_table
from sostenuto.files import publish_json
from sostenuto.methods.base import Method
from sostenuto.table import CacheTable

SAMPLES = 8
AT_ONCE = 20  # in one generation: labels in turn go on in the next one
SCALES = (0.955, 0.97, 0.98, 0.99, 1.0, 1.01)  # tried for b, with 50 steps; the first is the paper's
AS_PUBLISHED: dict[str, Any] = {"forecast_order": 0, "fill": "branches"}
"""What EB-Cache's and FEB-Cache's papers fill gaps with, the last value of each branch; where they are silent, our defaults."""


@dataclass(frozen=True)
class Lab:
    """One model under one sampler, and what was made for it: files in a folder, each named by all that it was made from."""

    pipe: DemoPipeline
    folder: Path
    solver: str = "ddpm"
    num_inference_steps: int = 50
    dtype: str = "float32"
    search_images: int = 0
    """For each value of b that a calibration tries; 0: b isn't searched."""

    def key(self, *recipe: Any) -> str:
        """A name for what is made for this model and sampler by a recipe."""
        return digest(weights_digest(self.pipe), self.solver, self.num_inference_steps, self.dtype, *recipe)

    @contextmanager
    def sampler(self) -> Iterator[None]:
        """The model under its solver, in its precision."""
        with with_solver(self.pipe, self.solver), torch.autocast("cpu", torch.bfloat16, self.dtype == "bfloat16"):
            yield

    def kept(self, name: str, recipe: Sequence[Any], make: Callable[[], Any], result: type = CacheTable) -> Any:
        """What ``make`` gave, from its file: what was made by another recipe, or for another sampler, has another one."""
        path = self.folder / "made" / f"{name}-{self.key(*recipe)}.json"
        if not path.exists():
            with self.sampler():
                made = make()
            made.save(path)
        return result.load(path)

    def calibrated(
        self, name: str, calibration: Calibration, result: type = CacheTable, num_samples: int = SAMPLES
    ) -> Any:
        """What a calibration made; EB-Cache's and FEB-Cache's b is chosen by the distance of some images."""
        searched = self.search_images if isinstance(calibration, EBCalibration) else 0
        scored: dict[str, Any] = {}
        if searched:
            scored = {"score": Judge().distance, "score_sample": demo_sample(searched)}
        return self.kept(
            name,
            (calibration, num_samples, searched),
            lambda: sostenuto.calibrate(
                self.pipe,
                calibration,
                demo_sample(min(num_samples, AT_ONCE)),
                num_inference_steps=self.num_inference_steps,
                num_samples=num_samples,
                generator=torch.Generator().manual_seed(SEARCH_SEED),
                show_progress=True,
                **scored,
            ),
            result,
        )

    @property
    def scales(self) -> tuple[float, ...]:
        """The values of b that are tried: nearer to 1 where more steps multiply them."""
        share = min(1, 50 / self.num_inference_steps)
        return tuple(round(1 - share * (1 - b), 4) for b in SCALES)

    def published_eb(self, fraction: float, **options: Any) -> CacheTable:
        """EB-Cache's table as published that costs this share of the multiply-accumulates."""
        calibration = EBCalibration(target_fraction=fraction, eps_scale_grid=self.scales, **AS_PUBLISHED)
        return self.calibrated(f"eb-{fraction:g}", replace(calibration, **options))

    def speed(self, method: Method, cost: str, pairs: int) -> float | None:
        """Speed-up over the uncached sampler, measured once and kept; ``None`` where the model refuses the method.

        Args:
            method: the method.
            cost: ``"time"``, the median of pairs of generations of 16 images, or ``"macs"``.
            pairs: how many.
        """
        path = self.folder / "speeds" / f"{self.key(cost, pairs, method)}.json"
        if not path.exists():
            with self.sampler():
                measured = self._measured(method, cost, pairs)
            publish_json(path, {"method": repr(method), "speedup": measured}, indent=1)
        return json.loads(path.read_text())["speedup"]

    def _measured(self, method: Method, cost: str, pairs: int) -> float | None:
        labels = [i % 10 for i in range(1 if cost == "macs" else 16)]

        def seconds() -> float:
            began = time.perf_counter()
            noise = torch.Generator().manual_seed(0)
            self.pipe(labels, self.num_inference_steps, generator=noise, output_type="latent")
            return time.perf_counter() - began

        def timed(what: Method) -> float:
            with sostenuto.enable(self.pipe, what):
                return seconds()

        try:
            with sostenuto.enable(self.pipe, method) as handle:
                seconds()
                if cost == "macs":
                    return handle.stats.ideal_speedup
        except sostenuto.SostenutoError:
            return None
        return median(timed(sostenuto.NoCache()) / timed(method) for _ in range(pairs))

    def uncached(self) -> Entry:
        """The row that everything is measured against."""
        return Entry("uncached", sostenuto.NoCache(), self.num_inference_steps, self.solver)

    def fewer(self, fraction: float) -> Entry:
        """The uncached sampler with this share of the steps; of a solver without noise of its own beside the images of all."""
        steps = round(fraction * self.num_inference_steps)
        reference = None if self.solver == "ddpm" else "uncached"
        return Entry(f"{steps} steps", sostenuto.NoCache(), steps, self.solver, reference=reference)

    def row(self, name: str, method: sostenuto.Method) -> Entry:
        """A method under this sampler."""
        return Entry(name, method, self.num_inference_steps, self.solver)


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that all have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-images", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--pool",
        action="store_true",
        help="judge the images of all seeds together; the seeds are what intervals are over",
    )
    parser.add_argument(
        "--untimed",
        action="store_true",
        help="no measured speed-ups, for where rows were sampled beside changing other work",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the matrix products")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shard", type=int, nargs=2, default=(0, 1), help="this process's part, and their number")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/lab"), help="rows that several share are sampled once"
    )
    parser.add_argument("--json", type=Path)
    return parser


def compare(options: argparse.Namespace, entries: Sequence[Entry], pipe: DemoPipeline, **facts: Any) -> None:
    """Sample the rows, print their table and write it with the facts to ``--json``; or say what other processes have left."""
    settings = Settings(
        options.num_images,
        options.batch_size,
        tuple(options.seeds),
        shard=tuple(options.shard),
        dtype=options.dtype,
        timed=not options.untimed,
    )
    results = run_entries(options.output, entries, settings, pipe=pipe)
    if not results["rows"]:
        print(f"{results['missing']} batches are left to the other processes: run again when they are done")
        return
    results = record(options.output, entries, settings, results, options.pool) | facts
    print(terminal_table(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
