"""How moments of features are summed exactly, so that neither order nor number of processes changes a bit of them.

Features are rounded to multiples of ``UNIT``. Sums of their products are then sums of integers, which are exact: in float64 as
long as they stay below 2⁵³, in int64 beyond. Merging is addition, and the whole is equal to the sum of its parts, in any order.
"""

from __future__ import annotations

import torch

from sostenuto.errors import InputError
from sostenuto.quality.metrics import Gaussian

UNIT = 2.0**-16
"""The resolution of features: far below what float32 arithmetic leaves of features of the order of 1."""

_FLOAT64_INTEGERS = 2**53
_INT64 = 2**63 - 1


class Moments:
    """Count, sum and sum of outer products of features ``[n, d]``.

    Attributes:
        count: number of images.
        total: sum of the features in units of :data:`UNIT`, int64 ``[d]``.
        outer: sum of their outer products in units of ``UNIT²``, int64 ``[d, d]``.
        peak: largest magnitude of a feature so far, in units of :data:`UNIT`.
    """

    def __init__(self, num_features: int) -> None:
        self.count = 0
        self.peak = 0
        self.total = torch.zeros(num_features, dtype=torch.int64)
        self.outer = torch.zeros(num_features, num_features, dtype=torch.int64)

    @property
    def num_features(self) -> int:
        """``d``."""
        return len(self.total)

    def add(self, features: torch.Tensor) -> None:
        """Add features ``[n, d]`` of any floating-point type.

        Raises:
            InputError: they have another width, are not finite, or are so large that their sum could not be exact.
        """
        if features.ndim != 2 or features.shape[1] != self.num_features:
            raise InputError(f"features must be [n, {self.num_features}], not {list(features.shape)}")
        if not features.isfinite().all():
            raise InputError("features are not finite: the images or the weights of the feature network are broken")
        units = (features.detach().cpu().double() / UNIT).round()
        peak = max(self.peak, int(units.abs().max()) if len(units) else 0)
        _check_range(self.count + len(units), peak)
        if peak:
            for part in units.split(max(1, _FLOAT64_INTEGERS // peak**2)):
                self.outer += (part.T @ part).to(torch.int64)
        self.total += units.to(torch.int64).sum(0)
        self.count += len(units)
        self.peak = peak

    def merge(self, other: Moments) -> None:
        """Add the moments of other images.

        Raises:
            InputError: they are of features of another width, or the sum could not be exact.
        """
        if other.num_features != self.num_features:
            raise InputError(f"moments of {other.num_features} features can't be added to those of {self.num_features}")
        peak = max(self.peak, other.peak)
        _check_range(self.count + other.count, peak)
        self.total = self.total + other.total
        self.outer = self.outer + other.outer
        self.count, self.peak = self.count + other.count, peak

    def gaussian(self) -> Gaussian:
        """Mean ``[d]`` and unbiased covariance ``[d, d]``, in float64.

        Raises:
            InputError: fewer than two images.
        """
        if self.count < 2:
            raise InputError(f"a covariance needs at least 2 images, not {self.count}")
        mean = self.total.double() / self.count
        cov = (self.outer.double() - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return Gaussian(mean * UNIT, cov * UNIT**2, self.count)

    def tensors(self, prefix: str) -> dict[str, torch.Tensor]:
        """What :meth:`from_tensors` reads, under names that begin with ``prefix``."""
        return {
            f"{prefix}.total": self.total,
            f"{prefix}.outer": self.outer,
            f"{prefix}.count": torch.tensor([self.count, self.peak]),
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor], prefix: str) -> Moments:
        """What :meth:`tensors` wrote.

        Raises:
            InputError: a tensor is missing or has another type or shape.
        """
        total, outer, count = (tensors.get(f"{prefix}.{name}") for name in ("total", "outer", "count"))
        if total is None or outer is None or count is None:
            raise InputError(f"the moments {prefix!r} are incomplete")
        sound = total.ndim == 1 and outer.shape == (len(total), len(total)) and count.shape == (2,)
        if not sound or any(tensor.dtype != torch.int64 for tensor in (total, outer, count)) or (count < 0).any():
            raise InputError(f"the moments {prefix!r} are malformed")
        moments = cls(0)
        moments.total, moments.outer = total, outer
        moments.count, moments.peak = count.tolist()
        _check_range(moments.count, moments.peak)
        return moments


def _check_range(count: int, peak: int) -> None:
    if peak > 2**26 or count * peak**2 > _INT64:
        raise InputError(
            f"the features are too large to be summed exactly (up to {peak * UNIT:.4g} over {count} images): scale them down"
        )
