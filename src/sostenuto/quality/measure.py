"""How images become statistics: batch by batch, shared among processes, and gone on with after an interruption."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sostenuto.errors import InputError, MetricError
from sostenuto.progress import progress
from sostenuto.quality.networks import FeatureNetwork, load_network
from sostenuto.quality.perceptual import Scorer
from sostenuto.quality.registry import Metric, Needs
from sostenuto.quality.sources import Source
from sostenuto.quality.statistics import Collector, Origin, Statistics

NO_REFERENCE = "it needs a reference: give --reference"
_SECONDS_BETWEEN_SAVES = 60.0


@dataclass(frozen=True)
class Companions:
    """What comes with a set of images.

    Attributes:
        twins: the same images without caching, in the same order.
        prompts: what each image (or video) was asked to be, over and over.
    """

    twins: Source | None = None
    prompts: Sequence[str] | None = None

    def check(self, source: Source) -> None:
        """Refuse companions of other images before any work is done.

        Raises:
            InputError: number, size or names differ.
        """
        count = len(source) // source.frames
        if self.prompts is not None and (not self.prompts or count % len(self.prompts)):
            raise InputError(
                f"{source.name} has {count} {_what(source)} and there are {len(self.prompts)} prompts: give one for each, or "
                "those that went over and over through all of them"
            )
        if self.twins is None:
            return
        twins = self.twins
        if (len(twins), twins.frames) != (len(source), source.frames):
            raise InputError(
                f"{source.name} has {count} {_what(source)} and {twins.name} {len(twins) // twins.frames}: pairs need as many, "
                "in the same order"
            )
        if twins.shape[1:] != source.shape[1:]:
            raise InputError(
                f"the images of {source.name} are {source.shape[2]} x {source.shape[1]} and those of {twins.name} "
                f"{twins.shape[2]} x {twins.shape[1]}: pairs need one size"
            )
        if source.keys and twins.keys and source.keys != twins.keys:
            own, other = next((a, b) for a, b in zip(source.keys, twins.keys, strict=True) if a != b)
            raise InputError(f"{source.name} has {own} where {twins.name} has {other}: pairs need the same names")

    def of(self, needs: Needs, source: Source, start: int, stop: int) -> object:
        """What a metric compares images ``start … stop`` with."""
        if needs is Needs.PAIRS:
            assert self.twins is not None
            return self.twins.read(start, stop)
        assert self.prompts is not None
        return [self.prompts[index // source.frames % len(self.prompts)] for index in range(start, stop)]

    def identity(self) -> str:
        """Digest of what they are."""
        return hashlib.sha256(
            json.dumps([self.twins.identity if self.twins else None, self.prompts and list(self.prompts)]).encode()
        ).hexdigest()


def _what(source: Source) -> str:
    return "images" if source.frames == 1 else "videos"


@dataclass(frozen=True)
class Instruments:
    """What looks at images.

    Attributes:
        network: gives features; ``None`` where it is not wanted or not at hand.
        scorers: metrics of single images with what computes them.
        reasons: why a metric can't be computed, by its name.
    """

    network: FeatureNetwork | None
    scorers: Mapping[Metric, Scorer] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)


def prepare(
    metrics: Sequence[Metric],
    source: Source,
    companions: Companions,
    network: str | FeatureNetwork = "auto",
    weights: Mapping[str, Path] | None = None,
    device: str = "cpu",
    is_compared: bool = True,
    features: bool = False,
) -> Instruments:
    """Load what the metrics need; what is not at hand is a reason instead of an error.

    Args:
        metrics: which are wanted.
        source: the images, for their size.
        companions: what comes with them.
        network: name of the feature network, or one of your own.
        weights: paths of weights by name.
        device: where networks run.
        is_compared: whether there is a reference, or may be one when what is measured is used again.
        features: whether the network is wanted for itself, whatever the metrics are.

    Raises:
        InputError: there is no such network.
        MetricError: the network is wanted for itself and not at hand.
    """
    given = dict(weights or {})
    scorers: dict[Metric, Scorer] = {}
    reasons: dict[str, str] = {}
    present = {Needs.PAIRS: companions.twins, Needs.PROMPTS: companions.prompts}
    for metric in metrics:
        if metric.load is None:
            if not is_compared and metric.needs is not Needs.LOGITS:
                reasons[metric.name] = NO_REFERENCE
            continue
        if present.get(metric.needs) is None:
            flag = "--paired" if metric.needs is Needs.PAIRS else "--prompts"
            reasons[metric.name] = f"it needs {metric.needs.value}: give {flag}"
        elif min(source.shape[1:]) < metric.smallest:
            size = f"{source.shape[2]} x {source.shape[1]}"
            reasons[metric.name] = f"it needs images of {metric.smallest} pixels each way, these are {size}"
        else:
            try:
                scorers[metric] = metric.load(given, device)
            except MetricError as error:
                reasons[metric.name] = str(error)
    chosen: FeatureNetwork | None = None
    if features or any(metric.of_sets and metric.name not in reasons for metric in metrics):
        try:
            chosen = load_network(network, given, source.shape, device) if isinstance(network, str) else network
        except MetricError as error:
            if features:
                raise
            reasons |= {metric.name: str(error) for metric in metrics if metric.of_sets and metric.name not in reasons}
    return Instruments(chosen, scorers, reasons)


def measure(
    source: Source,
    instruments: Instruments,
    companions: Companions | None = None,
    *,
    batch_size: int = 100,
    shard: tuple[int, int] = (0, 1),
    checkpoint: Path | None = None,
    show: bool = True,
) -> Statistics:
    """Look at all images of this process's part.

    Batches begin at multiples of ``batch_size`` whoever looks at them, so that what the network sees in an image doesn't
    depend on the number of processes.

    Args:
        source: the images.
        instruments: what looks at them.
        companions: what they are compared with.
        batch_size: images at once.
        shard: this process's part of the batches and the number of parts.
        checkpoint: where the statistics are kept; if they are there already, what is missing of them is done. It is written
            every minute, at the end, and when something goes wrong.
        show: a progress bar.

    Raises:
        InputError: an image is damaged, or the checkpoint is of other images.
    """
    if batch_size < 1 or not 0 <= shard[0] < shard[1]:
        raise InputError(f"batches of {batch_size} images and part {shard[0]} of {shard[1]} make no sense")
    companions = companions or Companions()
    companions.check(source)
    made_of = hashlib.sha256(f"{source.identity} {companions.identity()}".encode()).hexdigest()
    network = instruments.network.name if instruments.network else ""
    origin = Origin(source.name, made_of, len(source), source.frames, source.shape, network, batch_size)
    if instruments.network is None and not instruments.scorers:
        return Statistics(origin, torch.arange(len(source)))  # nothing looks at them
    collector = Collector(origin)
    if checkpoint is not None and checkpoint.exists():
        known = Statistics.load(checkpoint)
        if not known.complete:
            _check_alike(checkpoint, known, instruments)
        collector.merge(known)
    every = [(start, min(start + batch_size, len(source))) for start in range(0, len(source), batch_size)]
    batches = every[shard[0] :: shard[1]]
    saved, before = time.monotonic(), len(collector)
    try:
        with progress(sum(stop - start for start, stop in batches), f"look at {source.name}", show) as bar:
            for start, stop in batches:
                if start not in collector:
                    _look(collector, source, instruments, companions, start, stop)
                bar.update(stop - start)
                if checkpoint is not None and time.monotonic() - saved > _SECONDS_BETWEEN_SAVES:
                    collector.statistics().save(checkpoint)
                    saved, before = time.monotonic(), len(collector)
    finally:
        if checkpoint is not None and len(collector) > before:
            collector.statistics().save(checkpoint)
    return collector.statistics()


def _check_alike(path: Path, known: Statistics, instruments: Instruments) -> None:
    """Refuse to go on with other metrics than it began with, before any image is looked at.

    Raises:
        InputError: with both.
    """
    before = {*known.scores, *(["features"] if known.features is not None else [])}
    now = {*(metric.name for metric in instruments.scorers), *(["features"] if instruments.network else [])}
    if len(known) and before != now:
        raise InputError(
            f"{path} was begun with {', '.join(sorted(before)) or 'nothing'}, and now {', '.join(sorted(now))} are measured: "
            "ask for the same metrics with the same weights at hand, or delete it"
        )


def _look(
    collector: Collector, source: Source, instruments: Instruments, companions: Companions, start: int, stop: int
) -> None:
    images = source.read(start, stop)
    seen = instruments.network.extract(images) if instruments.network else None
    wanted = {metric.needs for metric in instruments.scorers}
    compared: dict[Needs, tuple[torch.Tensor, Any]] = {
        needs: (images, companions.of(needs, source, start, stop)) for needs in wanted
    }
    if Needs.PAIRS in compared:
        compared[Needs.PAIRS] = _in_one_mode(*compared[Needs.PAIRS])
    scores = {metric.name: score(*compared[metric.needs]) for metric, score in instruments.scorers.items()}
    collector.add(torch.arange(start, stop), seen, scores)


def _in_one_mode(images: torch.Tensor, twins: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Two batches ``[n, c, h, w]``, both in colour where one of them is."""
    channels = max(images.shape[1], twins.shape[1])
    return images.expand(-1, channels, -1, -1), twins.expand(-1, channels, -1, -1)
