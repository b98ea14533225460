"""The long run behind docs/results/reliability.md: what users do at random, hostile files, injected faults, memory.

    python benchmarks/reliability.py --json docs/results/reliability.json

Prints and writes what was explored and what was found; exits with 1 where any of the counts of faults is not zero. It can be
run in parts (``--parts``), each of which replaces its own numbers in the file.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import diffusers
import torch
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import get_state_machine_test
from tqdm import tqdm

import sostenuto
from sostenuto import EBCache
from sostenuto.demo.compare import SHIPPED
from sostenuto.demo.pipeline import load_demo_pipeline

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import fault_injection
import fuzzing
import memory_checks
import sampling_machine

_PHASES = [Phase.generate]  # a failure is shown by its seed; making it small takes long


def sampling(options: argparse.Namespace, machine: type, steps: int, note: str) -> dict[str, Any]:
    """The model-based test until so many steps were made."""
    counts, differences, chunk = sampling_machine.COUNTS, [], 0
    counts.clear()
    run = settings(
        max_examples=4,
        stateful_step_count=30,
        deadline=None,
        database=None,
        phases=_PHASES,
        suppress_health_check=list(HealthCheck),
    )
    with tqdm(total=steps, unit="step", desc=note, mininterval=10) as bar:
        while counts["steps"] < steps:
            test = get_state_machine_test(machine, settings=run)
            differences += _failures(seed(options.seed + chunk)(test), f"{note}, seed {options.seed + chunk}")
            chunk += 1
            bar.update(min(counts["steps"], steps) - bar.n)
    return {"seed": options.seed, "runs": chunk, **dict(sorted(counts.items())), "differences": len(differences)}


def inputs(options: argparse.Namespace) -> dict[str, Any]:
    """Hostile files, parameters and command lines, shared out over what reads them."""
    faults: list[str] = []
    fuzzing.COUNTS.clear()
    with tqdm(total=options.inputs, unit="input", desc="inputs", mininterval=10) as bar:
        chunk = 0
        while fuzzing.COUNTS.total() < options.inputs:
            for name, (target, share) in fuzzing.TARGETS.items():
                run = settings(
                    max_examples=int(2_000 * share),
                    deadline=None,
                    database=None,
                    phases=[Phase.explicit, *_PHASES],
                    suppress_health_check=list(HealthCheck),
                )
                test = run(seed(options.seed + chunk)(target()))
                faults += _failures(test, f"{name}, seed {options.seed + chunk}")
                bar.update(min(fuzzing.COUNTS.total(), options.inputs) - bar.n)
            chunk += 1
    return {
        "seed": options.seed,
        "inputs": fuzzing.COUNTS.total(),
        "by_reader": dict(sorted(fuzzing.COUNTS.items())),
        "accepted": dict(sorted(fuzzing.ACCEPTED.items())),
        "faults": len(faults),
    }


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """Objects, tensors and bytes over many generations, and the peak of kept features against the statistics."""
    grown = memory_checks.growth(options.generations)
    peaks = memory_checks.peaks()
    faults = [name for name, row in grown.items() if row["tensors_grown"] or row["objects_grown"] > 50]
    faults += [name for name, row in peaks.items() if abs(row["ratio"] - 1) > 0.05]
    return {"generations": options.generations, "growth": grown, "peaks": peaks, "faults": len(faults)}


def finite(options: argparse.Namespace) -> dict[str, Any]:
    """What ``check_finite`` costs on the demo model: processor time with it over without, in turn, a table in use."""
    pipe, times = load_demo_pipeline(), {False: [], True: []}
    for turn in range(2 * options.pairs + 2):
        check = turn % 2 == 1
        with sostenuto.enable(pipe, EBCache(SHIPPED / "demo-ddpm50-1.5x.json"), check_finite=check):
            began = time.process_time()
            pipe(list(range(8)), 50, generator=torch.Generator().manual_seed(0), output_type="latent")
            times[check].append(time.process_time() - began)
    ratios = [b / a for a, b in zip(times[False][1:], times[True][1:], strict=True)]  # the first of each is a warm-up
    return {"pairs": options.pairs, "ratio": median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}


# What was done to the runs, by part: not what they refused by themselves.
_INJECTED = ("generations interrupted", "exceptions inside a block", "kills", "interrupts", "full_disks")


_FOUND = ("differences", "lost", "faults")


def summary(parts: dict[str, dict[str, Any]]) -> dict[str, int]:
    """The counts in short; the last one must be zero."""
    sampled = [parts[name] for name in ("sampling", "compiled") if name in parts]
    return {
        "states_explored": sum(part["steps"] for part in sampled),
        "denoiser_calls_compared": sum(part["denoiser calls compared"] for part in sampled),
        "inputs_fuzzed": parts.get("inputs", {}).get("inputs", 0),
        "faults_injected": sum(part.get(name, 0) for part in parts.values() for name in _INJECTED),
        "differences_and_losses": sum(part.get(name, 0) for part in parts.values() for name in _FOUND),
    }


def _failures(run: Callable[[], None], name: str) -> list[str]:
    try:
        run()
    except Exception:
        traceback.print_exc()
        print(f"FAULT in {name}", file=sys.stderr)
        return [name]
    return []


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "sampling": lambda options: sampling(options, sampling_machine.SamplingMachine, options.steps, "sampling"),
    "compiled": lambda options: sampling(
        options, sampling_machine.CompilingMachine, options.compiled_steps, "sampling, compiled"
    ),
    "inputs": inputs,
    "kills": lambda options: fault_injection.kills(options.kills, options.seed),
    "interrupts": lambda options: fault_injection.interrupts(options.interrupts, options.seed),
    "full disks": lambda options: fault_injection.full_disks(options.disks, options.seed),
    "memory": memory,
    "finite": finite,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--steps", type=int, default=10_000, help="of the model-based test")
    parser.add_argument(
        "--compiled-steps", type=int, default=2_000, help="of the same with compilation among its rules"
    )
    parser.add_argument("--inputs", type=int, default=100_000, help="hostile files, parameters and command lines")
    parser.add_argument("--kills", type=int, default=100, help="of processes that make images")
    parser.add_argument("--interrupts", type=int, default=300, help="of generations, at random moments")
    parser.add_argument("--disks", type=int, default=40, help="that fill up (needs the right to mount one)")
    parser.add_argument("--generations", type=int, default=1_000, help="for growth of memory, of each method")
    parser.add_argument("--pairs", type=int, default=9, help="generations with and without check_finite")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)

    known = json.loads(options.json.read_text()) if options.json and options.json.exists() else {"parts": {}}
    for name in options.parts:
        began = time.time()
        known["parts"][name] = PARTS[name](options) | {
            "seconds": round(time.time() - began),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        }
        known["summary"] = summary(known["parts"])
        print(json.dumps({name: known["parts"][name]}, indent=1))
        if options.json:
            options.json.write_text(json.dumps(known, indent=1) + "\n")
    for name, count in known["summary"].items():
        print(f"{name.replace('_', ' ')}: {count}")
    return int(known["summary"]["differences_and_losses"] > 0)


if __name__ == "__main__":
    sys.exit(main())
