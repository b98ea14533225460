"""Measured over ideal speed-up of the demo's 1.5x table, eager and compiled, pair by pair against the uncached model.

    python benchmarks/efficiency.py --json efficiency.json

Both sides run the same way (eager against eager, compiled against compiled), in turn (A B A B …) in one process.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

import sostenuto
from sostenuto.demo.compare import SHIPPED, machine
from sostenuto.demo.pipeline import load_demo_pipeline
from sostenuto.methods import FORA, EBCache, NoCache


def seconds(pipe, method, batch: int, steps: int) -> tuple[float, float]:
    """Time of one generation, and its ideal speed-up."""
    labels = [i % 10 for i in range(batch)]
    if method is None:
        began = time.perf_counter()
        pipe(labels, steps, generator=torch.Generator().manual_seed(0), output_type="latent")
        return time.perf_counter() - began, 1.0
    with sostenuto.enable(pipe, method) as handle:
        began = time.perf_counter()
        pipe(labels, steps, generator=torch.Generator().manual_seed(0), output_type="latent")
        elapsed = time.perf_counter() - began
        return elapsed, handle.stats.ideal_speedup


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--skip-compiled", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    methods = {
        "all computed": NoCache(),
        "EB-Cache 1.5x": EBCache(SHIPPED / "demo-ddpm50-1.5x.json"),
        "EB-Cache 2.5x": EBCache(SHIPPED / "demo-ddpm50-2.5x.json"),
        "FORA N=2": FORA(2),
    }
    rows = []
    for mode in ("eager",) if options.skip_compiled else ("eager", "compiled"):
        pipe = load_demo_pipeline()
        if mode == "compiled":
            torch._dynamo.reset()
            pipe.transformer.compile(fullgraph=True)
        for method in (None, *methods.values()):  # warm-up; compiles every mode
            seconds(pipe, method, options.batch_size, 50)
        for name, method in methods.items():
            ratios, times, ideal = [], [], 1.0
            for _ in tqdm(range(options.pairs), desc=f"{mode} {name}"):
                plain, _ = seconds(pipe, None, options.batch_size, 50)
                cached, ideal = seconds(pipe, method, options.batch_size, 50)
                ratios.append(plain / cached)
                times.append(cached)
            row = {
                "mode": mode,
                "name": name,
                "wall_s": median(times),
                "speedup": median(ratios),
                "speedup_min": min(ratios),
                "speedup_max": max(ratios),
                "ideal_speedup": ideal,
                "efficiency": median(ratios) / ideal,
            }
            rows.append(row)
            print(
                f"{mode:9} {name:14} {row['wall_s']:7.3f} s  speed-up {row['speedup']:.3f} "
                f"({row['speedup_min']:.3f} … {row['speedup_max']:.3f})  ideal {ideal:.3f}  efficiency {row['efficiency']:.3f}"
            )
    if options.json:
        content = {"rows": rows, "batch_size": options.batch_size, "pairs": options.pairs, "machine": machine()}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
