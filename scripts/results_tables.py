"""Writes the tables of measured results into the pages that show them, from the files that the commands wrote.

python scripts/results_tables.py           # rewrites what stands between the markers
python scripts/results_tables.py --check   # fails where a page says something else than the file

A page marks the place with ``<!-- table: FILE -->`` or ``<!-- table: FILE FORM -->`` and ``<!-- end -->``. Where the file
isn't there yet, the place is left as it is.
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
PAGES = (ROOT / "README.md", RESULTS / "README.md", ROOT / "docs" / "choosing.md", ROOT / "docs" / "peers.md")
_MARKED = re.compile(r"(<!-- table: (\S+(?: \w+)?) -->\n).*?(<!-- end -->)", re.DOTALL)


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


def frontier(results: dict[str, Any]) -> str:
    """Speed and quality alone, fastest last."""
    lines = [
        f"| row | measured speed-up | Fréchet distance (real {results['floor']:.2f}) | recall | PSNR to uncached |",
        "|---|---|---|---|---|",
    ]
    for row in sorted(results["rows"], key=lambda row: row["speedup"]):
        lines.append(
            f"| {row['name']} | {row['speedup']:.2f}× | {row['frechet_distance']:.2f} | {row['recall']:.2f} | "
            f"{_cell(row['psnr'], 1)} |"
        )
    return "\n".join(lines)


_LIBRARIES = {
    "diffusers-first-block-cache": "diffusers FirstBlockCache",
    "diffusers-magcache": "diffusers MagCache",
    "diffusers-taylorseer": "diffusers TaylorSeer",
    "diffusers-pab": "diffusers PAB",
    "diffusers-fastercache": "diffusers FasterCache, attention alone",
    "diffusers-seacache": "diffusers SeaCache",
    "cache-dit": "cache-dit",
    "cache-dit-taylorseer": "cache-dit, TaylorSeer",
    "dit-smoothcache": "dit-smoothcache",
    "para-attn": "ParaAttention",
}


def support(results: dict[str, Any]) -> str:
    """On how many networks each library's cache reproduces the output for identical inputs."""
    lines = [
        "| | version | right | another output | fails in its first calls | refused | skips nothing |",
        "|---|---|---|---|---|---|---|",
    ]
    for setting, version in results["versions"].items():
        name, _, options = setting.partition(":")
        told = [network[setting]["result"] for network in results["networks"].values()]
        which = _LIBRARIES[name] + (", told its modules" if "modules=" in options else "")
        counts = " | ".join(
            str(told.count(result)) for result in ("works", "wrong", "fails", "refused", "skips nothing")
        )
        lines.append(f"| {which} | {version} | {counts} |")
    return "\n".join(lines)


def peers(results: dict[str, Any]) -> str:
    """Methods and other libraries on the same models, a line a row; those without a measurement last."""
    lines = [
        "| row | library | speed-up (min … max) | by MACs | Fréchet distance | PSNR | state |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(results["rows"], key=lambda row: row.get("error") is not None):
        library = row.get("peer") or "sostenuto"
        if row.get("error") is not None:
            lines.append(f"| {row['name']} | {library} | not measured: {row['error']} | | | | |")
            continue
        state = row.get("cache_bytes_peak")
        spread = f" ({row['speedup_min']:.2f} … {row['speedup_max']:.2f})" if row.get("speedup_min") else ""
        speed = "–" if row.get("speedup") is None else f"{row['speedup']:.2f}×{spread}"
        lines.append(
            f"| {row['name']} | {library} | {speed} | {_cell(row.get('ideal_speedup'), 2)} | "
            f"{_cell(row.get('frechet_distance'), 3)} | {_cell(row.get('psnr'), 1)} | "
            f"{'–' if state is None else f'{state / 2**20:.2f} MiB'} |"
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


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "demo-evidence.json": comparison,
    "demo-evidence.json frontier": frontier,
    "methods.json frontier": frontier,
    "efficiency.json": efficiency,
    "peer-support.json": support,
    "peers.json": peers,
}


def filled(page: str) -> str:
    """A page with every marked table made from its file."""

    def fill(match: re.Match[str]) -> str:
        path = RESULTS / match[2].split()[0]
        if not path.is_file():
            return match[0]
        results = json.loads(path.read_text(encoding="utf-8"))
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
