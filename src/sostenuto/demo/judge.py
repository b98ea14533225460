"""Judges demo images with the shipped classifier and reference statistics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from safetensors.torch import load_file

from sostenuto.demo.assets import asset
from sostenuto.demo.classifier import Classifier, extract
from sostenuto.quality import metrics

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


class Judge:
    """The shipped classifier with the statistics of real images."""

    def __init__(self) -> None:
        self.classifier = Classifier()
        self.classifier.load_state_dict(load_file(asset("classifier.safetensors")))
        self.classifier.eval().requires_grad_(False)
        real = load_file(asset("reference.safetensors"))
        self.training_set = metrics.Gaussian(real["train_mean"], real["train_cov"], NUM_TRAINING_IMAGES)
        self.test_features = real["test_features"].float()
        self._floors: dict[int, float] = {}

    def judge(self, images: torch.Tensor, labels: torch.Tensor) -> Verdict:
        """Quality of images ``[n, 1, 28, 28]`` in ``[0, 1]`` that were asked to be of ``labels`` ``[n]``."""
        # Eight bits, as the real images have and as a saved picture would have.
        features, logits = extract(self.classifier, (images * 255).round() / 127.5 - 1)
        precision, recall = metrics.precision_recall(features, self.test_features[: len(features)])
        return Verdict(
            frechet_distance=metrics.frechet_distance(features, self.training_set),
            inception_score=metrics.inception_score(logits),
            class_accuracy=(logits.argmax(1) == labels).float().mean().item(),
            precision=precision,
            recall=recall,
        )

    def distance(self, images: torch.Tensor) -> float:
        """Only the Fréchet distance of images ``[n, 1, 28, 28]`` in ``[0, 1]``."""
        features, _ = extract(self.classifier, (images * 255).round() / 127.5 - 1)
        return metrics.frechet_distance(features, self.training_set)

    def floor(self, n: int) -> float:
        """The distance of n real test images to the training set: what a perfect generator would get at this n."""
        if n not in self._floors:
            self._floors[n] = metrics.frechet_distance(self.test_features[:n], self.training_set)
        return self._floors[n]
