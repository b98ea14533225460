"""Writes the tables of measured results into the pages that show them, from the files that the commands wrote.

python scripts/results_tables.py           # rewrites what stands between the markers
python scripts/results_tables.py --check   # fails where a page says something else than the file
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
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


Show = Callable[[dict[str, Any]], str]


def _number(name: str, text: str, scale: float = 1.0) -> Show:
    """A column's value, or a dash."""
    return lambda row: "–" if row.get(name) is None else text.format(row[name] * scale)


def _range(name: str, digits: int) -> Show:
    ends = [_number(name + end, f"{{:.{digits}f}}") for end in ("", "_min", "_max")]
    return lambda row: "–" if row.get(name) is None else "{} ({} … {})".format(*(end(row) for end in ends))


def _graphs(row: dict[str, Any]) -> str:
    if row.get("graphs") is None:
        return "–"
    return f"{row['graphs']} / {row['graph_breaks']} / {row['recompiles']}"


def _step(seconds: str, macs: str, which: Callable[[Sequence[int]], int]) -> Show:
    """Milliseconds of the steps with the most or the fewest multiply-accumulates."""

    def show(row: dict[str, Any]) -> str:
        chosen = [s for s, n in zip(row[seconds], row[macs], strict=True) if n == which(row[macs])]
        return f"{median(chosen) * 1e3:.1f}"

    return show


def _per_row(name: str) -> Show:
    """10¹² multiply-accumulates of one row of the batch, as papers print them: one image, one half of the guidance."""
    return lambda row: f"{row[name] / row['batch_size'] / 1e12:.2f}"


def _printed(name: str, scale: float = 1.0) -> Show:
    return lambda row: "–" if name not in row["printed"] else f"{row['printed'][name] * scale:.2f}"


_NAME: dict[str, Show] = {"row": lambda row: row["name"]}
_SPEED: dict[str, Show] = {
    "speed-up (min … max)": _range("speedup", 3),
    "by MACs": _number("ideal_speedup", "{:.3f}"),
    "efficiency": _number("efficiency", "{:.3f}"),
}
_STEPS: dict[str, Show] = {
    "computed step": _number("computed_step_overhead", "{:+.2f} %", 100),
    "in µs": _number("computed_step_overhead_s", "{:+.0f}", 1e6),
    "skipped step": _number("skipped_step_share", "{:.2f} %", 100),
}
_STATE: dict[str, Show] = {"MiB kept": _number("cache_bytes_peak", "{:.2f}", 2**-20)}
_ERROR: dict[str, Show] = {"relative error": _number("relative_error", "{:.1e}")}


def bench(columns: dict[str, Show], counted: dict[str, Show] | None = None) -> Callable[[dict[str, Any]], str]:
    """What makes the tables of a suite of ``sostenuto bench``: measured rows, counted ones, and why there are no others.

    Args:
        columns: of rows that were measured, by their heads.
        counted: of rows that were only counted.
    """

    def table(rows: Sequence[dict[str, Any]], columns: dict[str, Show]) -> str:
        lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        return "\n".join([*lines, *(f"| {' | '.join(show(row) for show in columns.values())} |" for row in rows)])

    def tables(results: dict[str, Any]) -> str:
        good = [row for row in results["rows"] if row.get("error") is None]
        measured = [row for row in good if row.get("speedup") is not None]
        others = [row for row in good if row.get("speedup") is None]
        parts = [table(measured, columns)] if measured else []
        parts += [table(others, counted)] if others and counted else []
        failed = [f"- {row['name']}: {row['error']}" for row in results["rows"] if row.get("error") is not None]
        parts += ["Not measured:\n\n" + "\n".join(failed)] if failed else []
        machine = results["machine"]
        facts = [
            machine["processor"],
            f"threads: {machine['threads']}",
            f"torch {machine['torch']}",
            f"diffusers {machine['diffusers']}",
        ]
        facts += [f"{name}: {machine[name]}" for name in ("device", "dtype", "malloc") if name in machine]
        return "\n\n".join([*parts, f"({', '.join(facts)})"])

    return tables


_COUNTED: dict[str, Show] = {
    **_NAME,
    "T-MACs, counted": _per_row("macs"),
    "printed": _printed("macs", 1e-12),
    "speed-up by MACs, counted": _number("ideal_speedup", "{:.2f}×"),
    "speed-up, printed": _printed("speedup"),
    "seconds, printed": _printed("wall_s"),
    "GiB kept": _number("cache_bytes_peak", "{:.2f}", 2**-30),
}
_GROWTH: dict[str, Show] = {
    **_NAME,
    "ms of a step uncached": _step("baseline_step_s", "baseline_step_macs", max),
    "ms computed": _step("step_s", "step_macs", max),
    "ms skipped": _step("step_s", "step_macs", min),
    **_STATE,
}

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
    "overhead.json": bench({**_NAME, **_STEPS, **_STATE, "graphs / breaks / recompiles": _graphs}),
    "efficiency.json": bench({"mode": lambda row: row["mode"], **_NAME, **_SPEED}),
    "peers.json": bench(
        {**_NAME, "library": lambda row: row.get("peer") or "sostenuto", **_SPEED, **_STEPS, **_STATE, **_ERROR}
    ),
    "dit-xl.json": bench({**_NAME, "seconds": _range("wall_s", 2), "T-MACs, counted": _per_row("macs")}, _COUNTED),
    "flux-like.json": bench({**_NAME, **_SPEED, **_STEPS, **_STATE, **_ERROR}, _COUNTED),
    "growth.json": bench(_GROWTH),
    "reliability.json": reliability,
}


def filled(page: str) -> str:
    """A page with every marked table made from its file."""

    def fill(match: re.Match[str]) -> str:
        path, made = RESULTS / match[2], "*Not measured yet.*"
        if path.exists():
            made = TABLES[match[2]](json.loads(path.read_text(encoding="utf-8")))
        return f"{match[1]}\n{made}\n\n{match[3]}"

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
