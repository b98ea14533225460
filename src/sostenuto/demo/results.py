"""What the sampled rows of a comparison come to: quality, speed-up, work and memory of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from sostenuto.demo.batches import read_batch
from sostenuto.demo.judge import Judge
from sostenuto.demo.rows import Entry, Settings, batches_of, file_of, labels_of
from sostenuto.machine import machine
from sostenuto.quality.metrics import paired_psnr


@dataclass
class Row:
    """A row of the results; the public field names of ``sostenuto demo --json``."""

    name: str
    key: str
    method: str
    num_inference_steps: int
    solver: str
    wall_s: float
    speedup: float | None
    ideal_speedup: float
    efficiency: float | None
    frechet_distance: float
    inception_score: float
    class_accuracy: float
    precision: float
    recall: float
    psnr: float | None
    macs: int
    cache_bytes_peak: int
    frechet_distance_per_seed: list[float] = field(default_factory=list)
    plan: list[list[str]] = field(default_factory=list)
    site_kinds: list[str] = field(default_factory=list)
    eps_scale: list[float] = field(default_factory=list)


@dataclass
class _Sampled:
    """All batches of one row: images ``[seeds, n, 1, 28, 28]``, seconds per batch and who timed it, statistics of a batch."""

    images: torch.Tensor
    seconds: list[float]
    processes: list[str]
    stats: dict[str, Any]
    macs: int


def _read(folder: Path, entry: Entry, settings: Settings) -> _Sampled:
    parts = [read_batch(file_of(folder, entry, batch)) for batch in batches_of(settings)]
    images = torch.cat([part.images for part in parts]).float() / 255
    return _Sampled(
        images.view(len(settings.seeds), settings.num_images, *images.shape[1:]),
        [part.seconds for part in parts],
        [part.process for part in parts],
        parts[-1].stats,
        sum(part.stats["macs"] for part in parts),
    )


def images_of(folder: Path, entry: Entry, settings: Settings) -> torch.Tensor:
    """The images of a row of a finished comparison ``[seeds, n, 1, 28, 28]`` in ``[0, 1]``."""
    return _read(folder, entry, settings).images


def judged(folder: Path, todo: Sequence[Entry], settings: Settings, judge: Judge) -> dict[str, Any]:
    """The results of sampled rows, the first of which is the one that speed is measured against.

    Returns:
        The content of ``sostenuto demo --json``: ``rows``, ``n``, ``seed``, ``machine`` and more.
    """
    labels = labels_of(settings.num_images)
    sampled = {entry.name: _read(folder, entry, settings) for entry in todo}
    base = sampled[todo[0].name]
    rows = []
    for entry in todo:
        own = sampled[entry.name]
        verdicts = [judge.judge(images, labels) for images in own.images]
        speedup = _speedup(base, own) if settings.timed else None
        ideal = base.macs / own.macs
        reference = sampled[entry.reference].images if entry.reference and entry.reference != entry.name else None
        psnr = None
        if reference is not None:
            psnr = paired_psnr(own.images.flatten(0, 1), reference.flatten(0, 1))
        mean = {name: fmean(getattr(v, name) for v in verdicts) for name in asdict(verdicts[0])}
        rows.append(
            Row(
                name=entry.name,
                key=entry.key,
                method=entry.method.name,
                num_inference_steps=entry.num_inference_steps,
                solver=entry.solver,
                wall_s=median(own.seconds),
                speedup=speedup,
                ideal_speedup=ideal,
                efficiency=None if speedup is None else speedup / ideal,
                psnr=psnr if psnr is not None and math.isfinite(psnr) else None,  # identical images have none
                macs=own.macs,
                cache_bytes_peak=own.stats["cache_bytes_peak"],
                frechet_distance_per_seed=[v.frechet_distance for v in verdicts],
                plan=own.stats["plan"],
                site_kinds=own.stats["site_kinds"],
                eps_scale=own.stats["eps_scale"],
                **mean,
            )
        )
    return {
        "rows": [asdict(row) for row in rows],
        "n": settings.num_images,
        "seed": settings.seeds[0],
        "seeds": list(settings.seeds),
        "batch_size": settings.batch_size,
        "floor": judge.floor(settings.num_images),
        "machine": machine() | {"device": "cpu", "dtype": settings.dtype},  # where the demo pipeline is loaded
    }


def _speedup(base: _Sampled, own: _Sampled) -> float:
    """Median of pairs of batches that one process timed."""
    times = zip(base.seconds, own.seconds, base.processes, own.processes, strict=True)
    return median(before / after for before, after, one, other in times if one == other)
