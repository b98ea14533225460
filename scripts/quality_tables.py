"""Tables of quality: the demo's comparison, the papers' tables, the tuned plans against all others."""

from __future__ import annotations

import math
from statistics import stdev
from typing import Any

from claims import CLAIMS, EQUAL

_SURE = 1.96  # standard errors
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # the same of Student's t, for 2, 3 … seeds
_UNKNOWN = "not known: one seed, and too few images for an interval"
_LIKE = 0.05  # a difference in cost that is none


def cell(value: float | None, digits: int) -> str:
    """A number, or a dash."""
    return "–" if value is None else f"{value:.{digits}f}"


def frontier(results: dict[str, Any]) -> str:
    """Speed and quality alone, fastest last."""
    lines = [
        f"| row | measured speed-up | Fréchet distance (real {results['floor']:.2f}) | recall | PSNR to uncached |",
        "|---|---|---|---|---|",
    ]
    for row in sorted(results["rows"], key=lambda row: row["speedup"]):
        lines.append(
            f"| {row['name']} | {row['speedup']:.2f}× | {row['frechet_distance']:.2f} | {row['recall']:.2f} | "
            f"{cell(row['psnr'], 1)} |"
        )
    return "\n".join(lines)


def at_speeds(results: dict[str, Any]) -> str:
    """What is at hand at each speed, the lowest distance first, beside fewer steps of that speed."""
    lines = [
        f"| at | row | measured | by MACs | Fréchet distance (real {results['floor']:.2f}) | against fewer steps | "
        "PSNR to uncached |",
        "|---|---|---|---|---|---|---|",
    ]
    rows, targets = results["rows"], _targets(results)
    for target in sorted(targets, key=lambda target: target == "at most"):  # what gets to none of them comes last
        fewer = next((index for index in targets[target] if rows[index]["name"].endswith(" steps")), None)
        for index in sorted(targets[target], key=lambda index: rows[index]["frechet_distance"]):
            row = rows[index]
            name = row["name"].partition(": ")[2].replace(" | ", " + ")
            against = "–" if fewer in (None, index) else _against(results, index, fewer, 3)
            lines.append(
                f"| {target} | {name} | {row['speedup']:.2f}× | {row['ideal_speedup']:.2f}× | {row['frechet_distance']:.3f} | "
                f"{against} | {cell(row['psnr'], 1)} |"
            )
    uncached = rows[0]["frechet_distance"]
    return "\n".join(
        [
            *lines,
            "",
            f"The uncached sampler: {uncached:.2f}. n = {results['n']}, {_seeds(results['seeds'])}; ± is 95 %.",
        ]
    )


def _targets(results: dict[str, Any]) -> dict[str, list[int]]:
    """The positions of the rows by the speed-up that they are for."""
    found: dict[str, list[int]] = {}
    for index, row in enumerate(results["rows"]):
        target, colon, _ = row["name"].partition(": ")
        if colon:
            found.setdefault(target.replace("x", "×"), []).append(index)
    return found


def smoothness(results: dict[str, Any]) -> str:
    """The differences of a network's features over the steps, and what moves meanwhile."""
    lines = [
        "| step | what goes on | first | second | third | second : first | third : second |",
        "|---|---|---|---|---|---|---|",
    ]
    words = {"both": "both, as when sampling", "timestep": "the timestep alone", "latents": "the latents alone"}
    for row in results["rows"]:
        first, second, third = row["differences"]
        lines.append(
            f"| {row['step']} | {words[row['moves']]} | {first:.4f} | {second:.4f} | {third:.4f} | {second / first:.2f} | "
            f"{third / second:.2f} |"
        )
    machine = results["machine"]
    facts = f"{results['n']} samples, {_seeds([results['seed']])}, {results['steps']} steps of {results['solver']}"
    made = f"{machine['dtype']}, {machine['processor']}, torch {machine['torch']}"
    return "\n".join([*lines, "", f"{facts}, {made}."])


def quality(results: dict[str, Any]) -> str:
    """Quality on both axes with its uncertainty, a line a row, what it was measured on, and what is not in it."""
    floor = f"{results['floor']:.3f}"
    lines = [
        f"| row | speed-up | by MACs | Fréchet distance (real {floor}) | against {results['rows'][0]['name']} | score | "
        "class accuracy | precision | recall | PSNR |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for index, row in enumerate(results["rows"]):
        difference = _against(results, index, 0, 3) if index else "–"
        lines.append(
            f"| {row['name'].replace('|', '+')} | {_times(row['speedup'])} | {row['ideal_speedup']:.2f}× | "
            f"{row['frechet_distance']:.3f} | {difference} | {row['inception_score']:.2f} | {row['class_accuracy']:.3f} | "
            f"{row['precision']:.3f} | {row['recall']:.3f} | {cell(row['psnr'], 1)} |"
        )
    seeds, machine = results["seeds"], results["machine"]
    way = "Student's t, over the seeds" if len(seeds) > 1 else "the delta method, over images of the same noise"
    n = f"{len(seeds)} × {results['n']} judged together" if results.get("pooled") else results["n"]
    lines += [
        "",
        f"n = {n}, {_seeds(seeds)}, {machine['dtype']}, {_processors(results)}, torch {machine['torch']}; "
        f"± is 95 % by {way}.",
    ]
    if results.get("absent"):
        lines += ["", "Not in the table:", "", *(f"- {words}" for words in results["absent"])]
    return "\n".join(lines)


def _times(speedup: float | None) -> str:
    return "–" if speedup is None else f"{speedup:.2f}×"


def _seeds(seeds: list[int]) -> str:
    return f"{'seeds' if len(seeds) > 1 else 'seed'} {', '.join(map(str, seeds))}"


def _processors(results: dict[str, Any]) -> str:
    """What it was measured on: one machine, or of a comparison joined from several which seeds ran on which."""
    if not (parts := results.get("parts")):
        return results["machine"]["processor"]
    return " and ".join(f"{part['machine']['processor']} ({_seeds(part['seeds'])})" for part in parts)


def _against(results: dict[str, Any], i: int, j: int, digits: int) -> str:
    """The difference of two rows' distances with its interval, where that is known."""
    error = interval(results, i, j)
    return "–" if error is None else f"{_difference(results, i, j):+.{digits}f} ± {error:.{digits}f}"


def _difference(results: dict[str, Any], i: int, j: int) -> float:
    return results["rows"][i]["frechet_distance"] - results["rows"][j]["frechet_distance"]


def interval(results: dict[str, Any], i: int, j: int) -> float | None:
    """Half of the 95 % confidence interval of the difference of two rows' distances: over seeds, where there are several.

    ``None`` with one seed and too few images for the delta method.
    """
    pairs = zip(*(results["rows"][k]["frechet_distance_per_seed"] for k in (i, j)), strict=True)
    differences = [one - other for one, other in pairs]
    if len(differences) > 1:
        return _T[min(len(differences), len(_T) + 1) - 2] * stdev(differences) / math.sqrt(len(differences))
    errors = results["difference_errors"]
    return None if errors is None else _SURE * errors[i][j]


def verdict(results: dict[str, Any], better: int, worse: int) -> str:
    """What came of the claim that one row has a lower distance than the other: beyond the noise, and at which cost."""
    difference, noise = _difference(results, better, worse), interval(results, better, worse)
    if noise is None:
        return _UNKNOWN
    if abs(difference) <= noise:
        return "no difference beyond the noise"
    winner, loser = (better, worse) if difference < 0 else (worse, better)
    extra = work(results, winner) / work(results, loser) - 1
    at = f", at {extra:.0%} more work" if extra > _LIKE else ""
    return ("true" if difference < 0 else "the other way") + at


def alike(results: dict[str, Any], one: int, other: int) -> str:
    """What came of the claim that two rows have the same distance."""
    noise = interval(results, one, other)
    if noise is None:
        return _UNKNOWN
    if abs(_difference(results, one, other)) <= noise:
        return "true: no difference beyond the noise"
    return f"no: {'the first' if _difference(results, one, other) < 0 else 'the second'} is better"


def work(results: dict[str, Any], index: int) -> float:
    """What a row costs, of the uncached one, in the unit in which rows are compared."""
    row = results["rows"][index]
    return 1 / row["speedup" if results.get("cost") == "time" else "ideal_speedup"]


def reproduced(results: dict[str, Any]) -> str:
    """One of the papers' tables, and each of its claims beside what this model shows."""
    names = [row["name"] for row in results["rows"]]
    lines = [quality(results), "", "| the paper says | here | so |", "|---|---|---|"]
    for words, better, worse in CLAIMS[results["table"]]:
        claim, judge = words.removeprefix(EQUAL), alike if words.startswith(EQUAL) else verdict
        if not {better, worse} <= set(names):  # of results from before a row was renamed
            lines.append(f"| {claim} | – | not measured |")
            continue
        i, j = names.index(better), names.index(worse)
        one, other = (results["rows"][k]["frechet_distance"] for k in (i, j))
        noise = interval(results, i, j)
        here = f"{one:.3f} against {other:.3f} (± {cell(noise, 3)})"
        lines.append(f"| {claim} | {here} | {judge(results, i, j)} |")
    return "\n".join(lines)


def tuned(results: dict[str, Any]) -> str:
    """The tuned plans against all others: the whole table, and before it who is ahead at each speed."""
    lines = [
        "| target | distance: tuned by score | best of the others | tuned is better | PSNR: tuned by nearness | "
        "best of the others |",
        "|---|---|---|---|---|---|",
    ]
    for target, rows in _targets(results).items():
        own = {_short(results, index): index for index in rows if "tuned by" in _short(results, index)}
        others = [index for index in rows if index not in own.values()]
        score, nearness = own["tuned by score"], own["tuned by nearness"]
        distance = {index: results["rows"][index]["frechet_distance"] for index in rows}
        psnr = {index: results["rows"][index]["psnr"] for index in rows}
        first = min(_like(results, others, score), key=distance.__getitem__)
        near = [index for index in _like(results, others, nearness) if psnr[index] is not None]
        nearest = max(near, key=psnr.__getitem__, default=None)
        cells = (
            f"{distance[score]:.3f} ({_speed(results, score)})",
            f"{distance[first]:.3f}, {_plain(results, first)}",
            verdict(results, score, first),
            f"{psnr[nearness]:.1f} ({_speed(results, nearness)})",
            "–" if nearest is None else f"{psnr[nearest]:.1f}, {_plain(results, nearest)}",
        )
        lines.append(f"| {target} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", quality(results)])


def _like(results: dict[str, Any], others: list[int], own: int) -> list[int]:
    """The rows that cost no more than this one, a little aside; all, where there is none."""
    bar = work(results, own) * (1 + _LIKE)
    return [index for index in others if work(results, index) <= bar] or others


def _short(results: dict[str, Any], index: int) -> str:
    return results["rows"][index]["name"].partition("x: ")[2]


def _speed(results: dict[str, Any], index: int) -> str:
    return f"{1 / work(results, index):.2f}×"


def _plain(results: dict[str, Any], index: int) -> str:
    return f"{_short(results, index)} ({_speed(results, index)})"
