"""Exposure bias repaired: the demo's two tables with a calibrated noise scale, a constant one, FEB-Cache's curve, and none.

    python benchmarks/exposure_bias.py --num-images 1000 --output runs/exposure-bias --json docs/results/exposure-bias.json

The tables are the shipped ones for 1.5× and 2.5×, each with: no scaling; the constant b that was searched for it by the
Fréchet distance; FEB-Cache's b(τ) with the published values; the factors of `sostenuto.EpsilonScalingCalibration`, by
variance and by norm, measured on training images without looking at a single generated one. Every row has the same noise and
labels. What an interrupted run has done is kept in the output folder.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import sostenuto
from sostenuto.clock import normalized_times
from sostenuto.demo import data
from sostenuto.demo.compare import NUM_STEPS, SHIPPED, Entry, Settings, labels_of, run_entries
from sostenuto.demo.pipeline import load_demo_pipeline
from sostenuto.demo.show import terminal_table
from sostenuto.methods.feb import noise_scale_curve
from sostenuto.table import CacheTable

SPEEDS = ("1.5x", "2.5x")
MATCHES = ("variance", "norm")


def training_images(num_images: int, folder: Path | None) -> torch.Tensor:
    """As many images of the training set as rows, of the labels 0 … 9 over and over: ``[n, 1, 28, 28]``."""
    return data.of_labels("train", labels_of(num_images).tolist(), folder)


def calibrated(
    pipe: Any, table: CacheTable, match: str, options: argparse.Namespace, path: Path
) -> sostenuto.NoiseScales:
    """The factors for one table, measured once and kept."""
    if not path.exists():

        def sample(pipe: Any, generator: torch.Generator, num_inference_steps: int) -> Any:
            labels = labels_of(20).tolist()
            return pipe(labels, num_inference_steps, generator=generator, output_type="latent").images

        with torch.autocast("cpu", torch.bfloat16, enabled=options.dtype == "bfloat16"):
            sostenuto.calibrate(
                pipe,
                sostenuto.EpsilonScalingCalibration(
                    caching=sostenuto.EBCache(table, eps_scale=1.0),
                    real_latents=training_images(options.num_samples, options.data),
                    match=match,
                ),
                sample,
                num_inference_steps=NUM_STEPS,
                num_samples=options.num_samples,
                show_progress=True,
            ).save(path)
    return sostenuto.NoiseScales.load(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-images", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--num-samples", type=int, default=40, help="training images to calibrate on")
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST's IDX files")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("runs/exposure-bias"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)

    pipe = load_demo_pipeline()
    entries = [Entry("uncached", sostenuto.NoCache())]
    factors: dict[str, Any] = {}
    for speed in SPEEDS:
        table = CacheTable.load(SHIPPED / f"demo-ddpm50-{speed}.json")
        alone = sostenuto.EBCache(table, eps_scale=1.0)
        curve = noise_scale_curve(normalized_times(NUM_STEPS))
        entries += [
            Entry(f"{speed}: no scaling", alone),
            Entry(f"{speed}: constant b", sostenuto.EBCache(table)),
            Entry(f"{speed}: b(τ) of FEB", sostenuto.EBCache(table, eps_scale=tuple(curve))),
        ]
        for match in MATCHES:
            path = options.output / f"scales-{speed}-{match}.json"
            scales = calibrated(pipe, table, match, options, path)
            factors[f"{speed}: by {match}"] = {"computed": scales.computed, "reused": scales.reused}
            entries.append(Entry(f"{speed}: by {match}", alone | sostenuto.EpsilonScaling(scales)))

    settings = Settings(options.num_images, options.batch_size, tuple(options.seeds), 0, dtype=options.dtype)
    results = run_entries(options.output, entries, settings)
    for row in results["rows"]:
        row.pop("plan")
        row.pop("eps_scale")
    results["factors"] = factors
    print(terminal_table(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
