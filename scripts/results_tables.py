"""Writes the tables of measured results into the pages that show them, from the files that the commands wrote.

python scripts/results_tables.py           # rewrites what stands between the markers
python scripts/results_tables.py --check   # fails where a page says something else than the file
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from claims import CLAIMS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
PAGES = (ROOT / "README.md", RESULTS / "README.md", RESULTS / "papers.md")
_SURE = 1.96  # standard errors
_MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _cell(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def comparison(results: dict[str, Any]) -> str:
    """The demo's comparison, a line a row."""
    floor = f"{results['floor']:.3f}"
    lines = [
        f"| row | speed-up | by MACs | Fréchet distance (real {floor}) | class accuracy | precision | recall | "
        "PSNR to uncached |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        lines.append(
            f"| {row['name']} | {row['speedup']:.2f}× | {row['ideal_speedup']:.2f}× | {row['frechet_distance']:.3f} | "
            f"{row['class_accuracy']:.3f} | {row['precision']:.3f} | {row['recall']:.3f} | {_cell(row['psnr'], 1)} |"
        )
    return "\n".join(lines)


def efficiency(results: dict[str, Any]) -> str:
    """Measured over ideal speed-up, a line a row."""
    lines = ["| mode | row | speed-up (min … max) | by MACs | efficiency |", "|---|---|---|---|---|"]
    for row in results["rows"]:
        lines.append(
            f"| {row['mode']} | {row['name']} | {row['speedup']:.3f} ({row['speedup_min']:.3f} … {row['speedup_max']:.3f}) | "
            f"{row['ideal_speedup']:.3f} | {row['efficiency']:.2f} |"
        )
    return "\n".join(lines)


def quality(results: dict[str, Any]) -> str:
    """Quality on both axes with its uncertainty, a line a row, and what it was measured on."""
    floor = f"{results['floor']:.3f}"
    lines = [
        f"| row | by MACs | Fréchet distance (real {floor}) | against {results['rows'][0]['name']} | score | class accuracy | "
        "precision | recall | PSNR |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    base = results["rows"][0]["frechet_distance"]
    errors = results["difference_errors"]
    for index, row in enumerate(results["rows"]):
        error = errors[0][index] if errors and index else None
        difference = "–" if error is None else f"{row['frechet_distance'] - base:+.3f} ± {_SURE * error:.3f}"
        lines.append(
            f"| {row['name'].replace('|', '+')} | {row['ideal_speedup']:.2f}× | {row['frechet_distance']:.3f} | {difference} | "
            f"{row['inception_score']:.2f} | {row['class_accuracy']:.3f} | {row['precision']:.3f} | {row['recall']:.3f} | "
            f"{_cell(row['psnr'], 1)} |"
        )
    seeds, machine = results["seeds"], results["machine"]
    return "\n".join(
        [
            *lines,
            "",
            f"n = {results['n']}, {'seeds' if len(seeds) > 1 else 'seed'} {', '.join(map(str, seeds))}, {machine['dtype']}, "
            f"{machine['processor']}, torch {machine['torch']}; ± is 95 % by the delta method, over images of the same noise.",
        ]
    )


def reproduced(results: dict[str, Any]) -> str:
    """One of the papers' tables, and each of its claims beside what this model shows."""
    names = [row["name"] for row in results["rows"]]
    lines = [quality(results), "", "| the paper says | here | so |", "|---|---|---|"]
    for claim, better, worse in CLAIMS[results["table"]]:
        i, j = names.index(better), names.index(worse)
        one, other = results["rows"][i], results["rows"][j]
        difference = one["frechet_distance"] - other["frechet_distance"]
        noise = _SURE * results["difference_errors"][i][j]
        so = (
            "no difference beyond the noise"
            if abs(difference) <= noise
            else "true"
            if difference < 0
            else "the other way"
        )
        here = f"{one['frechet_distance']:.3f} against {other['frechet_distance']:.3f} (± {noise:.3f})"
        lines.append(f"| {claim} | {here} | {so} |")
    return "\n".join(lines)


def tuned(results: dict[str, Any]) -> str:
    """The tuned plans against all others: the whole table, and before it who is ahead at each speed."""
    targets: dict[str, list[dict[str, Any]]] = {}
    for row in results["rows"]:
        target, colon, _ = row["name"].partition("x: ")
        if colon:
            targets.setdefault(target, []).append(row)
    lines = [
        "| target | distance: tuned by score | best of the others | PSNR: tuned by nearness | best of the others |",
        "|---|---|---|---|---|",
    ]
    for target, rows in targets.items():
        own = {row["name"].partition("tuned by ")[2]: row for row in rows if "tuned by" in row["name"]}
        others = [row for row in rows if "tuned by" not in row["name"]]
        first = min(others, key=lambda row: row["frechet_distance"])
        nearest = max((row for row in others if row["psnr"] is not None), key=lambda row: row["psnr"])
        cells = (
            _marked(own["score"], first, "frechet_distance", 3),
            f"{_marked(first, own['score'], 'frechet_distance', 3)}, {_plain(first)}",
            _marked(own["nearness"], nearest, "psnr", 1),
            f"{_marked(nearest, own['nearness'], 'psnr', 1)}, {_plain(nearest)}",
        )
        lines.append(f"| {target}× | {' | '.join(cells)} |")
    return "\n".join([*lines, "", quality(results)])


def _marked(one: dict[str, Any], other: dict[str, Any], name: str, digits: int) -> str:
    """A number, in bold where it is the better one."""
    ahead = one[name] > other[name] if name == "psnr" else one[name] < other[name]
    return f"**{one[name]:.{digits}f}**" if ahead else f"{one[name]:.{digits}f}"


def _plain(row: dict[str, Any]) -> str:
    return f"{row['name'].partition('x: ')[2]} ({row['ideal_speedup']:.2f}×)"


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "demo-evidence.json": comparison,
    "efficiency.json": efficiency,
    **{f"papers-{name}.json": reproduced for name in CLAIMS},
    **{f"tune-{name}.json": tuned for name in ("ddpm50", "dpm20", "second-ddpm50", "second-dpm20")},
}


def filled(page: str) -> str:
    """A page with every marked table made from its file."""

    def fill(match: re.Match[str]) -> str:
        if not (RESULTS / match[2]).exists():
            return f"{match[1]}\nNot measured yet.\n\n{match[3]}"
        results = json.loads((RESULTS / match[2]).read_text(encoding="utf-8"))
        return f"{match[1]}\n{TABLES[match[2]](results)}\n\n{match[3]}"

    return _MARKED.sub(fill, page)


def main() -> None:
    """Rewrite or check the pages."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        if check and filled(page) != page:
            sys.exit(f"{path.relative_to(ROOT)} shows other numbers than its results: run scripts/results_tables.py")
        path.write_text(filled(page), encoding="utf-8")


if __name__ == "__main__":
    main()
