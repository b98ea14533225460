"""How figures look: lines that differ by dash and marker as well as by shade, so that they are told apart in grey."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_LINES = (
    ("#000000", "-", None),
    ("#1f4fb4", "--", "o"),
    ("#b8460e", "-.", "s"),
    ("#4d8f3a", ":", "^"),
    ("#7a3fa0", (0, (5, 1)), "D"),
    ("#8a8a8a", (0, (1, 1)), "v"),
    ("#00727d", (0, (3, 1, 1, 1)), "x"),
)
_RC: Any = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.5,
    "legend.fontsize": 7,
    "legend.framealpha": 0.8,
    "legend.edgecolor": "none",
    "lines.linewidth": 1.3,
    "lines.markersize": 3.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "svg.hashsalt": "sostenuto",  # the same figure is the same file
    "pdf.fonttype": 42,
    "axes.unicode_minus": True,
}
SHADES = "Greys"
"""Colours of heat maps: light is low, in print as on screen."""
BRANCHES = "branch, in running order"
"""What stands at an axis of branches: a block with self- and cross-attention has two of attention."""


@contextmanager
def styled() -> Iterator[None]:
    """Within it figures are drawn and saved in this style."""
    with matplotlib.rc_context(_RC):
        yield


def figure(
    rows: int = 1, columns: int = 2, width: float = 7.0, height: float = 2.4, **options: Any
) -> tuple[Figure, Any]:
    """A figure as wide as a page's text, and its axes ``[rows, columns]``."""
    made = Figure(figsize=(width, height * rows), layout="constrained")
    return made, made.subplots(rows, columns, squeeze=False, **options)


def line(axes: Axes, values: Sequence[float | None], name: str, index: int, x: Sequence[float] | None = None) -> None:
    """One curve over the steps; gaps where there is no value. Curves of different ``index`` look different in grey."""
    color, dashes, marker = _LINES[index % len(_LINES)]
    every = max(1, len(values) // 8)
    places = list(range(len(values))) if x is None else list(x)
    axes.plot(
        places,
        [float("nan") if value is None else value for value in values],
        color=color,
        linestyle=dashes,
        marker=marker,
        markevery=(index % every, every),
        label=name,
    )


def dress(axes: Axes, title: str, ylabel: str, xlabel: str = "step (noise → image)", legend: bool = True) -> None:
    """Title, labels and legend."""
    axes.set_title(title)
    axes.set_ylabel(ylabel)
    axes.set_xlabel(xlabel)
    if legend and axes.get_legend_handles_labels()[0]:
        axes.legend()


def heat_map(
    axes: Axes,
    rows: Sequence[Sequence[float | None]],
    title: str,
    low: float | None = None,
    high: float | None = None,
    first_step: int = 0,
) -> Any:
    """A map of branches over steps, in running order from the top; what was not measured is hatched."""
    import numpy

    values = numpy.array([[numpy.nan if value is None else value for value in row] for row in rows], dtype=float)
    axes.set_facecolor("white")
    axes.grid(visible=False)
    axes.patch.set_hatch("////")
    axes.patch.set_edgecolor("#bbbbbb")
    mesh = axes.pcolormesh(
        numpy.arange(values.shape[1] + 1) + first_step - 0.5,
        numpy.arange(values.shape[0] + 1) - 0.5,
        numpy.ma.masked_invalid(values),
        cmap=SHADES,
        vmin=low,
        vmax=high,
        rasterized=values.size > 5000,
        linewidth=0,
    )
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.invert_yaxis()
    axes.set_title(title)
    axes.set_xlabel("step (noise → image)")
    axes.set_ylabel(BRANCHES)
    return mesh
