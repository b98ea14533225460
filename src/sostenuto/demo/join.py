"""Results of one comparison that was sampled in parts, each with seeds of its own and perhaps on a machine of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sostenuto.errors import InputError
from sostenuto.measured import read_json, table_file

_MEANS = ("frechet_distance", "inception_score", "class_accuracy", "precision", "recall", "psnr", "speedup")
_ALIKE = ("n", "batch_size")
_NEEDED = {"rows", "seeds", "machine", *_ALIKE}


def read_results(path: Path) -> dict[str, Any]:
    """What ``sostenuto demo --json`` wrote.

    Raises:
        TableError: the file can't be read.
        InputError: it holds something else.
    """
    found = read_json(table_file(path, "comparison"), "comparison")
    missing = sorted(_NEEDED - found.keys()) if isinstance(found, dict) else ["rows"]
    if missing:
        raise InputError(f"{path} holds no results of sostenuto demo: it lacks {missing[0]!r}")
    return found


def joined(own: dict[str, Any], others: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One results file's content out of several with other seeds.

    Args:
        own: what :func:`~sostenuto.demo.run.run_entries` returned; seconds, the first seed and the machine stay its own.
        others: the same of other runs, as ``sostenuto demo --json`` wrote them.

    Returns:
        The rows with all metrics and speed-ups as the mean over all seeds, distances by seed in the order of ``seeds``, and in
        ``parts`` what each run measured by itself: its seeds, its machine and every row's speed-up.

    Raises:
        InputError: other rows, sizes or precision, or a seed that two of them have.
    """
    runs = sorted([own, *others], key=lambda run: min(run["seeds"]))
    seeds = [seed for run in runs for seed in run["seeds"]]
    if repeated := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
        raise InputError(f"seed {repeated[0]} is in two of the results: join runs with other seeds")
    _refuse_unlike(own, others)
    weights = [len(run["seeds"]) / len(seeds) for run in runs]

    def mean(values: Sequence[float | None]) -> float | None:
        known = [weight * value for weight, value in zip(weights, values, strict=True) if value is not None]
        return sum(known) if len(known) == len(values) else None

    rows = []
    for i, row in enumerate(own["rows"]):
        means = {name: mean([run["rows"][i][name] for run in runs]) for name in _MEANS}
        rows.append(
            row
            | means
            | {
                "macs": sum(run["rows"][i]["macs"] for run in runs),
                "efficiency": None if means["speedup"] is None else means["speedup"] / row["ideal_speedup"],
                "frechet_distance_per_seed": [d for run in runs for d in run["rows"][i]["frechet_distance_per_seed"]],
            }
        )
    parts = [part for run in runs for part in run.get("parts") or [_part(run)]]
    return own | {"rows": rows, "seeds": seeds, "parts": parts}


def _part(run: dict[str, Any]) -> dict[str, Any]:
    return {
        "seeds": run["seeds"],
        "machine": run["machine"],
        "speedups": {row["name"]: row["speedup"] for row in run["rows"]},
    }


def _refuse_unlike(own: dict[str, Any], others: Sequence[dict[str, Any]]) -> None:
    def what(run: dict[str, Any]) -> dict[str, Any]:
        alike = {name: run[name] for name in _ALIKE}
        return alike | {"dtype": run["machine"]["dtype"], "rows": [_sampled(row) for row in run["rows"]]}

    mine = what(own)
    for other in map(what, others):
        if odd := next((name for name, value in mine.items() if other[name] != value), None):
            raise InputError(f"results with another {odd} can't be joined: sample them with the same options")


def _sampled(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["name"], row["num_inference_steps"], row["solver"], row["plan"], row["eps_scale"]
