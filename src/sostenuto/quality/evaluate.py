"""How good is a set of images? Every metric that can be computed, with its uncertainty and its floor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sostenuto.errors import InputError, MetricError
from sostenuto.progress import progress
from sostenuto.quality.floor import floor_of
from sostenuto.quality.measure import NO_REFERENCE, Companions, measure, prepare
from sostenuto.quality.networks import BUILT_IN, FeatureNetwork, available_networks
from sostenuto.quality.reference import Reference, subject_of
from sostenuto.quality.registry import Metric, Needs, Subject, Value, choose_metrics
from sostenuto.quality.sources import open_source
from sostenuto.quality.spread import of_mean
from sostenuto.quality.statistics import Statistics, merge
from sostenuto.quality.weights import paths_of

Images = str | Path | torch.Tensor
_QUANTILE = 1.96


@dataclass(frozen=True)
class Row:
    """One metric of a set of images.

    Attributes:
        name: of the metric.
        label: as papers call it.
        better: ``"lower"`` or ``"higher"``.
        value: ``None`` where it could not be computed.
        interval: in which the value of other such images would lie in 95 of 100 cases, by its standard error; it says
            nothing of a bias that comes from the number of images. ``None`` where there is none to be had.
        floor: what as many real images get; ``None`` where the reference can't tell.
        floor_n: number of real images that the floor was computed from.
        n: number of images (or frames of videos, for metrics of sets).
        reason: why there is no value.
    """

    name: str
    label: str
    better: str
    value: float | None = None
    interval: tuple[float, float] | None = None
    floor: float | None = None
    floor_n: int | None = None
    n: int = 0
    reason: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` found.

    Attributes:
        rows: one for each metric; none of a part of the images (``shard``).
        statistics: what is known of the images.
        reference: name of the reference.
        warnings: what a reader of the numbers should know.
    """

    rows: tuple[Row, ...]
    statistics: Statistics
    reference: str | None
    warnings: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Row:
        """The row of a metric by name."""
        return next(row for row in self.rows if row.name == name)

    def as_dict(self) -> dict[str, Any]:
        """The content of ``--json``."""
        origin = self.statistics.origin
        return {
            "samples": origin.source,
            "reference": self.reference,
            "n": origin.total // origin.frames,
            "frames": origin.frames,
            "shape": list(origin.shape),
            "network": origin.network or None,
            "measured": len(self.statistics),
            "metrics": [vars(row) for row in self.rows],
            "warnings": list(self.warnings),
        }


def evaluate(
    samples: Images | Sequence[Path | str | Statistics],
    reference: Images | None = None,
    *,
    paired: Images | None = None,
    prompts: Sequence[str] | None = None,
    metrics: Sequence[str] = (),
    network: str | FeatureNetwork = "auto",
    weights: Mapping[str, str | Path] | None = None,
    batch_size: int = 100,
    statistics: Path | None = None,
    shard: tuple[int, int] = (0, 1),
    video: bool = False,
    device: str = "cpu",
    show: bool = True,
    features: bool = False,
    folder: Path | None = None,
) -> Evaluation:
    """Compute all metrics that can be.

    Args:
        samples: a folder, ``.npz``, ``.npy``, uint8 tensor ``[n, c, h, w]`` or ``[n, frames, c, h, w]``, or files of
            statistics that together are one set.
        reference: real images, likewise, or moments of theirs in ADM's ``.npz``, or ``demo:train`` or ``demo:test``.
        paired: the same images without caching, from the same noise in the same order.
        prompts: one for each image or video, or those that go over and over through all of them, in whole rounds.
        metrics: names or labels; none for all.
        network: name of the feature network, or one of your own; ``"auto"`` goes by the size of the images.
        weights: paths of weights by name, where they don't lie in the caches of their libraries.
        batch_size: images that go through a network at once.
        statistics: where to keep what is known of the images, and to go on from after an interruption.
        shard: this process's part of the batches and the number of parts; the parts' files of statistics are then put
            together by giving them as ``samples``.
        video: subfolders are videos, and ``[n, frames, h, w]`` grey ones.
        device: where networks run.
        show: progress bars.
        folder: where what is measured of a reference's images is kept, by default beside ``statistics``.
        features: also look at images whose features no metric of these uses, such as for want of a reference.

    Raises:
        InputError: images, reference, pairs or prompts are unusable, or statistics are not all of a set; nothing was
            computed before that could be known.
        MetricError: ``features`` are asked for and their network is not at hand.
    """
    wanted = choose_metrics(tuple(metrics))
    given = paths_of(weights or {})
    against = None if reference is None else Reference(reference, video, show)
    reasons: Mapping[str, str] = {}
    if _is_statistics(samples):
        if paired is not None or prompts is not None or statistics is not None or shard[1] > 1:
            raise InputError(
                "statistics hold what images were compared with: pairs, prompts, --statistics and --shard go with images"
            )
        measured = merge([s if isinstance(s, Statistics) else Statistics.load(Path(s)) for s in _listed(samples)])
        name = measured.origin.network
        if name and not _may_be(network, name):
            asked = network if isinstance(network, str) else network.name
            raise InputError(f"{measured.origin.source} was measured with the network {name!r}, not {asked!r}")
        own = name if isinstance(network, str) else network
        chosen = network if isinstance(network, str) and network not in ("auto", name) else None
        subject = _subject(against, own if name else None, given, device, batch_size, folder, chosen)
    else:
        source = open_source(samples, video, show)  # type: ignore[arg-type]
        companions = Companions(None if paired is None else open_source(paired, video, show), prompts)
        companions.check(source)
        whole = shard[1] == 1
        is_compared = against is not None or statistics is not None or not whole or features
        instruments = prepare(wanted, source, companions, network, given, device, is_compared, features)
        if instruments.network is not None:
            instruments.network.extract(source.read(0, 1))  # refuses images that it doesn't take
        reasons = instruments.reasons
        folder = folder or (None if statistics is None else statistics.parent)
        subject = _subject(against if whole else None, instruments.network, given, device, batch_size, folder)
        measured = measure(
            source, instruments, companions, batch_size=batch_size, shard=shard, checkpoint=statistics, show=show
        )
        if not whole:
            return Evaluation((), measured, None)
    name = None if against is None else against.name
    if not measured.complete:
        raise InputError(
            f"{len(measured)} of the {measured.origin.total} images of {measured.origin.source} are in these statistics: "
            "give the files of all parts"
        )
    rows = _rows(wanted, measured, subject, reasons, show)
    size = None if against is None else against.shape
    return Evaluation(tuple(rows), measured, name, tuple(_warnings(wanted, rows, measured, size)))


def _subject(
    reference: Reference | None,
    network: FeatureNetwork | str | None,
    weights: Mapping[str, Path],
    device: str,
    batch_size: int,
    folder: Path | None = None,
    chosen: str | None = None,
) -> Subject | str | None:
    """The reference in the network's features, or why it is not to be had; ``None`` where it is not wanted."""
    if reference is None or network is None:
        return None
    try:
        return reference.subject(network, weights, device, batch_size, folder, chosen)
    except MetricError as error:
        return str(error)


def _may_be(network: str | FeatureNetwork, name: str) -> bool:
    """Whether statistics of a network of this name may be of the one that is asked for; one's own may be called anything."""
    if not isinstance(network, str):
        return network.name == name
    if network in BUILT_IN:
        return name.startswith(f"{network}-")
    return network in ("auto", name, *available_networks())


def _listed(samples: Any) -> list[Any]:
    return [samples] if isinstance(samples, (str, Path)) else list(samples)


def _is_statistics(samples: Any) -> bool:
    if isinstance(samples, torch.Tensor):
        return False
    listed = _listed(samples)
    files = [isinstance(s, Statistics) or str(s).endswith(".safetensors") for s in listed]
    if not files or (any(files) and not all(files)) or (len(files) > 1 and not all(files)):
        raise InputError("samples are one folder or file of images, or files of statistics that are parts of one set")
    return all(files)


def _rows(
    wanted: Sequence[Metric],
    measured: Statistics,
    reference: Subject | str | None,
    reasons: Mapping[str, str],
    show: bool,
) -> list[Row]:
    images = subject_of(measured)
    rows = []
    with progress(len(wanted), "metrics", show) as bar:
        for metric in wanted:
            row = Row(metric.name, metric.label, metric.better, n=len(measured))
            try:
                if metric.of_sets:
                    row = _of_set(row, metric, images, reference, reasons)
                else:
                    row = _of_images(row, metric, measured, reasons)
            except MetricError as error:
                row = replace(row, reason=str(error))
            rows.append(row)
            bar.update()
    return rows


def _of_set(
    row: Row, metric: Metric, images: Subject, reference: Subject | str | None, reasons: Mapping[str, str]
) -> Row:
    if metric.name in reasons:
        raise MetricError(reasons[metric.name])
    if images.features is None:
        raise MetricError("the statistics hold no features")
    if metric.needs is not Needs.LOGITS and not isinstance(reference, Subject):
        raise MetricError(reference or NO_REFERENCE)
    if images.count < metric.minimum:
        raise MetricError(f"it needs at least {metric.minimum} images, there are {images.count}")
    assert metric.compute is not None
    other = reference if isinstance(reference, Subject) else Subject(0)
    row = _with_value(row, metric, metric.compute(images, other))
    floor = floor_of(metric, other, images.count)
    return row if floor is None else replace(row, floor=floor[0], floor_n=floor[1])


def _of_images(row: Row, metric: Metric, measured: Statistics, reasons: Mapping[str, str]) -> Row:
    if metric.name not in measured.scores:
        raise MetricError(
            reasons.get(
                metric.name, "it was not measured when the statistics were made; measure the images anew for it"
            )
        )
    values, frames = measured.scores[metric.name], measured.origin.frames
    row = replace(row, n=len(values) // frames)
    if values.isinf().any():
        raise MetricError(f"{int(values.isinf().sum())} of {len(values)} are identical to their twins: no finite mean")
    return _with_value(row, metric, Value(float(values.mean()), of_mean(values, frames)))


def _with_value(row: Row, metric: Metric, found: Value) -> Row:
    if not math.isfinite(found.value):
        raise MetricError("it is not a finite number for these images")
    if found.error is None or not math.isfinite(found.error):
        return replace(row, value=found.value)
    half, (least, most) = _QUANTILE * found.error, metric.bounds
    return replace(row, value=found.value, interval=(max(found.value - half, least), min(found.value + half, most)))


def _warnings(
    wanted: Sequence[Metric], rows: Sequence[Row], measured: Statistics, reference: tuple[int, int, int] | None
) -> list[str]:
    found = {row.name: row for row in rows if row.value is not None}
    width = 0 if measured.features is None else measured.features.shape[1]
    warnings = []
    for metric in wanted:
        row = found.get(metric.name)
        frames = measured.origin.frames if metric.of_sets else 1
        floor = None if row is None or row.floor is None or row.floor_n is None else (row.floor, row.floor_n // frames)
        if row is not None and (few := metric.says_little(row.n // frames, width, floor)):
            warnings.append(few)
    if reference is not None and reference[1:] != measured.origin.shape[1:]:
        own = measured.origin.shape
        warnings.append(
            f"images are {own[2]} x {own[1]} and the reference {reference[2]} x {reference[1]}: that alone shifts distances"
        )
    return warnings
