"""Train the demo's judge and write the reference statistics.

``python -m sostenuto.demo.train_classifier --output runs/classifier``
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from safetensors.torch import save_file
from torch.nn import functional as F
from tqdm import trange

from sostenuto.demo.classifier import Classifier, extract
from sostenuto.demo.data import load
from sostenuto.files import publish


@dataclass(frozen=True)
class ClassifierConfig:
    """What a training run of the judge is made of."""

    output: Path = Path("runs/classifier")
    data: Path | None = None
    """Folder with the four IDX files; by default where Debian's package puts them."""
    epochs: int = 10
    batch_size: int = 128
    learning_rate: float = 2e-3
    seed: int = 0


def shift(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The batch moved by up to two pixels each way, the border filled with black."""
    dy, dx = torch.randint(0, 5, (2,), generator=generator).tolist()
    return F.pad(images, (2, 2, 2, 2), value=-1.0)[:, :, dy : dy + 28, dx : dx + 28]


def train(config: ClassifierConfig) -> float:
    """Train, save ``classifier.safetensors`` and ``reference.safetensors``, return the test accuracy."""
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    images, labels = load("train", config.data)
    test_images, test_labels = load("test", config.data)
    classifier = Classifier().to(memory_format=torch.channels_last)
    steps = config.epochs * (len(images) // config.batch_size)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=config.learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps=steps)
    batches: list[torch.Tensor] = []
    for _ in trange(steps, mininterval=5):
        if not batches:  # a new epoch; its last, smaller batch is left out
            batches = list(torch.randperm(len(images), generator=generator).split(config.batch_size))[:-1]
        index = batches.pop()
        loss = F.cross_entropy(classifier(shift(images[index], generator)), labels[index], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    classifier.eval()
    test_features, logits = extract(classifier, test_images)
    accuracy = (logits.argmax(1) == test_labels).float().mean().item()
    train_features = extract(classifier, images)[0].double()
    with publish(config.output / "classifier.safetensors") as partial:
        save_file({k: v.contiguous() for k, v in classifier.state_dict().items()}, partial)
    reference = {
        "train_mean": train_features.mean(0),
        "train_cov": train_features.T.cov(),
        "test_features": test_features.half(),
        "test_labels": test_labels.to(torch.uint8),
    }
    with publish(config.output / "reference.safetensors") as partial:
        save_file(reference, partial)
    print(f"test accuracy {accuracy:.4f}")
    return accuracy


if __name__ == "__main__":
    train(tyro.cli(ClassifierConfig, description=__doc__))
