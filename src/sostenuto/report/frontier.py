"""The figures of a tuning: quality against speed, and the plans of the frontier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from sostenuto.report.figures import ACCENT, INK, MUTED
from sostenuto.table import StepState
from sostenuto.tuning.result import Tuned

matplotlib.use("agg")

# Of different lightness, so that they are told apart in grey.
_SHADES = dict(zip(StepState, ("#1d4f9e", "#7fa7dd", "#e3a65b", "#f1f3f8"), strict=True))
_NAMES = {
    StepState.COMPUTE: "compute",
    StepState.REUSE_ATTENTION: "reuse attention",
    StepState.REUSE_MLP: "reuse MLP",
    StepState.REUSE_BOTH: "reuse all",
}


def frontier_figure(tuned: Tuned) -> Figure:
    """Nearness to the uncached images, and the score where there is one, against speed by multiply-accumulates."""
    scored = [point for point in tuned.frontier if point.score is not None]
    figure = Figure(figsize=(11 if scored else 6, 4.2), layout="constrained")
    axes = figure.subplots(1, 2 if scored else 1, squeeze=False)[0]
    _draw(axes[0], [(p.ideal_speedup, p.decibels) for p in tuned.frontier], "nearness to the uncached images (dB)")
    if scored:
        _draw(axes[1], [(p.ideal_speedup, p.score) for p in scored], "score (lower is better)")
        axes[1].axhline(tuned.uncached_score, color=MUTED, linewidth=0.8, linestyle="--")
        axes[1].annotate("uncached", (1.0, tuned.uncached_score), fontsize=8, color=INK, va="bottom")
    return figure


def _draw(axes: Any, points: list[tuple[float, Any]], label: str) -> None:
    axes.plot(*zip(*points, strict=True), marker="o", color=ACCENT, linewidth=1.2)
    axes.set_xlabel("speed-up by multiply-accumulates", fontsize=9, color=INK)
    axes.set_ylabel(label, fontsize=9, color=INK)
    axes.set_xlim(left=1.0)
    axes.grid(alpha=0.2)
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def plans_figure(tuned: Tuned) -> Figure:
    """One line for each point: what every step does, with the degree of its forecast."""
    tables = [point.table for point in tuned.frontier]
    codes = list(_SHADES)
    matrix = [[codes.index(StepState(state)) for state in table.actions] for table in tables]
    figure = Figure(figsize=(11, 0.36 * len(matrix) + 1.4), layout="constrained")
    axes = figure.subplots()
    palette = ListedColormap([_SHADES[code] for code in codes])
    axes.pcolormesh(matrix, cmap=palette, vmin=-0.5, vmax=len(codes) - 0.5, edgecolors="white", linewidth=0.5)
    axes.invert_yaxis()
    for line, table in enumerate(tables):
        for step, (state, order) in enumerate(zip(table.actions, table.forecast_orders, strict=True)):
            if state is not StepState.COMPUTE:
                axes.text(step + 0.5, line + 0.5, str(order), ha="center", va="center", fontsize=6, color=INK)
    labels = [f"{point.ideal_speedup:.2f}×" for point in tuned.frontier]
    axes.set_yticks([line + 0.5 for line in range(len(labels))], labels, fontsize=8, color=INK)
    axes.set_xlabel("step (noise → image); the numbers are degrees of forecasts", fontsize=9, color=INK)
    axes.tick_params(labelsize=8, length=0)
    axes.legend(
        [Patch(facecolor=_SHADES[code], edgecolor=MUTED) for code in codes],
        [_NAMES[code] for code in codes],
        fontsize=8,
        ncol=len(codes),
        loc="lower right",
        bbox_to_anchor=(1, 1),
        frameon=False,
    )
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure


def save_figures(folder: Path, tuned: Tuned) -> list[Path]:
    """Write both figures as PNG and as PDF; returns the files."""
    paths = []
    for name, figure in (("frontier", frontier_figure(tuned)), ("plans", plans_figure(tuned))):
        for kind in ("png", "pdf"):
            paths.append(folder / f"{name}.{kind}")
            figure.savefig(paths[-1], dpi=130, facecolor="white")
    return paths
