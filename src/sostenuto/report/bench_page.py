"""The self-contained page of a benchmark: its data within it, nothing beside it, no network."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import jinja2

COLUMNS: dict[str, str] = {
    "speedup": "speed-up, measured",
    "ideal_speedup": "speed-up, ideal by MACs",
    "wall_s": "seconds per generation",
    "efficiency": "efficiency (measured / ideal)",
    "frechet_distance": "Fréchet distance (lower is better)",
    "inception_score": "score (higher is better)",
    "class_accuracy": "class accuracy (higher is better)",
    "precision": "precision (higher is better)",
    "recall": "recall (higher is better)",
    "psnr": "PSNR to the baseline, dB (higher is better)",
    "ssim": "SSIM to the baseline (higher is better)",
    "lpips": "LPIPS to the baseline (lower is better)",
    "relative_error": "relative error of the latents (lower is better)",
    "computed_step_overhead": "extra time of a computed step, share",
    "skipped_step_share": "time of a skipped step, share",
    "cache_bytes_peak": "bytes of kept features",
    "macs": "MACs of a generation",
    "graphs": "graphs compiled",
    "graph_breaks": "graph breaks",
    "recompiles": "recompiles after warm-up",
}
"""The columns that the page shows and plots, with what is written at their axis."""

TIMES = ("speedup", "ideal_speedup", "wall_s")
QUALITIES = (
    "frechet_distance",
    "relative_error",
    "psnr",
    "ssim",
    "lpips",
    "inception_score",
    "class_accuracy",
    "precision",
    "recall",
)
HIGHER_IS_BETTER = (
    "speedup",
    "ideal_speedup",
    "psnr",
    "ssim",
    "inception_score",
    "class_accuracy",
    "precision",
    "recall",
    "efficiency",
)


def render(content: dict[str, Any], folder: Path) -> str:
    """The page as HTML.

    Args:
        content: what ``sostenuto bench --json`` writes.
        folder: where the rows' pictures lie.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sostenuto.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    rows = content["rows"]
    pictures = {row["key"]: _picture(folder / row["samples"]) for row in rows if row["samples"]}
    choices = {"times": TIMES, "qualities": QUALITIES, "higher": HIGHER_IS_BETTER, "titles": COLUMNS}
    return environment.get_template("bench.html.jinja").render(
        content=content,
        rows=rows,
        pictures={key: picture for key, picture in pictures.items() if picture},
        data=_embedded(content),
        choices=_embedded(choices),
    )


def _picture(path: Path) -> str | None:
    if not path.exists():
        return None
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _embedded(value: Any) -> str:
    """JSON that can't end the script that it stands in."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")
