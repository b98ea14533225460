"""What a comparison on the demo samples: its rows, its sizes and seeds, and the batches that both come to."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from sostenuto.compat import diffusers_name
from sostenuto.demo.batches import batch_file
from sostenuto.demo.network import NUM_CLASSES
from sostenuto.demo.pipeline import DemoPipeline
from sostenuto.errors import InputError
from sostenuto.methods.base import Method, parts

NUM_STEPS = 50
Turn = tuple[int, int, torch.Tensor]
"""A batch of every row: its seed, the number of its first image, and its labels."""


@dataclass(frozen=True)
class Settings:
    """What a comparison is made of."""

    num_images: int = 96
    batch_size: int = 32
    seeds: tuple[int, ...] = (0,)
    search_images: int = 100
    """Images per value when the noise scale b is searched; 0 takes the shipped tables instead of calibrating."""
    shard: tuple[int, int] = (0, 1)
    """This process's part of the batches and the number of parts."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the network's matrix products, of every row alike; the latents stay float32."""
    timed: bool = True
    """Whether speed-ups are measured; without it there are none, for where rows ran beside changing other work."""

    def __post_init__(self) -> None:
        if self.num_images < 4 or self.batch_size < 1 or not self.seeds or self.search_images < 0:
            raise InputError(
                "a comparison needs at least 4 images, a batch of 1 and a seed, not "
                f"{self.num_images}, {self.batch_size}, {list(self.seeds)} ({self.search_images} to search)"
            )
        if not 0 <= self.shard[0] < self.shard[1]:
            raise InputError(f"shard must be (part, parts) with 0 <= part < parts, not {self.shard}")


@dataclass(frozen=True)
class Entry:
    """One row: a sampler and a method.

    Attributes:
        name: shown in table and pictures.
        method: what is enabled.
        num_inference_steps: steps of the sampler.
        solver: ``"ddpm"``, ``"ddim"`` or ``"dpm-solver++"``.
        reference: name of the uncached row that runs on the same noise, for PSNR; ``None`` where none does.
    """

    name: str
    method: Method
    num_inference_steps: int = NUM_STEPS
    solver: str = "ddpm"
    reference: str | None = "uncached"

    @cached_property
    def key(self) -> str:
        """What the row's batches are kept by: all that is sampled, so that rows that sample the same share them."""
        names = "+".join(part.name for part in parts(self.method))
        return f"{names}-{digest(self.solver, self.num_inference_steps, self.method)}"


def digest(*parts: Any) -> str:
    """A short name for settings that print all that they are: another one, another name."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def labels_of(num_images: int) -> torch.Tensor:
    """Balanced labels ``[n]``: 0 … 9 over and over."""
    return torch.arange(num_images) % NUM_CLASSES


def demo_sample(num_images: int, guidance_scale: float = 1.0) -> Callable[..., torch.Tensor]:
    """A ``sample`` for calibration: images ``[n, 1, 28, 28]`` in ``[0, 1]`` with balanced labels; 1 is no guidance."""

    def sample(pipe: DemoPipeline, generator: torch.Generator, num_inference_steps: int = NUM_STEPS) -> torch.Tensor:
        parts = labels_of(num_images).split(32)
        common: dict[str, Any] = {"generator": generator, "guidance_scale": guidance_scale, "output_type": "pt"}
        return torch.cat([pipe(part.tolist(), num_inference_steps, **common).images for part in parts])

    return sample


def batches_of(settings: Settings) -> Iterator[Turn]:
    """The batches of every row, seed by seed."""
    labels = labels_of(settings.num_images)
    for seed in settings.seeds:
        for start in range(0, settings.num_images, settings.batch_size):
            yield seed, start, labels[start : start + settings.batch_size]


def share_of(settings: Settings) -> list[Turn]:
    """This process's part of the batches: large ones are dealt first, else one of two parts might get every small rest."""
    by_size = sorted(batches_of(settings), key=lambda batch: -len(batch[2]))
    return by_size[settings.shard[0] :: settings.shard[1]]


def file_of(folder: Path, entry: Entry, batch: Turn) -> Path:
    """Where a batch of a row lies."""
    seed, start, labels = batch
    return batch_file(folder, entry.key, seed, start, len(labels))


_SOLVERS: dict[str, str] = {"ddim": "DDIMScheduler", "dpm-solver++": "DPMSolverMultistepScheduler"}


@contextlib.contextmanager
def with_solver(pipe: DemoPipeline, solver: str) -> Iterator[None]:
    """The pipeline with another solver (``"ddpm"``: its own) for a while."""
    base = pipe.scheduler
    if solver != "ddpm":
        pipe.scheduler = diffusers_name(_SOLVERS[solver]).from_config(base.config)
    try:
        yield
    finally:
        pipe.scheduler = base
