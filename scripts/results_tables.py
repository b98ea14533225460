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

from bench_tables import SUITES
from claims import CLAIMS
from quality_tables import at_speeds, frontier, quality, reproduced, smoothness, tuned
from reliability_tables import reliability

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
PAGES = (
    ROOT / "README.md",
    ROOT / "docs" / "choosing.md",
    ROOT / "docs" / "peers.md",
    *(RESULTS / name for name in ("README.md", "methods.md", "reliability.md", "papers.md")),
)
_MARKED = re.compile(r"(<!-- table: (\S+(?: \w+)?) -->\n).*?(<!-- end -->)", re.DOTALL)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "demo-10k.json": quality,
    "demo-10k.json frontier": frontier,
    "methods.json": quality,
    "methods.json speeds": at_speeds,
    "smoothness.json": smoothness,
    **SUITES,
    "reliability.json": reliability,
    **{f"papers-{name}.json": reproduced for name in CLAIMS},
    "papers-ab-bfloat16.json": reproduced,
    "exposure-bias.json": quality,
    "clean-sample.json": quality,
    "tune-ddpm50-more.json": quality,
    **{f"tune-{name}.json": tuned for name in ("ddpm50", "dpm20", "second-ddpm50", "second-dpm20")},
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
