"""The demo's feature network and judge: a small CNN whose 128-d features stand in for Inception's on 28x28 grey images."""

from __future__ import annotations

import torch
from torch import nn

NUM_FEATURES = 128


class Classifier(nn.Module):
    """Ten-class CNN; ``forward`` maps images ``[batch, 1, 28, 28]`` in ``[-1, 1]`` to logits ``[batch, 10]``."""

    def __init__(self) -> None:
        super().__init__()

        def stage(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
            return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

        self.body = nn.Sequential(
            *stage(1, 32, 1),
            *stage(32, 32, 2),
            *stage(32, 64, 1),
            *stage(64, 64, 2),
            *stage(64, 128, 1),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(512, NUM_FEATURES),
            nn.ReLU(),
        )
        self.head = nn.Linear(NUM_FEATURES, 10)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Features ``[batch, 128]`` of images ``[batch, 1, 28, 28]``."""
        return self.body(images)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits ``[batch, 10]``."""
        return self.head(self.features(images))


@torch.inference_mode()
def extract(classifier: Classifier, images: torch.Tensor, batch_size: int = 500) -> tuple[torch.Tensor, torch.Tensor]:
    """Features ``[n, 128]`` and logits ``[n, 10]`` of images ``[n, 1, 28, 28]`` in ``[-1, 1]``, in float32."""
    features = torch.cat([classifier.features(part) for part in images.split(batch_size)])
    return features, classifier.head(features)
