"""Small sets of images, and a feature network that sees their averages."""

import torch
from PIL import Image

from sostenuto.cli import main
from sostenuto.quality.networks import Features


class Colours:
    """A feature network of a few averages, of images of any size."""

    name, num_features = "colours-1", 6

    def __init__(self):
        self.batches = []

    def extract(self, images):
        self.batches.append(len(images))
        values = images.expand(-1, 3, -1, -1).float() / 255
        features = torch.cat([values.mean((2, 3)), values.std((2, 3))], 1)
        return Features(features, features[:, :3] * 20, torch.nn.functional.adaptive_avg_pool2d(values, 4).flatten(1))


def pictures(count, seed=0, size=16, channels=3):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randint(0, 200, (count, channels, 1, 1), generator=generator)
    return (base + torch.randint(0, 56, (count, channels, size, size), generator=generator)).to(torch.uint8)


def write_folder(folder, images, suffix="png"):
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        pixels = image.permute(1, 2, 0).numpy()
        Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(folder / f"{number}.{suffix}")
    return folder


def run(*words):
    return main(["evaluate", *map(str, words)])
