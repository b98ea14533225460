"""Judges demo images with the shipped classifier and reference statistics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from safetensors.torch import load_file

from sostenuto.demo.assets import asset
from sostenuto.demo.classifier import NUM_FEATURES, Classifier, extract
from sostenuto.errors import InputError
from sostenuto.quality import metrics, spread
from sostenuto.quality.distance import eight_bits
from sostenuto.quality.networks import Features, as_it_is
from sostenuto.quality.registry import available_metrics
from sostenuto.quality.weights import digest

NUM_TRAINING_IMAGES = 60_000


@dataclass(frozen=True)
class Verdict:
    """Quality of a set of images.

    Attributes:
        frechet_distance: to the training set, in the classifier's 128 features; 0 is best.
        inception_score: of the classifier's class distributions; 10 is best.
        class_accuracy: share that the classifier sees as the class that was asked for.
        precision: share of images that look like real test images.
        recall: share of real test images that the images cover.
    """

    frechet_distance: float
    inception_score: float
    class_accuracy: float
    precision: float
    recall: float


class DemoFeatures:
    """The shipped classifier as a feature network: 128 features and ten logits of 28 x 28 grey images."""

    num_features = NUM_FEATURES

    def __init__(self) -> None:
        path = asset("classifier.safetensors")
        self.name = f"demo-{digest(path)}"
        self.classifier = Classifier()
        self.classifier.load_state_dict(load_file(path))
        self.classifier.eval().requires_grad_(False)

    def extract(self, images: torch.Tensor) -> Features:
        """Features of images ``[n, c, 28, 28]``, uint8; three channels must be equal, as of a grey picture saved as RGB.

        Raises:
            InputError: they have another size, or colours.
        """
        if images.shape[2:] != (28, 28):
            raise InputError(f"the demo's feature network takes images of 28 x 28, not {_size(images)}")
        if not (images == images[:, :1]).all():
            raise InputError("the demo's feature network takes grey images, not colours: choose another network")
        with as_it_is("cpu"):
            return Features(*extract(self.classifier, images[:, :1].cpu().float() / 127.5 - 1))


def _size(images: torch.Tensor) -> str:
    return f"{images.shape[3]} x {images.shape[2]}"


class Judge:
    """The shipped feature network with the statistics of real images."""

    def __init__(self) -> None:
        self.network = DemoFeatures()
        real = load_file(asset("reference.safetensors"))
        self.training_set = metrics.Gaussian(real["train_mean"], real["train_cov"], NUM_TRAINING_IMAGES)
        self.test_features = real["test_features"].float()
        self._floors: dict[int, float] = {}

    def judge(self, images: torch.Tensor, labels: torch.Tensor) -> Verdict:
        """Quality of images ``[n, 1, 28, 28]`` in ``[0, 1]`` that were asked to be of ``labels`` ``[n]``."""
        seen = self.network.extract(eight_bits(images))
        assert seen.logits is not None
        precision, recall = metrics.precision_recall(seen.features, self.test_features[: len(images)])
        return Verdict(
            frechet_distance=metrics.frechet_distance(seen.features, self.training_set),
            inception_score=metrics.inception_score(seen.logits),
            class_accuracy=(seen.logits.argmax(1) == labels).float().mean().item(),
            precision=precision,
            recall=recall,
        )

    def distance(self, images: torch.Tensor) -> float:
        """Only the Fréchet distance of images ``[n, 1, 28, 28]`` in ``[0, 1]``."""
        return metrics.frechet_distance(self.network.extract(eight_bits(images)).features, self.training_set)

    def influence(self, images: torch.Tensor) -> torch.Tensor | None:
        """What each image ``[n, 1, 28, 28]`` adds to the distance ``[n]``; ``None`` with fewer than 256 images.

        See :func:`sostenuto.quality.spread.influence_on_frechet_distance`.
        """
        return spread.influence_on_frechet_distance(
            self.network.extract(eight_bits(images)).features, self.training_set
        )

    def test_logits(self) -> torch.Tensor:
        """What the classifier says of the test images, ``[10000, 10]``."""
        with torch.inference_mode():
            return self.network.classifier.head(self.test_features)

    def too_few(self, n: int) -> str | None:
        """What a distance of n images is worth, and what as many real ones get; ``None`` where n is enough."""
        metric = available_metrics()["frechet_distance"]
        return metric.says_little(n, self.network.num_features, (self.floor(n), n))

    def floor(self, n: int) -> float:
        """The distance of n real test images to the training set: what a perfect generator would get at this n."""
        if n not in self._floors:
            self._floors[n] = metrics.frechet_distance(self.test_features[:n], self.training_set)
        return self._floors[n]
