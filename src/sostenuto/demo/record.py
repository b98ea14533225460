"""What of a comparison is kept beside a page: how uncertain its distances are, and every row's plan as one short line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sostenuto.demo.judge import Judge
from sostenuto.demo.results import images_of
from sostenuto.demo.rows import Entry, Settings, labels_of
from sostenuto.errors import InputError
from sostenuto.plan import concise
from sostenuto.quality import spread


def record(
    folder: Path, entries: Sequence[Entry], settings: Settings, results: dict[str, Any], pooled: bool = False
) -> dict[str, Any]:
    """The results with standard errors, and with short plans.

    A row's ``frechet_distance_error`` is the standard error of its distance over images. ``difference_errors`` of the results
    is that of the difference of any two rows' distances ``[row][row]``, whose images have the same noise and labels. Both are
    by the delta method, and ``None`` with fewer than 256 images. ``plan`` is a line (:func:`~sostenuto.plan.concise`), noise
    scales that are the same at every step become one number.

    Args:
        folder: of the comparison, with its batches.
        entries: its rows.
        settings: its sizes and seeds.
        results: what :func:`~sostenuto.demo.run.run_entries` returned.
        pooled: judge the images of all seeds together, as a distance of few images is mostly bias. A row's
            ``frechet_distance_per_seed`` is then its distance with the images of one seed alone in the place of all, to first
            order (the infinitesimal jackknife): their mean is the distance, their spread is that over seeds.
    """
    judge = Judge()
    rows, parts = [], []
    for entry, row in zip(entries, results["rows"], strict=True):
        images = _sets(folder, entry, settings, pooled)
        part = _influence(judge, images)
        parts.append(part)
        scale = row["eps_scale"]
        rows.append(
            row
            | (_together(judge, images[0], part, settings) if pooled else {})
            | {
                "frechet_distance_error": None if part is None else spread.of_mean(part),
                "plan": concise(row["plan"]),
                "eps_scale": scale[0] if len(set(scale)) == 1 else [round(value, 5) for value in scale],
            }
        )
    if pooled:
        results = results | {"floor": judge.floor(settings.num_images * len(settings.seeds)), "pooled": True}
    known = [part for part in parts if part is not None]
    errors = [[round(spread.of_mean(one - other) or 0.0, 5) for other in known] for one in known]
    return results | {"rows": rows, "difference_errors": errors or None}


def _together(judge: Judge, images: torch.Tensor, influence: torch.Tensor | None, settings: Settings) -> dict[str, Any]:
    """What is said of a row's images of all seeds at once ``[seeds × n, 1, 28, 28]``.

    Raises:
        InputError: they are too few.
    """
    if influence is None:
        raise InputError(
            f"{len(images)} images in all are too few for an interval over seeds: the distance's 128 features need 256"
        )
    verdict = judge.judge(images, labels_of(settings.num_images).repeat(len(settings.seeds)))
    shares = influence.view(len(settings.seeds), -1).mean(1)
    per_seed = [verdict.frechet_distance + share.item() for share in shares - shares.mean()]
    return asdict(verdict) | {"frechet_distance_per_seed": per_seed}


def _sets(folder: Path, entry: Entry, settings: Settings, pooled: bool) -> torch.Tensor:
    """The images that a distance is taken of, ``[distances, n, 1, 28, 28]``: those of each seed, or of all seeds at once."""
    images = images_of(folder, entry, settings)
    return images.flatten(0, 1)[None] if pooled else images


def _influence(judge: Judge, images: torch.Tensor) -> torch.Tensor | None:
    """Summands of the mean distance ``[sets × n]``, of images ``[sets, n, 1, 28, 28]``."""
    parts = [judge.influence(own) for own in images]
    return None if parts[0] is None else torch.cat([part for part in parts if part is not None])
