"""Which metrics there are: what each needs, which way is better, from how many images on it says something."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

import torch

from sostenuto.errors import InputError, MetricError
from sostenuto.quality import metrics, perceptual, spread
from sostenuto.quality.metrics import Gaussian

_FEWEST = 4  # three neighbours and the image itself; two subsets of two


class Needs(Enum):
    """What a metric is computed from."""

    FEATURES = "features of the images and of a reference"
    SPATIAL = "spatial features of the images and of a reference"
    LOGITS = "class logits of the images"
    PAIRS = "the same images without caching"
    PROMPTS = "prompts"


@dataclass(frozen=True)
class Subject:
    """A set of images as the metrics of sets see it; what is not known is ``None``.

    Attributes:
        count: images in it.
        gaussian: moments of the features.
        spatial: moments of the spatial features.
        features: ``[n, d]``.
        logits: ``[n, classes]``.
        held_out: features of real images that are not among those of ``gaussian``, ``[m, d]``.
        shuffled: whether the order of ``features`` means nothing, so that the first images stand for all.
        frames: of a video, which follow each other and are much alike; 1 for images.
    """

    count: int
    gaussian: Gaussian | None = None
    spatial: Gaussian | None = None
    features: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    held_out: torch.Tensor | None = None
    shuffled: bool = False
    frames: int = 1

    def independent(self, count: int) -> int:
        """How many of so many of its images are independent, evenly spread as they are: those of different videos."""
        return min(count, self.count // self.frames)


@dataclass(frozen=True)
class Value:
    """A metric's value and its standard error, ``None`` where there is none to be had."""

    value: float
    error: float | None = None


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: in results and on the command line.
        label: in tables, as papers call it.
        needs: what it is computed from.
        better: which way.
        minimum: images (or videos) below which it can't be computed.
        sensible: images below which it says little; 0 stands for as many as there are features.
        compute: of a metric of sets: from images and reference.
        load: of a metric of single images: makes what scores them.
        smallest: pixels an image must have each way.
        bounds: between which its values lie.
    """

    name: str
    label: str
    needs: Needs
    better: Literal["lower", "higher"]
    minimum: int = 1
    sensible: int = 1
    compute: Callable[[Subject, Subject], Value] | None = field(default=None, repr=False)
    load: perceptual.Load | None = field(default=None, repr=False)
    smallest: int = 1
    bounds: tuple[float, float] = (-math.inf, math.inf)

    @property
    def of_sets(self) -> bool:
        """Whether it is a property of all images together, rather than a mean over them."""
        return self.compute is not None

    def sensible_count(self, num_features: int) -> int:
        """Images below which it says little, of a network with so many features."""
        return self.sensible or num_features

    def says_little(self, count: int, num_features: int, floor: tuple[float, int] | None = None) -> str | None:
        """What to say of its value for so few images; ``None`` where they are enough.

        Args:
            count: of the images.
            num_features: see :meth:`sensible_count`.
            floor: what real images get and how many they were, where that is known.
        """
        wanted = self.sensible_count(num_features)
        if count >= wanted:
            return None
        real = "" if floor is None else f"; {floor[1]} real images get {floor[0]:.4g}, compare with that"
        return f"{self.label} of {count} says little, it wants {wanted}{real}"


def _need(value: torch.Tensor | Gaussian | None, what: str) -> None:
    if value is None:
        raise MetricError(f"{what} are not known")


def _frechet(images: Subject, reference: Subject) -> Value:
    _need(images.gaussian, "the features of the images")
    _need(reference.gaussian, "the features of the reference")
    assert images.gaussian is not None
    assert reference.gaussian is not None
    value = _distance(images.gaussian, reference.gaussian)
    known = images.features
    error = None if known is None else spread.of_frechet_distance(known, reference.gaussian, images.frames)
    return Value(value, error)


def _spatial_frechet(images: Subject, reference: Subject) -> Value:
    _need(images.spatial, "spatial features (only Inception has them)")
    _need(reference.spatial, "the spatial features of the reference")
    assert images.spatial is not None
    assert reference.spatial is not None
    return Value(_distance(images.spatial, reference.spatial))


def _distance(images: Gaussian, reference: Gaussian) -> float:
    try:
        return metrics.frechet_distance(images, reference)
    except ValueError as error:  # moments of another network in a reference file
        raise MetricError(str(error)) from error


def _both(images: Subject, reference: Subject) -> tuple[torch.Tensor, torch.Tensor]:
    _need(images.features, "the features of single images")
    other = reference.features if reference.held_out is None else reference.held_out
    _need(other, "the features of single reference images (give a reference with images instead of moments alone)")
    assert images.features is not None
    assert other is not None
    if len(other) < _FEWEST:
        raise MetricError(f"it needs at least {_FEWEST} reference images, there are {len(other)}")
    return images.features, other[chosen(len(other), len(images.features), reference.shuffled)]


def chosen(total: int, count: int, shuffled: bool = False, frames: int = 1) -> torch.Tensor:
    """Indices of at most ``count`` of ``total`` images, evenly spread: of a set in the order of classes all classes stay.

    With ``frames`` whole videos of so many are chosen.
    """
    total, count = total // frames, min(total, count) // frames
    videos = torch.arange(count) if shuffled else torch.arange(count) * total // max(1, count)
    return (videos[:, None] * frames + torch.arange(frames)).flatten()


def _kernel(images: Subject, reference: Subject) -> Value:
    own, other = _both(images, reference)
    size = min(1000, min(len(own), len(other)) // 2)
    value, deviation = metrics.kernel_distance(own, other, subset_size=size)
    count = min(images.independent(len(own)), reference.independent(len(other)))
    return Value(value, spread.of_subsets(deviation, size, count))


def _inception_score(images: Subject, reference: Subject) -> Value:
    _need(images.logits, "the class logits of the images")
    assert images.logits is not None
    splits = max(1, min(10, len(images.logits) // 5000))  # ten of 5 000 are the published ones
    score = metrics.inception_score(images.logits, splits)
    return Value(score, spread.of_inception_score(images.logits, score, images.frames))


def _precision(images: Subject, reference: Subject) -> Value:
    own, other = _both(images, reference)
    share = metrics.covered(own, other)
    return Value(share, spread.of_share(share, images.independent(len(own))))


def _recall(images: Subject, reference: Subject) -> Value:
    own, other = _both(images, reference)
    share = metrics.covered(other, own)
    return Value(share, spread.of_share(share, reference.independent(len(other))))


_ALL = (
    Metric("frechet_distance", "FID", Needs.FEATURES, "lower", 2, 0, _frechet, bounds=(0, math.inf)),
    Metric("spatial_frechet_distance", "sFID", Needs.SPATIAL, "lower", 2, 0, _spatial_frechet, bounds=(0, math.inf)),
    Metric("kernel_distance", "KID", Needs.FEATURES, "lower", _FEWEST, 500, _kernel),
    Metric("inception_score", "IS", Needs.LOGITS, "higher", 2, 1000, _inception_score, bounds=(1, math.inf)),
    Metric("precision", "precision", Needs.FEATURES, "higher", _FEWEST, 500, _precision, bounds=(0, 1)),
    Metric("recall", "recall", Needs.FEATURES, "higher", _FEWEST, 500, _recall, bounds=(0, 1)),
    Metric("clip_score", "CLIP score", Needs.PROMPTS, "higher", 1, 30, load=perceptual.load_clip_score),
    Metric("image_reward", "ImageReward", Needs.PROMPTS, "higher", 1, 30, load=perceptual.load_image_reward),
    Metric("psnr", "PSNR", Needs.PAIRS, "higher", 1, 8, load=perceptual.load_psnr),
    Metric("ssim", "SSIM", Needs.PAIRS, "higher", 1, 8, load=perceptual.load_ssim, smallest=11),
    Metric("lpips", "LPIPS", Needs.PAIRS, "lower", 1, 8, load=perceptual.load_lpips, smallest=32),
    Metric(
        "clip_similarity", "CLIP-I", Needs.PAIRS, "higher", 1, 8, load=perceptual.load_clip_similarity, bounds=(-1, 1)
    ),
    Metric("dists", "DISTS", Needs.PAIRS, "lower", 1, 8, load=perceptual.load_dists, smallest=32),
)
_BY_NAME = {metric.name: metric for metric in _ALL}


def available_metrics() -> dict[str, Metric]:
    """All metrics by name, in the order in which results show them."""
    return dict(_BY_NAME)


def register_metric(metric: Metric) -> None:
    """Add a metric of one's own; results and the command line then know it.

    Raises:
        InputError: its name is taken, or it can be computed in neither way or in both.
    """
    if metric.name in _BY_NAME:
        raise InputError(f"there is a metric {metric.name!r} already")
    if (metric.compute is None) == (metric.load is None):
        raise InputError(f"the metric {metric.name!r} must have either compute (of sets) or load (of single images)")
    _BY_NAME[metric.name] = metric


def choose_metrics(names: tuple[str, ...]) -> list[Metric]:
    """Metrics by name or label (``"FID"``, any case), in the order of results; all of them for no names.

    Raises:
        InputError: there is no such metric.
    """
    known = {key.lower(): metric for metric in _BY_NAME.values() for key in (metric.name, metric.label)}
    for name in names:
        if name.lower() not in known:
            raise InputError(f"there is no metric {name!r}; there are {', '.join(m.label for m in _BY_NAME.values())}")
    wanted = {known[name.lower()].name for name in names}
    return [metric for metric in _BY_NAME.values() if not names or metric.name in wanted]
