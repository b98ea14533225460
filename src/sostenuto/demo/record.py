"""What of a comparison is kept beside a page: how uncertain its distances are, and every row's plan as one short line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sostenuto.demo.judge import Judge
from sostenuto.demo.results import images_of
from sostenuto.demo.rows import Entry, Settings
from sostenuto.quality import spread

_LETTERS = {"compute": "c", "reuse": "r", "forecast": "f", "partial": "p", "skip": "r"}


def record(folder: Path, entries: Sequence[Entry], settings: Settings, results: dict[str, Any]) -> dict[str, Any]:
    """The results with standard errors, and with short plans.

    A row's ``frechet_distance_error`` is the standard error of its distance over images. ``difference_errors`` of the results
    is that of the difference of any two rows' distances ``[row][row]``, whose images have the same noise and labels. Both are
    by the delta method, and ``None`` with fewer than 256 images. ``plan`` has a word a step with a letter a site, c computed,
    r reused, f forecast, p some tokens computed; one letter where all sites do the same; "?" for anything else. Noise scales
    that are the same at every step become one number.

    Args:
        folder: of the comparison, with its batches.
        entries: its rows.
        settings: its sizes and seeds.
        results: what :func:`~sostenuto.demo.run.run_entries` returned.
    """
    judge = Judge()
    parts = [_influence(judge, images_of(folder, entry, settings)) for entry in entries]
    rows = []
    for part, row in zip(parts, results["rows"], strict=True):
        scale = row["eps_scale"]
        rows.append(
            row
            | {
                "frechet_distance_error": None if part is None else spread.of_mean(part),
                "plan": concise(row["plan"]),
                "eps_scale": scale[0] if len(set(scale)) == 1 else [round(value, 5) for value in scale],
            }
        )
    known = [part for part in parts if part is not None]
    errors = [[round(spread.of_mean(one - other) or 0.0, 5) for other in known] for one in known]
    return results | {"rows": rows, "difference_errors": errors or None}


def concise(plan: Sequence[Sequence[str]]) -> str:
    """A plan ``[step][site]`` as a line: a word a step."""
    words = ("".join(_LETTERS.get(action, "?") for action in step) for step in plan)
    return " ".join(word[0] if len(set(word)) == 1 else word for word in words)


def _influence(judge: Judge, images: torch.Tensor) -> torch.Tensor | None:
    """Summands of the mean distance over seeds ``[seeds × n]``, of images ``[seeds, n, 1, 28, 28]``."""
    parts = [judge.influence(own) for own in images]
    return None if parts[0] is None else torch.cat([part for part in parts if part is not None])
