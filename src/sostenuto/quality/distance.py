"""The distance of generated images to real ones as a score, for searches: what it needs is made ready once."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch

from sostenuto.errors import InputError
from sostenuto.quality import metrics
from sostenuto.quality.floor import floor_of
from sostenuto.quality.metrics import Gaussian
from sostenuto.quality.networks import load_network
from sostenuto.quality.reference import Reference
from sostenuto.quality.registry import Subject, available_metrics
from sostenuto.quality.weights import paths_of

_RGB = (3, 0, 0)


def eight_bits(images: torch.Tensor) -> torch.Tensor:
    """Images in ``[0, 1]`` as bytes, as the real images are and as a saved picture would be."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


class FrechetDistance:
    """Fréchet distance of images to a reference in the features of a network: a ``score`` for ``tune`` and ``calibrate``.

    The reference is looked at when the first distance is asked for: what else is wrong with a search is told before.

    Args:
        reference: real images or their moments, in any form that :func:`~sostenuto.quality.evaluate.evaluate` takes.
        network: name of the feature network.
        weights: paths of its weights by name, where they don't lie in the cache of their library.
        device: where it runs.
        batch_size: images at once.
        folder: where what is measured of the reference is kept, to go on from after an interruption and to use again.

    Raises:
        InputError: the reference is unusable, or of another network.
        MetricError: the network's package or weights are not at hand.
    """

    def __init__(
        self,
        reference: str | Path | torch.Tensor,
        network: str = "inception",
        weights: Mapping[str, str | Path] | None = None,
        device: str = "cpu",
        batch_size: int = 100,
        folder: Path | None = None,
    ) -> None:
        self._source, self._weights = Reference(reference), paths_of(weights or {})
        if self._source.count is not None and self._source.count < 2:
            raise InputError(f"{self._source.name} holds too few images for a distance: give two or more")
        self.network = load_network(network, self._weights, _RGB, device)
        self._source.check(self.network.name)
        self.device, self.batch_size, self._folder = device, batch_size, folder
        self._unlike: tuple[int, ...] | None = None

    @cached_property
    def reference(self) -> Subject:
        """What is known of the real images in the network's features."""
        return self._source.subject(self.network, self._weights, self.device, self.batch_size, self._folder)

    @property
    def real(self) -> Gaussian:
        """The moments of the real images' features."""
        assert self.reference.gaussian is not None
        return self.reference.gaussian

    def too_few(self, n: int) -> str | None:
        """What a distance of n images is worth, and what as many real ones get where that is known; ``None``: n is enough."""
        metric = available_metrics()["frechet_distance"]
        return metric.says_little(n, len(self.real.mean), floor_of(metric, self.reference, n))

    def __call__(self, images: torch.Tensor) -> float:
        """The distance of images ``[n, c, h, w]`` in ``[0, 1]``; 0 is best.

        Raises:
            InputError: there are fewer than two.
        """
        if len(images) < 2:
            raise InputError(
                f"a Fréchet distance needs at least 2 images, not {len(images)}: let score_sample make more"
            )
        self._look_at_size(images)
        parts = eight_bits(images).split(self.batch_size)
        features = torch.cat([self.network.extract(part).features for part in parts])
        return metrics.frechet_distance(Gaussian.of(features), self.real)

    def _look_at_size(self, images: torch.Tensor) -> None:
        """Say once of images of another size than the real ones."""
        own, real = tuple(images.shape[2:]), self._source.shape
        if real is not None and own not in (real[1:], self._unlike):
            self._unlike = own
            warnings.warn(
                f"images are {own[1]} x {own[0]} and those of {self._source.name} {real[2]} x {real[1]}: that alone shifts "
                "distances; give real images of the same size",
                stacklevel=3,
            )
