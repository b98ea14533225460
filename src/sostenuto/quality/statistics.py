"""What is kept of a set of images so that every metric can be computed from it, and sets can be put together exactly."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sostenuto.errors import InputError
from sostenuto.files import publish
from sostenuto.quality.moments import Moments
from sostenuto.quality.networks import Features

FORMAT = "sostenuto-statistics"
# 1 had the spatial features in another order than ADM's evaluator, 2 knew folders by the times of their files.
VERSION = 3


@dataclass(frozen=True)
class Origin:
    """What a set of images is and what looked at it; only parts of the same can be put together.

    Attributes:
        source: name of the whole set.
        identity: digest of what it is made of, with its twins and prompts.
        total: images in the whole set.
        frames: frames of a video; 1 for images.
        shape: channels, height, width.
        network: name of the feature network; ``""`` where there was none.
        batch_size: images that went through the network at once, beginning with a multiple of it.
    """

    source: str
    identity: str
    total: int
    frames: int
    shape: tuple[int, int, int]
    network: str
    batch_size: int


@dataclass(frozen=True)
class Statistics:
    """What is known of some images of a set, in the order of their indices.

    Attributes:
        origin: of which set, and by which network.
        indices: which images, ``[n]`` int64, increasing.
        moments: of their features, summed exactly; ``None`` without a network.
        spatial: the same of the spatial features; ``None`` where the network has none.
        features: ``[n, d]`` float32; ``None`` without a network.
        logits: ``[n, classes]`` float32; ``None`` where the network has none.
        scores: values of metrics of single images, ``[n]`` float64 by name.
    """

    origin: Origin
    indices: torch.Tensor
    moments: Moments | None = None
    spatial: Moments | None = None
    features: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    scores: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def complete(self) -> bool:
        """Whether all images of the set are in it."""
        return len(self) == self.origin.total

    def save(self, path: Path) -> None:
        """Write to a safetensors file, which appears when it is complete."""
        tensors = {"indices": self.indices}
        for name in ("moments", "spatial"):
            moments = getattr(self, name)
            tensors |= {} if moments is None else moments.tensors(name)
        for name in ("features", "logits"):
            tensors |= {} if getattr(self, name) is None else {name: getattr(self, name)}
        tensors |= {f"score.{name}": values for name, values in self.scores.items()}
        about = {"format": FORMAT, "version": VERSION, **vars(self.origin)}
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        with publish(path) as partial:
            save_file(tensors, partial, {"about": json.dumps(about)})

    @classmethod
    def load(cls, path: Path) -> Statistics:
        """Read what :meth:`save` wrote.

        Raises:
            InputError: it is something else, or its parts don't fit each other.
        """
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {}).get("about", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError, RecursionError) as error:
            raise InputError(f"{path} can't be read as statistics: {error}") from error
        try:
            return cls._from(about, tensors)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise InputError(f"{path} does not hold the statistics of images: {error}") from error

    @classmethod
    def _from(cls, about: Any, tensors: dict[str, torch.Tensor]) -> Statistics:
        if not isinstance(about, dict) or about.get("format") != FORMAT or about.get("version") != VERSION:
            raise InputError(f"it is not of the format {FORMAT}, version {VERSION}: measure the images again")
        shape = tuple(int(length) for length in about["shape"])
        numbers = {name: int(about[name]) for name in ("total", "frames", "batch_size")}
        if len(shape) != 3 or min(*shape, *numbers.values()) < 1:
            raise InputError(f"an image of {list(shape)} or one of {numbers} makes no sense")
        origin = Origin(str(about["source"]), str(about["identity"]), numbers["total"], numbers["frames"],
                        shape, str(about["network"]), numbers["batch_size"])  # fmt: skip
        indices = tensors["indices"]
        count = len(indices)
        if indices.dtype != torch.int64 or (count and not 0 <= int(indices.min()) <= int(indices.max()) < origin.total):
            raise InputError("its indices lie outside of the set")
        if (indices.diff() <= 0).any():
            raise InputError("its indices do not increase")
        moments, spatial = (
            Moments.from_tensors(tensors, name) if f"{name}.count" in tensors else None
            for name in ("moments", "spatial")
        )
        scores = {name.removeprefix("score."): value for name, value in tensors.items() if name.startswith("score.")}
        per_image = [tensors[name] for name in ("features", "logits") if name in tensors]
        sound = all(v.dtype == torch.float32 and v.ndim == 2 for v in per_image) and all(
            v.dtype == torch.float64 and v.ndim == 1 for v in scores.values()
        )
        if not sound or any(len(value) != count for value in (*per_image, *scores.values())):
            raise InputError("its values are not one row for each image")
        if any(part is not None and part.count != count for part in (moments, spatial)):
            raise InputError("its moments are of another number of images")
        return cls(origin, indices, moments, spatial, tensors.get("features"), tensors.get("logits"), scores)


class Collector:
    """Puts batches and parts of one set together; the result doesn't depend on the order in which they come.

    Args:
        origin: what all of them are parts of.
    """

    def __init__(self, origin: Origin) -> None:
        self.origin = origin
        self._parts: list[Statistics] = []
        self._moments: dict[str, Moments] = {}
        self._known: set[int] = set()

    def __contains__(self, index: int) -> bool:
        return index in self._known

    def __len__(self) -> int:
        return len(self._known)

    def add(self, indices: torch.Tensor, seen: Features | None, scores: Mapping[str, torch.Tensor]) -> None:
        """Add images that were just looked at.

        Args:
            indices: which images of the set, ``[n]``.
            seen: what the network sees in them; ``None`` without a network.
            scores: values of metrics of single images, ``[n]`` by name.
        """
        features = None if seen is None else seen.features.float()
        moments, spatial = (
            None if values is None else _moments_of(values) for values in (features, seen.spatial if seen else None)
        )
        self.merge(
            Statistics(
                self.origin,
                indices,
                moments,
                spatial,
                features,
                None if seen is None or seen.logits is None else seen.logits.float(),
                {name: values.double() for name, values in scores.items()},
            )
        )

    def merge(self, part: Statistics) -> None:
        """Add what is known of other images of the same set.

        Raises:
            InputError: it belongs to another set, network or size of batches, or some images are in both.
        """
        for name, value in vars(self.origin).items():
            if name == "identity" and part.origin.identity != value:
                raise InputError(
                    f"{part.origin.source} and {self.origin.source} are not the same images, or came with other prompts or "
                    "pairs: parts are of one set, or of copies"
                )
            if name != "source" and getattr(part.origin, name) != value:  # the same folder may be called otherwise
                raise InputError(
                    f"statistics of {part.origin.source} with {name} {getattr(part.origin, name)!r} can't be put together "
                    f"with those of {self.origin.source} with {value!r}"
                )
        indices = set(part.indices.tolist())
        if twice := self._known & indices:
            raise InputError(
                f"{len(twice)} images of {self.origin.source} are in more than one part, such as {min(twice)}"
            )
        if self._parts and _kinds(part) != _kinds(self._parts[0]):
            raise InputError(f"parts of {self.origin.source} were measured with different metrics")
        for name in ("moments", "spatial"):
            moments = getattr(part, name)
            if moments is not None:
                self._moments.setdefault(name, Moments(moments.num_features)).merge(moments)
        self._known |= indices
        self._parts.append(Statistics(part.origin, part.indices, None, None, part.features, part.logits, part.scores))

    def statistics(self) -> Statistics:
        """All that was added, in the order of the images."""
        indices = (
            torch.cat([part.indices for part in self._parts]) if self._parts else torch.zeros(0, dtype=torch.int64)
        )
        order = indices.argsort()

        def joined(values: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
            present = [value for value in values if value is not None]
            return torch.cat(present)[order] if present else None

        names = self._parts[0].scores if self._parts else ()
        scores = {name: joined([part.scores[name] for part in self._parts]) for name in names}
        return Statistics(
            self.origin,
            indices[order],
            copy.deepcopy(self._moments.get("moments")),  # what is returned stays as it is
            copy.deepcopy(self._moments.get("spatial")),
            joined([part.features for part in self._parts]),
            joined([part.logits for part in self._parts]),
            {name: values for name, values in scores.items() if values is not None},
        )


def _moments_of(values: torch.Tensor) -> Moments:
    moments = Moments(values.shape[1])
    moments.add(values)
    return moments


def _kinds(part: Statistics) -> tuple[bool, bool, frozenset[str]]:
    return part.features is not None, part.logits is not None, frozenset(part.scores)


def merge(parts: Sequence[Statistics]) -> Statistics:
    """The statistics of all images that are in one of the parts: to the bit those of one run over all of them.

    Raises:
        InputError: no part, or see :meth:`Collector.merge`.
    """
    if not parts:
        raise InputError("nothing to put together: give at least one file of statistics")
    collector = Collector(parts[0].origin)
    for part in parts:
        collector.merge(part)
    return collector.statistics()
