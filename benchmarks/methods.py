"""Every method on the demo model at equal measured speed: 50 DDIM steps, of each method the setting nearest to the speed.

    python benchmarks/methods.py --num-images 5000 --speedups 1.5 2 3 --output runs/methods --json docs/results/methods.json

Calibrated methods are calibrated first, on 8 samples. Then every setting is timed against the uncached sampler, pair by
pair, and the nearest one of each method is sampled with the same noise and labels. What an interrupted run has done is
kept in the output folder.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch
from diffusers import DDIMScheduler
from tqdm import tqdm

import sostenuto
from sostenuto.calibrations import EBCalibration, FEBCalibration, SmoothCacheCalibration
from sostenuto.demo.compare import Entry, Settings, demo_sample, run_entries
from sostenuto.demo.pipeline import load_demo_pipeline
from sostenuto.demo.show import terminal_table
from sostenuto.methods.base import Method

STEPS = 50
FRACTIONS = (0.64, 0.48, 0.32)  # of the multiply-accumulates, for the methods that are calibrated to a cost


def settings_of_every_method(pipe) -> Iterator[tuple[str, Method]]:
    """The name of a method and one of its settings."""

    def calibrated(calibration):
        generator = torch.Generator().manual_seed(0)
        return sostenuto.calibrate(pipe, calibration, demo_sample(8), num_inference_steps=STEPS, generator=generator)

    for fraction in FRACTIONS:
        options = dict(target_fraction=fraction, max_consecutive_reuse=4, fill="stack")
        yield "EB-Cache", sostenuto.EBCache(calibrated(EBCalibration(**options)))
        options.pop("fill")
        yield "FEB-Cache", sostenuto.FEBCache(calibrated(FEBCalibration(**options)))
        yield (
            "SmoothCache",
            sostenuto.SmoothCache(calibrated(SmoothCacheCalibration(target_fraction=fraction, max_lag=4))),
        )
    ratios = calibrated(sostenuto.MagCacheCalibration())
    for threshold, most in ((0.06, 1), (0.12, 2), (0.24, 4)):
        yield "MagCache", sostenuto.MagCache(ratios, threshold, most, retention=0.1)
    fit = calibrated(sostenuto.TeaCacheCalibration())
    for threshold in (0.05, 0.1, 0.15, 0.2, 0.3):
        yield "TeaCache", sostenuto.TeaCache(fit, threshold)
    for threshold in (0.05, 0.1, 0.15, 0.2, 0.3):
        yield "DBCache", sostenuto.DBCache(1, 0, threshold, warmup=2)
    for interval in (2, 3, 4, 5):
        yield "FORA", sostenuto.FORA(interval)
        yield "FORA, linear", sostenuto.FORA(interval, forecast_order=1)
        yield "TaylorSeer", sostenuto.TaylorSeer(interval, 2, 2)
        yield "AB-Cache", sostenuto.ABCache(2, 3, interval)
        yield "ToCa", sostenuto.ToCa(interval)
        yield "DuCa", sostenuto.DuCa(interval)
        yield "Δ-DiT", sostenuto.DeltaDiT(interval)
        yield "PAB", sostenuto.PAB(interval, window=(100, 850))


def seconds(pipe, method: Method | None, batch: int) -> float:
    """Time of one generation."""
    labels = [i % 10 for i in range(batch)]
    with sostenuto.enable(pipe, method or sostenuto.NoCache()):
        began = time.perf_counter()
        pipe(labels, STEPS, generator=torch.Generator().manual_seed(0), output_type="latent")
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-images", type=int, default=5000)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--speedups", type=float, nargs="+", default=[1.5, 2.0, 3.0])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("runs/methods"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    pipe = load_demo_pipeline()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    timed = []
    with torch.autocast("cpu", torch.bfloat16, enabled=options.dtype == "bfloat16"):
        for name, method in tqdm(list(settings_of_every_method(pipe)), desc="time"):
            seconds(pipe, method, 16)  # warm-up
            pairs = [(seconds(pipe, None, 16), seconds(pipe, method, 16)) for _ in range(options.pairs)]
            timed.append((name, method, median(a / b for a, b in pairs)))

    entries = [Entry("uncached", sostenuto.NoCache(), STEPS, "ddim")]
    for target in options.speedups:
        steps = round(STEPS / target)
        entries.append(Entry(f"{target:g}x: {steps} steps", sostenuto.NoCache(), steps, "ddim", reference=None))
        for name in dict.fromkeys(name for name, *_ in timed):
            own = [(method, speed) for n, method, speed in timed if n == name]
            method, speed = min(own, key=lambda pair: abs(math.log(pair[1] / target)))
            if abs(math.log(speed / target)) < math.log(1.15):
                entries.append(Entry(f"{target:g}x: {name}", method, STEPS, "ddim"))
    results = run_entries(
        options.output, entries, Settings(options.num_images, options.batch_size, dtype=options.dtype)
    )
    results["settings"] = {entry.name: repr(entry.method)[:200] for entry in entries}
    print(terminal_table(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
