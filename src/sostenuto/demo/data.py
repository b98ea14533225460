"""Fashion-MNIST (MIT licence) from a folder that holds its four IDX files, gzipped or not."""

from __future__ import annotations

import functools
import gzip
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from sostenuto.demo.network import NULL_CLASS
from sostenuto.errors import InputError

ENVIRONMENT_VARIABLE = "FASHION_MNIST"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # the package dataset-fashion-mnist
_PREFIX = {"train": "train", "test": "t10k"}


class NoDataError(InputError, FileNotFoundError):
    """Fashion-MNIST is not at hand; the message says where to get it."""


def find_folder(folder: str | Path | None = None) -> Path:
    """The folder of the IDX files: the argument, ``$FASHION_MNIST``, or where Debian's package puts it.

    Raises:
        NoDataError: none of them is a folder.
    """
    for candidate in (folder, os.environ.get(ENVIRONMENT_VARIABLE), DEBIAN_FOLDER):
        if candidate and Path(candidate).is_dir():
            return Path(candidate)
    raise NoDataError(
        f"no Fashion-MNIST at {folder or DEBIAN_FOLDER}: install Debian's package dataset-fashion-mnist, or pass a folder "
        f"with its four IDX files (or set ${ENVIRONMENT_VARIABLE})"
    )


def read_idx(path: Path) -> np.ndarray:
    """One IDX file of unsigned bytes as an array of its own shape."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        content = file.read()
    if content[:3] != b"\x00\x00\x08":
        raise InputError(f"{path} is not an IDX file of unsigned bytes")
    dimensions = content[3]
    shape = np.frombuffer(content, ">u4", count=dimensions, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def load(split: str, folder: str | Path | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The images and labels of ``"train"`` (60 000) or ``"test"`` (10 000).

    Returns:
        images ``[n, 1, 28, 28]`` float32 in ``[-1, 1]`` and labels ``[n]`` int64 in ``0 … 9``.
    """
    root = find_folder(folder)

    def read(kind: str, dimensions: int) -> np.ndarray:
        stem = f"{_PREFIX[split]}-{kind}-idx{dimensions}-ubyte"
        for path in (root / f"{stem}.gz", root / stem):
            if path.exists():
                return read_idx(path)
        raise NoDataError(f"{root} has neither {stem} nor {stem}.gz")

    images = torch.from_numpy(read("images", 3).copy()).unsqueeze(1).float() / 127.5 - 1
    labels = torch.from_numpy(read("labels", 1).astype(np.int64))
    return images, labels


def of_labels(split: str, labels: Sequence[int], folder: str | Path | None = None) -> torch.Tensor:
    """One image of each of these labels ``[n, 1, 28, 28]``, none twice, in the order of the set."""
    images, known = load(split, folder)
    if unknown := sorted(set(labels) - set(known.tolist())):
        raise InputError(f"Fashion-MNIST has no images of label {unknown[0]}: its labels are 0 to 9")
    of_class = {label: iter((known == label).nonzero()[:, 0].tolist()) for label in set(labels)}
    return images[torch.tensor([next(of_class[label]) for label in labels])]


def batches(
    folder: str | Path | None = None, label_dropout: float = 0.1
) -> Callable[[torch.Generator, int], tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Random batches of the training images, read at the first draw.

    Args:
        folder: the folder of the IDX files, see :func:`find_folder`.
        label_dropout: share of labels replaced by the null class, as the denoiser was trained.

    Returns:
        ``draw(generator, batch_size)``, which returns images ``[batch, 1, 28, 28]`` and the denoiser's other arguments.
    """
    read = functools.cache(lambda: load("train", folder))

    def draw(generator: torch.Generator, batch_size: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        images, labels = read()
        index = torch.randint(len(images), (batch_size,), generator=generator)
        dropped = torch.rand(batch_size, generator=generator) < label_dropout
        return images[index], {"class_labels": torch.where(dropped, NULL_CLASS, labels[index])}

    return draw
