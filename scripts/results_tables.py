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

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
PAGES = (ROOT / "README.md", RESULTS / "README.md", RESULTS / "reliability.md")
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


_DONE = {
    "sampling": ("random sequences", "{steps} states, {denoiser calls compared} calls of the denoiser compared"),
    "compiled": ("the same, compiled", "{steps} states, {denoiser calls compared} calls compared"),
    "inputs": ("hostile inputs", "{inputs} inputs"),
    "kills": ("processes killed", "{kills} kills in {runs} runs"),
    "interrupts": ("generations interrupted", "{interrupts} interrupts"),
    "full disks": ("disks that fill up", "{full_disks} full disks"),
    "memory": ("memory", "{generations} generations of each kind of method"),
}


def reliability(results: dict[str, Any]) -> str:
    """What was done in each part, and found; the sums last."""
    lines = ["| part | what was done | differences and losses |", "|---|---|---|"]
    for name, (title, done) in _DONE.items():
        if name in results["parts"]:
            part = results["parts"][name]
            found = sum(part.get(kind, 0) for kind in ("differences", "lost", "faults"))
            lines.append(f"| {title} | {done.format_map(part)} | {found} |")
    total = results["summary"]
    lines += [
        f"| states explored | {total['states_explored']} | |",
        f"| inputs fuzzed | {total['inputs_fuzzed']} | |",
        f"| faults injected (kills, interrupts, exceptions, full disks) | {total['faults_injected']} | |",
        f"| **differences and losses found** | | **{total['differences_and_losses']}** |",
    ]
    return "\n".join(lines)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "demo-evidence.json": comparison,
    "efficiency.json": efficiency,
    "reliability.json": reliability,
}


def filled(page: str) -> str:
    """A page with every marked table made from its file."""

    def fill(match: re.Match[str]) -> str:
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
