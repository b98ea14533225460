"""How far a metric would move with other images of the same kind: standard errors, by theory instead of by repetition."""

from __future__ import annotations

import math

import torch

from sostenuto.quality.metrics import Gaussian, square_root


def of_mean(values: torch.Tensor, frames: int = 1) -> float | None:
    """Standard error of the mean of values ``[n]``; ``None`` for one.

    Images are independent; of videos, so many ``frames`` that follow each other each, their means are.
    """
    values = values.view(-1, frames).mean(1)
    return float(values.double().std() / math.sqrt(len(values))) if len(values) > 1 else None


def of_share(share: float, count: int) -> float:
    """Standard error of a share of ``count`` independent images; as if two more were in and two out, so that 1 has one too."""
    share = (share * count + 2) / (count + 4)
    return math.sqrt(share * (1 - share) / (count + 4))


def influence_on_frechet_distance(features: torch.Tensor, reference: Gaussian, frames: int = 1) -> torch.Tensor | None:
    """What each of the features ``[n, d]`` adds to the Fréchet distance, up to a constant: ``[n]``; the reference is fixed.

    The distance is a smooth function of mean and covariance, so to first order (the delta method) it is a mean of

        2(μ₁ − μ₂)·(x − μ₁) + (x − μ₁)ᵀ(1 − T)(x − μ₁),    T = Σ₂^½ (Σ₂^½ Σ₁ Σ₂^½)^-½ Σ₂^½

    over images. It says nothing of the bias, which the floor shows. The distances of two sets whose images belong together in
    pairs (the same noise) differ by a mean of differences: their standard error is :func:`of_mean` of those.

    Returns:
        The summands, or ``None`` with fewer than two images (or videos of so many ``frames``) per feature, where the
        covariance is too uncertain.
    """
    if len(features) // frames < 2 * features.shape[1]:
        return None
    values = features.double()
    mean = values.mean(0)
    centred = values - mean
    root = square_root(reference.cov)
    transport = root @ square_root(root @ centred.T.cov() @ root, inverse=True) @ root
    slope = torch.eye(len(mean), dtype=torch.float64) - transport
    return 2 * centred @ (mean - reference.mean) + ((centred @ slope) * centred).sum(1)


def of_frechet_distance(features: torch.Tensor, reference: Gaussian, frames: int = 1) -> float | None:
    """Standard error of the Fréchet distance of features ``[n, d]``; ``None`` with fewer than two images or videos per feature.

    Args:
        features: of images, or of the frames of videos.
        reference: what they are compared with.
        frames: of a video, see :func:`of_mean`.
    """
    influence = influence_on_frechet_distance(features, reference, frames)
    return None if influence is None else of_mean(influence, frames)


def of_inception_score(logits: torch.Tensor, score: float, frames: int = 1) -> float | None:
    """Standard error of the inception score: it is exp of a mean of divergences, so score × the mean's standard error."""
    logs = logits.double().log_softmax(1)
    shares = logs.exp()
    divergence = (shares * (logs - shares.mean(0).clamp(min=torch.finfo(torch.float64).tiny).log())).sum(1)
    error = of_mean(divergence, frames)
    return None if error is None else score * error


def of_subsets(spread: float, subset_size: int, count: int) -> float | None:
    """Standard error of a mean over subsets drawn from ``count`` images, of which ``count / subset_size`` are disjoint.

    Both sets are drawn from, so that both count as random. Subsets of few images overlap, and differ less than disjoint ones
    by the factor √(1 − subset_size / count).
    """
    if count < 2 * subset_size:
        return None
    share = subset_size / count
    return spread * math.sqrt(share / (1 - share))
