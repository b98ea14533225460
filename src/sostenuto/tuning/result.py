"""What tuning hands back: the frontier of quality and speed, each point a method that can be saved."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sostenuto.compat import extra
from sostenuto.files import publish_json
from sostenuto.methods import EBCache
from sostenuto.table import CacheTable


@dataclass(frozen=True)
class Point:
    """One plan of the frontier, with what real generations showed.

    Attributes:
        target: the speed-up that was asked for.
        speedup: the uncached cost over this one's, in the unit of the budget.
        ideal_speedup: the same by multiply-accumulates.
        time_speedup: the same by the time that each kind of step took in the instrumented run; what a kind spares is divided
            among its branches by their multiply-accumulates.
        error: mean square difference of a sample's latents before the last step to the uncached ones', over the variance of
            all; the geometric mean over the samples.
        score: what ``score`` says of the images, lower is better; ``None`` where no score was given.
        table: the plan, the forecasts and the noise scale.
        measured_speedup: time of the uncached trial over that of this plan's, with all that the sample does; one run of each,
            rough on a busy machine. ``None`` where several processes made the trials at the same time on one processor, or
            two machines one each.
    """

    target: float
    speedup: float
    ideal_speedup: float
    time_speedup: float
    error: float
    score: float | None
    table: CacheTable
    measured_speedup: float | None = None

    @property
    def method(self) -> EBCache:
        """What is passed to :func:`sostenuto.enable`."""
        return EBCache(self.table)

    @property
    def origin(self) -> str:
        """Where plan and noise scale come from, such as ``"searched, b 0.99"``."""
        how = self.table.calibration
        scale = how.get("noise_scale", 1.0)
        return f"{how.get('plan', 'searched')}, {scale if isinstance(scale, str) else f'b {scale:g}'}"

    @property
    def decibels(self) -> float:
        """Signal over error of the latents before the last step, ``−10 log₁₀ error``: higher is nearer to the uncached ones."""
        return -10 * math.log10(max(self.error, 1e-12))

    def as_dict(self) -> dict[str, Any]:
        """Numbers and plan as plain data."""
        scale = self.table.eps_scale
        return {
            "target": self.target,
            "speedup": self.speedup,
            "ideal_speedup": self.ideal_speedup,
            "time_speedup": self.time_speedup,
            "measured_speedup": self.measured_speedup,
            "error": self.error,
            "decibels": self.decibels,
            "score": self.score,
            "plan": self.table.strip(),
            "origin": self.origin,
            "forecast_order": list(self.table.forecast_orders),
            "eps_scale": scale[0] if len(set(scale)) == 1 else list(scale),
        }


def pareto(points: Iterable[Point]) -> tuple[Point, ...]:
    """The points that no faster one matches both in nearness and in score, from slow to fast."""
    ordered = sorted(points, key=lambda point: (point.speedup, -point.error))
    return tuple(
        point
        for place, point in enumerate(ordered)
        if not any(_matches(faster, point) for faster in ordered[place + 1 :])
    )


def _matches(one: Point, other: Point) -> bool:
    """Whether one point is no worse than another in nearness, and in score where both have one."""
    return one.error <= other.error and (one.score is None or other.score is None or one.score <= other.score)


def answers(points: Iterable[Point], frontier: Iterable[Point]) -> dict[float, Point]:
    """For each target the slowest point of the frontier that is as fast and no worse than the one made for that target."""
    return {
        own.target: next(
            (point for point in frontier if point.speedup >= min(own.target, own.speedup) and _matches(point, own)), own
        )
        for own in sorted(points, key=lambda point: point.target)
    }


def table_path(folder: Path, target: float) -> Path:
    """Where the table for a target lies."""
    return folder / f"tuned-{target:g}x.json"


def _asked_before(frontier: Path) -> list[float]:
    """The targets whose answers an earlier call wrote."""
    try:
        found = json.loads(frontier.read_text(encoding="utf-8"))
        return [float(target) for target in (*found["asked_before"], found["target"])]
    except (OSError, ValueError, TypeError, KeyError):
        return []  # nothing was written there yet, or something else


@dataclass(frozen=True)
class Tuned:
    """What :func:`sostenuto.tune` found.

    Attributes:
        point: the point for the speed-up that was asked for; the fastest one where that is out of reach.
        frontier: from slow to fast the points that no faster one matches in nearness and score.
        answers: for each target within reach the point that serves it best: as fast, and no worse than the one made for it.
        budget: what speed is counted in, ``"macs"`` or ``"time"``.
        uncached_score: the score of the uncached images, where a score was given.
        limit: the largest speed-up that a plan of this model can have.
        notes: what was found on the way that the user should know.
        work: what it cost, in uncached generations of one row of the denoiser's batch.
        asked: the speed-up that was asked for.
    """

    point: Point
    frontier: tuple[Point, ...]
    answers: Mapping[float, Point]
    budget: str
    uncached_score: float | None
    limit: float
    notes: tuple[str, ...]
    work: float
    asked: float

    @property
    def target(self) -> float:
        """The target that :attr:`point` answers: what was asked for, or the limit."""
        return self.asked if self.asked in self.answers else max(self.answers)

    @property
    def method(self) -> EBCache:
        """The method for the speed-up that was asked for."""
        return self.point.method

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain data, ready for JSON."""
        return {
            "asked": self.asked,
            "target": self.target,
            "speedup": self.point.speedup,
            "budget": self.budget,
            "frontier": [{**point.as_dict(), "answers": self._answered(point)} for point in self.frontier],
            "uncached_score": self.uncached_score,
            "limit": self.limit,
            "notes": list(self.notes),
            "work": self.work,
        }

    def _answered(self, point: Point) -> list[float]:
        """The targets that a point serves."""
        return [target for target, answer in self.answers.items() if answer is point]

    def save(self, folder: str | Path) -> list[Path]:
        """Write ``frontier.json`` and a table for each target within reach, ``tuned-2x.json`` for one of 2; returns the files.

        For what was asked for more is tried than for the other targets. So the answer to an earlier call in this folder is
        replaced by the answer to another that asks for the same, and not by what this one found beside its own;
        ``"tables_of_before"`` names those targets.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / "frontier.json"]
        before = set(_asked_before(paths[0]))
        kept = [t for t in self.answers if t != self.target and t in before and table_path(folder, t).exists()]
        content = {**self.as_dict(), "asked_before": sorted(before - {self.target}), "tables_of_before": kept}
        publish_json(paths[0], content, indent=1)
        for target, point in self.answers.items():
            if target not in kept:
                paths.append(table_path(folder, target))
                point.table.save(paths[-1])
        return paths

    def draw(self, folder: str | Path) -> list[Path]:
        """Draw the frontier and its plans, each as PNG and as PDF, ``frontier.png`` and so on; returns the files.

        Raises:
            DependencyError: matplotlib is not installed; it comes with ``sostenuto[report]``.
        """
        with extra("report"):
            from sostenuto.report.frontier import save_figures

        Path(folder).mkdir(parents=True, exist_ok=True)
        return save_figures(Path(folder), self)

    def __str__(self) -> str:
        scored = self.uncached_score is not None
        lines = [
            f"{'for':>12} {'by MACs':>8} {'by time':>8} {'measured':>8} {'nearness':>9}{'    score' if scored else ''}  plan"
        ]
        for point in self.frontier:
            score = f" {point.score:8.3f}" if point.score is not None else ""
            mark = " ←" if point is self.point else ""
            targets = " ".join(f"{target:g}×" for target in self._answered(point))
            measured = "–" if point.measured_speedup is None else f"{point.measured_speedup:.2f}×"
            lines.append(
                f"{targets:>12} {point.ideal_speedup:7.2f}× {point.time_speedup:7.2f}× {measured:>8} "
                f"{point.decibels:6.1f} dB{score}  {point.table.strip()}  {point.origin}{mark}"
            )
        if scored:
            lines.append(f"score of the uncached images: {self.uncached_score:.3f}")
        return "\n".join([*lines, *self.notes])
