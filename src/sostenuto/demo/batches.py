"""The batches of a comparison on disk: where each lies, written whole or not at all, checked when read."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sostenuto.errors import InputError
from sostenuto.files import publish
from sostenuto.measured import parse_json


def batch_file(folder: Path, key: str, seed: int, start: int, count: int) -> Path:
    """Where the batch of so many images from the ``start``-th on lies, of the row with this key."""
    name = "".join(c if c.isalnum() or c in ".-+" else "-" for c in key)
    return folder / "batches" / f"{name}-seed{seed}-{start:05d}-{start + count - 1:05d}.safetensors"


PROCESS = uuid.uuid4().hex
"""A name for this process, kept with what it timed: another one's seconds are those of another day or machine."""


class Batch(NamedTuple):
    """What a file holds: images ``[n, 1, 28, 28]`` (uint8), the seconds that they took, statistics, and who timed it."""

    images: torch.Tensor
    seconds: float
    stats: dict[str, Any]
    process: str


def write_batch(path: Path, images: torch.Tensor, seconds: float, stats: dict[str, Any]) -> None:
    """Write a batch of images ``[n, 1, 28, 28]`` in ``[0, 1]``, the seconds that they took here and their statistics."""
    metadata = {"wall_s": str(seconds), "stats": json.dumps(stats), "process": PROCESS}
    with publish(path) as partial:
        save_file({"images": (images * 255).round().to(torch.uint8)}, partial, metadata)


def read_batch(path: Path) -> Batch:
    """The content of a batch's file.

    Raises:
        InputError: the file is no such batch.
    """
    try:
        with safe_open(path, "pt") as file:
            images, metadata = file.get_tensor("images"), file.metadata()
        seconds, stats = float(metadata["wall_s"]), parse_json(metadata["stats"])
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != (1, 28, 28):
            raise ValueError(f"images of {images.dtype} and shape {tuple(images.shape)}")
        if not isinstance(stats["macs"], int):
            raise ValueError(f"{stats['macs']!r} multiply-accumulates")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is no batch of a comparison, delete it and run again: {error}") from None
    return Batch(images, seconds, stats, metadata.get("process", ""))
