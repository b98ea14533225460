"""Exposure bias repaired: the demo's two tables with a calibrated noise scale, a constant one, FEB-Cache's curve, and none.

    python benchmarks/exposure_bias.py --num-images 1000 --json docs/results/exposure-bias.json

The tables are the shipped ones for 1.5× and 2.5×, each with: no scaling; the constant b that was searched for it by the
Fréchet distance; FEB-Cache's b(τ) with the published values; the factors of `sostenuto.EpsilonScalingCalibration`, by
variance and by norm, measured on training images without looking at a single generated one. Every row has the same noise and
labels. What an interrupted run has done is kept in the output folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lab import Lab, arguments, compare

import sostenuto
from sostenuto.clock import normalized_times
from sostenuto.demo import data
from sostenuto.demo.compare import SHIPPED
from sostenuto.demo.pipeline import load_demo_pipeline
from sostenuto.demo.rows import NUM_STEPS, labels_of
from sostenuto.methods.feb import noise_scale_curve
from sostenuto.table import CacheTable

SPEEDS = {"1.5x": 0.64, "2.5x": 0.4}  # and the share of the steps that costs as much
MATCHES = ("variance", "norm")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--num-samples", type=int, default=40, help="training images to calibrate on, by twenties")
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST's IDX files")
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help="other ones stretch the tables, for a quick look")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    pipe = load_demo_pipeline()
    lab = Lab(pipe, options.output, num_inference_steps=options.steps, dtype=options.dtype)
    real = data.of_labels("train", labels_of(options.num_samples).tolist(), options.data)
    curve = tuple(noise_scale_curve(normalized_times(options.steps)))
    entries = [lab.uncached()]
    factors: dict[str, Any] = {}
    for speed, fraction in SPEEDS.items():
        table = CacheTable.load(SHIPPED / f"demo-ddpm50-{speed}.json").resample(options.steps)
        alone = sostenuto.EBCache(table, eps_scale=1.0)
        entries += [
            lab.fewer(fraction),
            lab.row(f"{speed}: no scaling", alone),
            lab.row(f"{speed}: constant b", sostenuto.EBCache(table)),
            lab.row(f"{speed}: b(τ) of FEB", sostenuto.EBCache(table, eps_scale=curve)),
        ]
        for match in MATCHES:
            calibration = sostenuto.EpsilonScalingCalibration(caching=alone, real_latents=real, match=match)
            scales = lab.calibrated(f"scales-{speed}-{match}", calibration, sostenuto.NoiseScales, options.num_samples)
            factors[f"{speed}: by {match}"] = {"computed": scales.computed, "reused": scales.reused}
            entries.append(lab.row(f"{speed}: by {match}", alone | sostenuto.EpsilonScaling(scales)))
    compare(options, entries, pipe, factors=factors)


if __name__ == "__main__":
    main()
