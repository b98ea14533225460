"""The figures of a tuning: quality against speed, and the plans of the frontier."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from sostenuto.plan import Action
from sostenuto.report.figures import ACCENT, INK, MUTED
from sostenuto.step_state import StepActions, StepState
from sostenuto.tuning.result import Tuned

# Of different lightness, so that they are told apart in grey.
_SHADES = dict(zip(StepState, ("#1d4f9e", "#7fa7dd", "#e3a65b", "#f1f3f8"), strict=True))
_SPEED = {"macs": "speed-up by multiply-accumulates", "time": "speed-up by measured time"}
_NAMES = {
    StepState.COMPUTE: "compute",
    StepState.REUSE_ATTENTION: "reuse attention",
    StepState.REUSE_MLP: "reuse MLP",
    StepState.REUSE_BOTH: "reuse all",
}


def frontier_figure(tuned: Tuned) -> Figure:
    """Nearness to the uncached images, and the score where there is one, against speed in the unit of the budget."""
    scored = [point for point in tuned.frontier if point.score is not None]
    figure = Figure(figsize=(11 if scored else 6, 4.2), layout="constrained")
    axes = figure.subplots(1, 2 if scored else 1, squeeze=False)[0]
    _draw(axes[0], [(p.speedup, p.decibels) for p in tuned.frontier], "nearness to the uncached images (dB)")
    if scored:
        _draw(axes[1], [(p.speedup, p.score) for p in scored], "score (lower is better)")
        axes[1].axhline(tuned.uncached_score, color=MUTED, linewidth=0.8, linestyle="--")
        axes[1].annotate("uncached", (1.0, tuned.uncached_score), fontsize=8, color=INK, va="bottom")
    for axis in axes:
        axis.set_xlabel(_SPEED[tuned.budget], fontsize=9, color=INK)
    return figure


def _draw(axes: Any, points: list[tuple[float, Any]], label: str) -> None:
    axes.plot(*zip(*points, strict=True), marker="o", color=ACCENT, linewidth=1.2)
    axes.set_ylabel(label, fontsize=9, color=INK)
    axes.set_xlim(left=1.0)
    axes.grid(alpha=0.2)
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def plans_figure(tuned: Tuned) -> Figure:
    """One line for each point: what every step does, with the degree of its forecast.

    The cell of a step that lists its branches one by one is light from below by the share of them that it reuses.
    """
    tables = [point.table for point in tuned.frontier]
    codes = list(_SHADES)
    matrix = [
        [codes.index(state if isinstance(state, StepState) else StepState.COMPUTE) for state in table.actions]
        for table in tables
    ]
    figure = Figure(figsize=(11, 0.36 * len(matrix) + 1.4), layout="constrained")
    axes = figure.subplots()
    palette = ListedColormap([_SHADES[code] for code in codes])
    axes.pcolormesh(matrix, cmap=palette, vmin=-0.5, vmax=len(codes) - 0.5, edgecolors="white", linewidth=0.5)
    axes.invert_yaxis()
    for line, table in enumerate(tables):
        for step, (state, order) in enumerate(zip(table.actions, table.forecast_orders, strict=True)):
            share = _reused(state)
            if not isinstance(state, StepState):
                part = Rectangle((step, line + 1 - share), 1, share, color=_SHADES[StepState.REUSE_BOTH], linewidth=0)
                axes.add_patch(part)
            if share:
                ink = INK if share > 0.55 else "white"  # on what is drawn in the middle of the cell
                axes.text(step + 0.5, line + 0.5, str(order), ha="center", va="center", fontsize=6, color=ink)
    labels = [f"{point.speedup:.2f}×" for point in tuned.frontier]
    axes.set_yticks([line + 0.5 for line in range(len(labels))], labels, fontsize=8, color=INK)
    words = "step (noise → image); the numbers are degrees of forecasts"
    if any(not isinstance(state, StepState) for table in tables for state in table.actions):
        words += "; where a cell is light from below, that share of the branches is reused"
    axes.set_xlabel(words, fontsize=9, color=INK)
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


def _reused(state: StepActions) -> float:
    """Share of a step's cell that shows reuse: of a step that lists its branches the share that it reuses."""
    if isinstance(state, StepState):
        return float(state is not StepState.COMPUTE)
    return fmean(action is not Action.COMPUTE for action in state.values())


def save_figures(folder: Path, tuned: Tuned) -> list[Path]:
    """Write both figures as PNG and as PDF; returns the files."""
    paths = []
    for name, figure in (("frontier", frontier_figure(tuned)), ("plans", plans_figure(tuned))):
        for kind in ("png", "pdf"):
            paths.append(folder / f"{name}.{kind}")
            figure.savefig(paths[-1], dpi=130, facecolor="white")
    return paths
