"""Set metrics from features and paired metrics from images, thin over torchmetrics."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance


@dataclass(frozen=True)
class Gaussian:
    """First two moments of features: ``mean`` ``[d]``, ``cov`` ``[d, d]``, float64, of ``count`` images (0: unknown)."""

    mean: torch.Tensor
    cov: torch.Tensor
    count: int

    @classmethod
    def of(cls, features: torch.Tensor) -> Gaussian:
        """The moments of features ``[n, d]``.

        Raises:
            ValueError: there are fewer than two images.
        """
        if len(features) < 2:
            raise ValueError(f"moments need at least 2 images, not {len(features)}")
        values = features.double()
        return cls(values.mean(0), values.T.cov(), len(values))

    def is_like(self, other: Gaussian) -> bool:
        """Whether both are the moments of the same features, but for rounding."""
        if self.mean.shape != other.mean.shape:
            return False
        return all(
            float((own - its).norm()) <= 1e-3 * float(own.norm())
            for own, its in ((self.mean, other.mean), (self.cov, other.cov))
        )

    @cached_property
    def root(self) -> torch.Tensor:
        """Symmetric square root of the covariance; many sets are compared with one reference."""
        return square_root(self.cov)


class _Given(nn.Module):
    """Lets torchmetrics take ready features (or logits) where it expects images and a network."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


@contextmanager
def _fixed_draws() -> Iterator[None]:
    """torchmetrics draws subsets and shuffles with the global generator: here always the same, and nobody else's change."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that it keeps what it is given
        torch.default_generator.manual_seed(0)  # torch.manual_seed would set those of the GPUs too, for good
        yield


def frechet_distance(features: torch.Tensor | Gaussian, reference: Gaussian) -> float:
    """Fréchet distance |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½) to the reference; 0 is best.

    It is biased upward at small n: compare equal n only.

    Args:
        features: of generated images, ``[n, d]``, or their moments.
        reference: moments of real images.

    Raises:
        ValueError: fewer than two features, or another number of features than the reference has.
    """
    width = len(features.mean) if isinstance(features, Gaussian) else features.shape[1]
    if width != len(reference.mean):
        raise ValueError(f"the images have {width} features and the reference {len(reference.mean)}: use one network")
    if isinstance(features, Gaussian):
        return _frechet_distance_of_moments(features, reference)
    if len(features) < 2:
        raise ValueError(f"a Fréchet distance needs at least 2 images, not {len(features)}")
    metric = FrechetInceptionDistance(
        sync_on_compute=False,  # the caller shares work among processes, if anybody
        feature=_Given(width), normalize=True, input_img_size=(1, 1, width)
    ).set_dtype(torch.float64)  # fmt: skip
    count = max(reference.count, 2)  # any gives the same distance
    metric.real_features_sum = reference.mean * count
    metric.real_features_cov_sum = reference.cov * (count - 1) + torch.outer(reference.mean, reference.mean) * count
    metric.real_features_num_samples = torch.tensor(count)
    metric.update(features.double(), real=False)
    return float(metric.compute())


def _frechet_distance_of_moments(images: Gaussian, reference: Gaussian) -> float:
    """The same by symmetric eigenvalues: torchmetrics' general ones take minutes for Inception's 2048 features."""
    root = reference.root
    crossed = torch.linalg.eigvalsh(root @ images.cov @ root).clamp(min=0).sqrt().sum()
    apart = (images.mean - reference.mean).square().sum()
    return float(apart + images.cov.trace() + reference.cov.trace() - 2 * crossed)


def square_root(matrix: torch.Tensor, inverse: bool = False) -> torch.Tensor:
    """Symmetric square root of a positive semi-definite matrix ``[d, d]``, or that of its pseudo-inverse."""
    values, vectors = torch.linalg.eigh(matrix)
    kept = values > values.max().clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
    roots = torch.where(kept, values.clamp(min=torch.finfo(values.dtype).tiny).sqrt(), 0.0)
    if inverse:
        roots = torch.where(kept, 1 / roots, 0.0)
    return (vectors * roots) @ vectors.T


def kernel_distance(
    features: torch.Tensor, reference: torch.Tensor, subsets: int = 100, subset_size: int = 1000
) -> tuple[float, float]:
    """Kernel distance (arXiv 1801.01401): unbiased MMD² with the kernel (x·y/d + 1)³, a mean over random subsets.

    Args:
        features: of generated images, ``[n, d]``.
        reference: of real images, ``[m, d]``.
        subsets: number of subsets, always the same ones.
        subset_size: images in a subset, at most half of the smaller set; equal to both sizes, all of them are compared.

    Returns:
        The mean over the subsets, 0 at best and without bias, and their standard deviation.

    Raises:
        ValueError: a subset is smaller than two images, or larger than a set.
    """
    if not 2 <= subset_size <= min(len(features), len(reference)):
        raise ValueError(f"subsets of {subset_size} can't be drawn from {len(features)} and {len(reference)} images")
    with _fixed_draws():
        metric = KernelInceptionDistance(
            _Given(features.shape[1]), subsets=subsets, subset_size=subset_size, sync_on_compute=False
        )
        metric.update(reference.double(), real=True)
        metric.update(features.double(), real=False)
        mean, spread = metric.compute()
    return float(mean), float(spread)


def inception_score(logits: torch.Tensor, splits: int = 1) -> float:
    """exp of the mean divergence between each image's class distribution and the mean one; logits ``[n, classes]``.

    In one split unless told otherwise, so that it is comparable at small n; published scores are means over ten.
    """
    with _fixed_draws():
        metric = InceptionScore(feature=_Given(logits.shape[1]), splits=splits, sync_on_compute=False)
        metric.update(logits)
        return float(metric.compute()[0])


def precision_recall(features: torch.Tensor, reference: torch.Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Improved precision and recall (arXiv 1904.06991): share of each set inside the other's k-nearest-neighbour balls.

    Args:
        features: of generated images, ``[n, d]``.
        reference: of real images, ``[m, d]``; use m = n, the value depends on both.
        neighbours: k of the balls, 3 as in the paper.
    """
    return covered(features, reference, neighbours), covered(reference, features, neighbours)


def covered(points: torch.Tensor, manifold: torch.Tensor, neighbours: int = 3) -> float:
    """Share of points ``[n, d]`` inside a ball around a point of the manifold ``[m, d]`` that reaches to its k-th neighbour.

    Raises:
        ValueError: the manifold has no more than k points.
    """
    if len(manifold) <= neighbours:
        raise ValueError(f"balls of {neighbours} neighbours need more than {neighbours} images, not {len(manifold)}")
    points, manifold = points.float(), manifold.float()
    rows = max(1, 10**8 // len(manifold))  # at most 400 MB of distances at once
    radius = torch.cat(
        [torch.cdist(part, manifold).kthvalue(neighbours + 1, dim=1).values for part in manifold.split(rows)]
    )  # the nearest is the point itself
    inside = [(torch.cdist(part, manifold) <= radius).any(1) for part in points.split(1000)]
    return torch.cat(inside).float().mean().item()


def psnr_per_image(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB, ``[n]``; both ``[n, c, h, w]`` in ``[0, 1]``. Infinite for identical images."""
    return peak_signal_noise_ratio(images, reference, data_range=1.0, dim=(1, 2, 3), reduction="none")


def ssim_per_image(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Structural similarity, ``[n]``; both ``[n, c, h, w]`` in ``[0, 1]``, at least 11 pixels wide; 1 is best."""
    similarity = structural_similarity_index_measure(images, reference, data_range=1.0, reduction="none")
    assert isinstance(similarity, torch.Tensor)
    return similarity.reshape(-1)


def paired_psnr(images: torch.Tensor, reference: torch.Tensor) -> float:
    """Mean over images of the peak signal-to-noise ratio in dB; both ``[n, c, h, w]`` in ``[0, 1]``, from the same noise.

    Infinite for identical images.
    """
    return float(psnr_per_image(images, reference).mean())


def paired_ssim(images: torch.Tensor, reference: torch.Tensor) -> float:
    """Mean structural similarity; both ``[n, c, h, w]`` in ``[0, 1]``, from the same noise; 1 is best."""
    return float(ssim_per_image(images, reference).mean())
