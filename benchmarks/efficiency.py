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


def seconds(pipe, batch: int) -> float:
    """Time of one generation."""
    labels = [i % 10 for i in range(batch)]
    began = time.perf_counter()
    pipe(labels, 50, generator=torch.Generator().manual_seed(0), output_type="latent")
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled"], choices=["eager", "compiled"])
    parser.add_argument("--only", nargs="*", help="names of the rows to run")
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
    for mode in options.modes:
        for name, method in methods.items():
            if options.only and name not in options.only:
                continue
            torch._dynamo.reset()  # each method has its own graphs, and dynamo keeps eight
            plain, cached = load_demo_pipeline(), load_demo_pipeline()
            if mode == "compiled":
                plain.transformer.compile(fullgraph=True)
                cached.transformer.compile(fullgraph=True)
            ratios, times = [], []
            with sostenuto.enable(cached, method) as handle:
                seconds(plain, options.batch_size), seconds(cached, options.batch_size)  # warm-up; compiles every mode
                ideal = handle.stats.ideal_speedup
                for _ in tqdm(range(options.pairs), desc=f"{mode} {name}"):
                    uncached = seconds(plain, options.batch_size)
                    times.append(seconds(cached, options.batch_size))
                    ratios.append(uncached / times[-1])
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
