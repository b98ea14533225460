"""Draws docs/results/growth.png from growth.json: time of a step and bytes kept against depth, tokens, batch and steps.

python scripts/growth_figure.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench_tables import step_ms
from matplotlib.figure import Figure

from sostenuto.report.figures import png

RESULTS = Path(__file__).parents[1] / "docs" / "results"
AXES = {"depth": "blocks", "tokens": "tokens", "batch": "batch", "steps": "steps"}


def growth_figure(results: dict[str, Any]) -> Figure:
    """One column for each size that was varied: milliseconds above, MiB below, both axes from zero."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    grid = figure.subplots(2, len(AXES), sharey="row", squeeze=False)
    for (axis, label), (time, memory) in zip(AXES.items(), grid.T, strict=True):
        rows = [row for row in results["rows"] if row["axis"] == axis and row["error"] is None]
        sizes = [row["value"] for row in rows]
        for name, seconds, macs, which, mark in (
            ("uncached", "baseline_step_s", "baseline_step_macs", max, "o--"),
            ("computed", "step_s", "step_macs", max, "s-"),
            ("skipped", "step_s", "step_macs", min, "^-"),
        ):
            time.plot(sizes, [step_ms(row, seconds, macs, which) for row in rows], mark, label=name)
        memory.plot(sizes, [row["cache_bytes_peak"] / 2**20 for row in rows], "D-", color="grey")
        memory.set_xlabel(label)
        for panel in (time, memory):
            panel.set_xlim(0)
            panel.set_ylim(0)
            panel.grid(alpha=0.3)
    grid[0, 0].set_ylabel("ms a step")
    grid[1, 0].set_ylabel("MiB kept")
    grid[0, 0].legend(title="step", fontsize="small")
    return figure


if __name__ == "__main__":
    (RESULTS / "growth.png").write_bytes(png(growth_figure(json.loads((RESULTS / "growth.json").read_text()))))
