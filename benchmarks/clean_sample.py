"""Forecasts of the clean sample under DDPM on the demo model, beside fewer steps, the paper's AB-Cache and another solver.

    python benchmarks/clean_sample.py --num-images 1000 --seeds 0 1 2 --json docs/results/clean-sample.json

Every N-th step is computed after the first two; no calibration and no search. b = 0.985 is the demo's own noise scale, not one
that was searched for these rows. What an interrupted run has done is kept, and ``--shard`` shares it among processes.
"""

from __future__ import annotations

import torch
from lab import Lab, arguments, compare

from sostenuto import ABCache, EpsilonScaling, NoCache
from sostenuto.demo.pipeline import load_demo_pipeline
from sostenuto.demo.rows import Entry

SOLVER = "dpm-solver++"


def sampled(interval: int, order: int = 2) -> ABCache:
    """AB-Cache of the clean sample."""
    return ABCache(order, warmup=2, interval=interval, extrapolates="sample")


def rows(lab: Lab) -> list[Entry]:
    """What is compared; the first is the uncached sampler."""
    b = EpsilonScaling(1 / 0.985)
    return [
        lab.uncached(),
        *(lab.fewer(steps / 50) for steps in (25, 17, 12, 8)),
        *(lab.row(f"clean sample, N={interval}", sampled(interval)) for interval in (2, 3, 4, 5, 6, 8, 10)),
        lab.row("clean sample held, N=5", sampled(5, order=1)),
        *(lab.row(f"clean sample, N={interval}, b = 0.985", sampled(interval) | b) for interval in (3, 5, 8)),
        lab.row("prediction linear, N=2", ABCache(2, warmup=2, interval=2)),
        *(Entry(f"DPM-Solver++ {steps}", NoCache(), steps, SOLVER, reference=None) for steps in (20, 12, 8)),
        Entry("DPM-Solver++ 20, clean sample, N=2", sampled(2), 20, SOLVER, reference="DPM-Solver++ 20"),
    ]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=50, help="of DDPM; fewer steps are shares of them")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipe = load_demo_pipeline()
    compare(options, rows(Lab(pipe, options.output, num_inference_steps=options.steps, dtype=options.dtype)), pipe)


if __name__ == "__main__":
    main()
