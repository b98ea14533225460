"""Set metrics from features and paired metrics from images, thin over torchmetrics."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore


@dataclass(frozen=True)
class Gaussian:
    """First two moments of features: ``mean`` ``[d]``, ``cov`` ``[d, d]``, float64, of ``count`` images."""

    mean: torch.Tensor
    cov: torch.Tensor
    count: int


class _Given(nn.Module):
    """Lets torchmetrics take ready features (or logits) where it expects images and a network."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def frechet_distance(features: torch.Tensor, reference: Gaussian) -> float:
    """Fréchet distance of features ``[n, d]`` to the reference; 0 is best. Depends on n: compare equal n only.

    Raises:
        ValueError: fewer than two features.
    """
    if len(features) < 2:
        raise ValueError(f"a Fréchet distance needs at least 2 images, not {len(features)}")
    metric = FrechetInceptionDistance(
        feature=_Given(features.shape[1]), normalize=True, input_img_size=(1, 1, features.shape[1])
    ).set_dtype(torch.float64)
    count = reference.count
    metric.real_features_sum = reference.mean * count
    metric.real_features_cov_sum = reference.cov * (count - 1) + torch.outer(reference.mean, reference.mean) * count
    metric.real_features_num_samples = torch.tensor(count)
    metric.update(features.double(), real=False)
    return float(metric.compute())


def inception_score(logits: torch.Tensor) -> float:
    """exp of the mean divergence between each image's class distribution and the mean one; logits ``[n, classes]``.

    In one split, so that it is comparable at small n.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it keeps all logits: ten numbers an image
        metric = InceptionScore(feature=_Given(logits.shape[1]), splits=1)
        metric.update(logits)
        return float(metric.compute()[0])


def precision_recall(features: torch.Tensor, reference: torch.Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Improved precision and recall (arXiv 1904.06991): share of each set inside the other's k-nearest-neighbour balls.

    Args:
        features: of generated images, ``[n, d]``.
        reference: of real images, ``[m, d]``; use m = n, the value depends on both.
        neighbours: k of the balls, 3 as in the paper.
    """
    features, reference = features.float(), reference.float()

    def covered(points: torch.Tensor, manifold: torch.Tensor) -> float:
        radius = (
            torch.cdist(manifold, manifold).kthvalue(neighbours + 1, dim=1).values
        )  # the nearest is the point itself
        inside = [(torch.cdist(part, manifold) <= radius).any(1) for part in points.split(1000)]
        return torch.cat(inside).float().mean().item()

    return covered(features, reference), covered(reference, features)


def paired_psnr(images: torch.Tensor, reference: torch.Tensor) -> float:
    """Mean over images of the peak signal-to-noise ratio in dB; both ``[n, c, h, w]`` in ``[0, 1]``, from the same noise.

    Infinite for identical images.
    """
    return float(
        peak_signal_noise_ratio(images, reference, data_range=1.0, dim=(1, 2, 3), reduction="elementwise_mean")
    )


def paired_ssim(images: torch.Tensor, reference: torch.Tensor) -> float:
    """Mean structural similarity; both ``[n, c, h, w]`` in ``[0, 1]``, from the same noise; 1 is best."""
    similarity = structural_similarity_index_measure(images, reference, data_range=1.0)
    assert isinstance(similarity, torch.Tensor)
    return float(similarity)
