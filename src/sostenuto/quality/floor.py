"""What would a perfect generator get? A metric of real images against others of the same kind."""

from __future__ import annotations

import torch

from sostenuto.errors import MetricError
from sostenuto.quality.metrics import Gaussian
from sostenuto.quality.registry import Metric, Needs, Subject, chosen


def floor_of(metric: Metric, reference: Subject, count: int) -> tuple[float, int] | None:
    """What real images get, and how many they are: a part of the reference, as large as asked if it suffices, beside the rest.

    Args:
        metric: of sets.
        reference: the real images.
        count: how many there should be.

    Returns:
        ``None`` where the reference can't tell.
    """
    assert metric.compute is not None
    if metric.needs is Needs.SPATIAL or (reference.features is None and reference.held_out is None):
        return None
    real = reference.features if reference.held_out is None else reference.held_out
    assert real is not None
    moments_of_more = reference.gaussian is not None and reference.gaussian.count == 0  # ADM's files: images are a part
    against_others = metric.needs is Needs.FEATURES and (
        metric.name != "frechet_distance" or (reference.held_out is None and not moments_of_more)
    )
    count = min(count, len(real) // 2 if against_others else len(real))
    part = chosen(len(real), count, reference.shuffled, reference.frames)  # frames of one video are no strangers
    count = len(part)
    if count < max(metric.minimum, 2):
        return None
    rest = torch.ones(len(real), dtype=torch.bool)
    rest[part] = False
    logits = None if reference.logits is None else reference.logits[part]
    images = Subject(count, Gaussian.of(real[part]), None, real[part], logits, frames=reference.frames)
    other = reference
    if against_others:
        others = real[rest]
        other = Subject(
            len(others), Gaussian.of(others), None, others, shuffled=reference.shuffled, frames=reference.frames
        )
    try:
        return metric.compute(images, other).value, count
    except MetricError:
        return None
