"""The pictures of a comparison: sample grid, plan map, quality against speed."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.text import Annotation
from matplotlib.ticker import FormatStrFormatter, MaxNLocator
from matplotlib.transforms import Bbox

matplotlib.rcParams["svg.hashsalt"] = "sostenuto"  # the same figure is the same file

INK, MUTED, ACCENT, WARM = "#1f2430", "#8a90a0", "#2f6fdb", "#d9822b"
# Of different lightness, so that they are told apart in grey; what lies in a larger site that is skipped is nearly white.
_SHADES = {"compute": "#1d4f9e", "reuse": "#9dbbe6", "forecast": "#e3a65b", "partial": "#7fb38c", "skip": "#eef0f5"}
_KINDS = {"self-attention": "attention", "mlp": "MLP", "blocks": "all blocks"}


def draw_grid(axes: Axes, images: torch.Tensor, names: Sequence[str], column_labels: Sequence[str]) -> None:
    """Rows of images from the same noise: ``[rows, columns, 1, h, w]`` in ``[0, 1]``, one row per name."""
    rows, columns, _, height, width = images.shape
    gap = 2
    sheet = torch.ones(rows * (height + gap) - gap, columns * (width + gap) - gap)
    for r in range(rows):
        for c in range(columns):
            top, left = r * (height + gap), c * (width + gap)
            sheet[top : top + height, left : left + width] = images[r, c, 0]
    axes.imshow(sheet, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_yticks([r * (height + gap) + height / 2 for r in range(rows)], names, fontsize=9, color=INK)
    axes.set_xticks([c * (width + gap) + width / 2 for c in range(columns)], column_labels, fontsize=7, color=INK)
    axes.tick_params(length=0)
    axes.xaxis.tick_top()
    for spine in axes.spines.values():
        spine.set_visible(False)


def draw_plan(axes: Axes, plan: Sequence[Sequence[str]], kinds: Sequence[str], title: str) -> None:
    """The actions carried out, one column per step, one line per site; sites of a kind together, block 0 at the top.

    A kind of few sites (all blocks as one) has higher lines, so that it can be seen.
    """
    codes = list(_SHADES)
    members = {kind: [site for site in range(len(kinds)) if kinds[site] == kind] for kind in dict.fromkeys(kinds)}
    most = max(map(len, members.values()))
    order = [site for sites in members.values() for site in sites for _ in range(max(1, most // (3 * len(sites))))]
    matrix = [[codes.index(step[site]) for step in plan] for site in order]
    palette = ListedColormap([_SHADES[code] for code in codes])
    axes.pcolormesh(matrix, cmap=palette, vmin=-0.5, vmax=len(codes) - 0.5, edgecolors="white", linewidth=0.3)
    axes.invert_yaxis()
    ticks: dict[str, float] = {}
    for kind in dict.fromkeys(kinds):
        lines = [line for line, site in enumerate(order) if kinds[site] == kind]
        ticks[_KINDS.get(kind, kind)] = (lines[0] + lines[-1] + 1) / 2
        axes.axhline(lines[0], color="white", linewidth=2)
    axes.set_yticks(list(ticks.values()), list(ticks), fontsize=8, color=INK)
    axes.set_title(title, fontsize=9, loc="left", color=INK)
    axes.set_xlabel("step (noise → image)", fontsize=8, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(labelsize=8, length=0)
    used = sorted({action for step in plan for action in step}, key=codes.index)
    axes.legend(
        [Patch(color=_SHADES[code]) for code in used],
        used,
        fontsize=7,
        ncol=len(used),
        loc="lower right",
        bbox_to_anchor=(1, 1),
        frameon=False,
    )
    for spine in axes.spines.values():
        spine.set_visible(False)


def draw_frontier(axes: Axes, rows: Sequence[dict[str, Any]], floor: float) -> None:
    """Distance against measured speed-up; down and to the right is better."""
    for row in rows:
        cached = row["ideal_speedup"] > 1 and row["method"] not in ("none", "epsilon-scaling")
        color = ACCENT if row["method"] == "eb" else WARM if cached else MUTED
        axes.scatter(row["speedup"], row["frechet_distance"], s=42, color=color, zorder=3)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FormatStrFormatter("%.3g"))
    axes.yaxis.set_minor_formatter(FormatStrFormatter("%.3g"))
    axes.axhline(rows[0]["frechet_distance"], color=MUTED, linewidth=0.8, linestyle="--")
    axes.set_xlabel("measured speed-up over uncached", fontsize=8, color=INK)
    axes.set_ylabel("Fréchet distance (lower is better)", fontsize=8, color=INK)
    axes.set_title(f"quality against speed   (real images: {floor:.2f})", fontsize=9, loc="left", color=INK)
    axes.tick_params(labelsize=8, which="both")
    axes.grid(alpha=0.2)
    axes.margins(x=0.15, y=0.12)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    _label(axes, [(row["name"], (row["speedup"], row["frechet_distance"])) for row in rows])


def _label(axes: Axes, dots: Sequence[tuple[str, tuple[float, float]]]) -> None:
    """Write names beside dots, such that they cover neither dots nor each other, and stay within the figure."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # only then is it known where things are
    at = [axes.transData.transform(point) for _, point in dots]
    size = figure.dpi / 72 * 4.5
    taken = [Bbox.from_extents(x - size, y - size, x + size, y + size) for x, y in at]
    for name, point in dots:
        label = axes.annotate(
            name, point, xytext=(0, 0), textcoords="offset points", fontsize=7, va="center", color=INK
        )
        boxes = [_moved(label, place) for place in _PLACES]
        crossed = [box.count_overlaps(taken) + (box.x0 < axes.bbox.x0 or box.x1 > figure.bbox.x1) for box in boxes]
        taken.append(_moved(label, _PLACES[crossed.index(min(crossed))]))


_PLACES = tuple(itertools.product((0, 8, -8, 15, -15, 22, -22), (1, -1)))  # above the dot, and right or left of it


def _moved(label: Annotation, place: tuple[int, int]) -> Bbox:
    """Where a label lies once it is put there."""
    up, way = place
    label.set(position=(6 * way, up), ha="left" if way > 0 else "right")
    return label.get_window_extent()


def headline_figure(rows: Sequence[dict[str, Any]], images: torch.Tensor, column_labels: Sequence[str]) -> Figure:
    """A few rows from the same noise, each with its measured speed-up and distance beside it: the front page's picture."""
    figure = Figure(figsize=(11, 0.84 * len(rows) + 0.35))
    axes = figure.add_axes((0.1, 0.02, 0.77, 0.9))
    draw_grid(axes, images, [row["name"] for row in rows], column_labels)
    right, height = axes.get_xlim()[1], images.shape[3] + 2
    for line, row in enumerate(rows):
        text = f"{row['wall_s']:.1f} s, {row['speedup']:.2f}×\ndistance {row['frechet_distance']:.2f}"
        axes.annotate(
            text, (right, line * height + height / 2), (8, 0), textcoords="offset points", fontsize=9, va="center"
        )
    return figure


def grid_figure(images: torch.Tensor, names: Sequence[str], column_labels: Sequence[str]) -> Figure:
    """The sample grid alone."""
    # The columns share what the names leave of the width, and the images are square.
    figure = Figure(figsize=(11, 9.2 / images.shape[1] * len(names) + 0.5), layout="constrained")
    draw_grid(figure.subplots(), images, names, column_labels)
    return figure


def plans_figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """The plans of the rows that skip something, one strip each."""
    cached = [row for row in rows if any(action != "compute" for step in row["plan"] for action in step)]
    figure = Figure(figsize=(11, 1.35 * len(cached)), layout="constrained")
    for axes, row in zip(figure.subplots(len(cached), 1, squeeze=False)[:, 0], cached, strict=True):
        draw_plan(
            axes, row["plan"], row["site_kinds"], f"{row['name']} — {row['ideal_speedup']:.2f}× by multiply-accumulates"
        )
    return figure


def frontier_figure(rows: Sequence[dict[str, Any]], floor: float) -> Figure:
    """Quality against speed alone."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    draw_frontier(figure.subplots(), rows, floor)
    return figure


def poster(results: dict[str, Any], images: torch.Tensor, names: Sequence[str], column_labels: Sequence[str]) -> Figure:
    """All in one picture: the grid above, below it the plan of the strongest table and quality against speed."""
    figure = Figure(figsize=(12, 0.55 * len(names) + 5.6), layout="constrained")
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=[0.55 * len(names) + 0.6, 5.0])[:, 0]
    draw_grid(top.subplots(), images, names, column_labels)
    left, right = bottom.subfigures(1, 2, squeeze=False, width_ratios=[1, 1.1])[0]
    strips = [row for row in results["rows"] if row["method"] == "eb" and row["name"].startswith("EB")]
    for axes, row in zip(left.subplots(len(strips), 1, squeeze=False)[:, 0], strips, strict=True):
        draw_plan(axes, row["plan"], row["site_kinds"], row["name"])
    draw_frontier(right.subplots(), results["rows"], results["floor"])
    return figure


def png(figure: Figure, dpi: int = 110) -> bytes:
    """A figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor="white")
    return buffer.getvalue()
