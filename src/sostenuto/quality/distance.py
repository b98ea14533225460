"""The distance of generated images to real ones as a score, for searches: what it needs is made ready once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from sostenuto.errors import InputError
from sostenuto.quality import metrics
from sostenuto.quality.floor import floor_of
from sostenuto.quality.networks import load_network
from sostenuto.quality.reference import Reference
from sostenuto.quality.registry import available_metrics

_RGB = (3, 0, 0)


def eight_bits(images: torch.Tensor) -> torch.Tensor:
    """Images in ``[0, 1]`` as bytes, as the real images are and as a saved picture would be."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


class FrechetDistance:
    """Fréchet distance of images to a reference in the features of a network: a ``score`` for ``tune`` and ``calibrate``.

    Args:
        reference: real images or their moments, in any form that :func:`~sostenuto.quality.evaluate.evaluate` takes.
        network: name of the feature network.
        weights: paths of its weights by name, where they don't lie in the cache of their library.
        device: where it runs.
        batch_size: images at once.

    Raises:
        InputError: the reference is unusable, or of another network.
        MetricError: the network's package or weights are not at hand.
    """

    def __init__(
        self,
        reference: str | Path | torch.Tensor,
        network: str = "inception",
        weights: Mapping[str, Path] | None = None,
        device: str = "cpu",
        batch_size: int = 100,
    ) -> None:
        given, source = dict(weights or {}), Reference(reference)
        self.network, self.batch_size = load_network(network, given, _RGB, device), batch_size
        self.reference = source.subject(self.network, given, device, batch_size)
        if self.reference.gaussian is None:
            raise InputError(f"{source.name} holds too few images for a distance: give two or more")
        self.real = self.reference.gaussian

    def too_few(self, n: int) -> str | None:
        """What a distance of n images is worth, and what as many real ones get where that is known; ``None``: n is enough."""
        metric = available_metrics()["frechet_distance"]
        return metric.says_little(n, len(self.real.mean), floor_of(metric, self.reference, n))

    def __call__(self, images: torch.Tensor) -> float:
        """The distance of images ``[n, c, h, w]`` in ``[0, 1]``; 0 is best."""
        parts = eight_bits(images).split(self.batch_size)
        return metrics.frechet_distance(torch.cat([self.network.extract(part).features for part in parts]), self.real)
