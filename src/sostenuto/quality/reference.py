"""What images are compared with: moments and features of real ones, in whatever form they come."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from sostenuto.errors import InputError, MetricError
from sostenuto.quality.arrays import open_npz, read_moments
from sostenuto.quality.measure import Instruments, measure
from sostenuto.quality.metrics import Gaussian
from sostenuto.quality.moments import Moments
from sostenuto.quality.networks import FeatureNetwork, available_networks, load_network
from sostenuto.quality.registry import Subject
from sostenuto.quality.sources import Source, open_source
from sostenuto.quality.statistics import Statistics

_ADM_NETWORK = "inception"


def subject_of(statistics: Statistics) -> Subject:
    """A measured set as metrics see it."""

    def gaussian(moments: Moments | None) -> Gaussian | None:
        return None if moments is None or moments.count < 2 else moments.gaussian()

    known = gaussian(statistics.moments), gaussian(statistics.spatial)
    frames = statistics.origin.frames
    return Subject(len(statistics), *known, statistics.features, statistics.logits, frames=frames)


class Reference:
    """The reference that was asked for: looked at when made, so that errors come early, and measured when needed.

    Args:
        where: a folder, ``.npz`` (images, moments or both), ``.npy``, a tensor, a file of statistics, ``demo:train`` or
            ``demo:test``.
        video: see :class:`~sostenuto.quality.sources.FolderSource`.
        show: progress bars.

    Raises:
        InputError: it is unusable.
    """

    def __init__(self, where: str | Path | torch.Tensor, video: bool = False, show: bool = True) -> None:
        self.name = "images" if isinstance(where, torch.Tensor) else str(where)
        self._where, self._show = where, show
        self._moments: Subject | None = None
        self._statistics: Statistics | None = None
        self.source: Source | None = None
        if self.name.endswith(".safetensors"):
            self._statistics = Statistics.load(Path(self.name))
            if not self._statistics.complete:
                raise InputError(
                    f"{self.name} holds {len(self._statistics)} of {self._statistics.origin.total} images: finish it first"
                )
        elif not self._shipped:
            if self.name.endswith(".npz") and Path(self.name).is_file():
                arrays = open_npz(Path(self.name))
                moments, spatial = read_moments(arrays, "mu", "sigma"), read_moments(arrays, "mu_s", "sigma_s")
                self._moments = Subject(0, moments, spatial) if moments else None
                if "arr_0" not in arrays and moments:
                    return
            self.source = open_source(where, video, show)

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """Channels, height and width of its images; ``None`` where it is known by its moments alone."""
        known = self.source if self._statistics is None else self._statistics.origin
        return None if known is None else known.shape

    @property
    def count(self) -> int | None:
        """How many images it has; ``None`` where it is known by its moments alone."""
        if self._statistics is not None:
            return len(self._statistics)
        return None if self.source is None or self._moments is not None else len(self.source)

    @property
    def _shipped(self) -> bool:
        return self.name in ("demo:train", "demo:test")

    def subject(
        self,
        network: FeatureNetwork | str,
        weights: Mapping[str, Path],
        device: str,
        batch_size: int,
        folder: Path | None = None,
        chosen: str | None = None,
    ) -> Subject:
        """What is known of it, in the features of a network.

        Args:
            network: that looked at the images that are compared with it, or its name where they come as statistics.
            weights: paths of weights by name.
            device: where the network runs.
            batch_size: images at once.
            folder: where what is measured of its images is kept, to go on from after an interruption and to use again.
            chosen: the name that a network is chosen by, where that is no part of its own.

        Raises:
            InputError: it was made with another network.
            MetricError: the network's weights are not at hand.
        """
        name = network if isinstance(network, str) else network.name
        self.check(name)
        if self._shipped:
            return self._shipped_subject()
        if self._statistics is not None:
            return subject_of(self._statistics)
        if self.source is None:
            assert self._moments is not None
            return self._moments
        if isinstance(network, str):
            registered = (
                name if name in available_networks() else name.partition("-")[0]
            )  # "inception-v3-…" by its kind
            network = load_network(chosen or registered, weights, self.source.shape, device)
            if network.name != name:
                raise MetricError(f"the images were measured with {name}, and only {network.name} is at hand")
        kept = None if folder is None else folder / f"reference-{_digest(self.source, network, batch_size)}.safetensors"
        statistics = measure(self.source, Instruments(network), batch_size=batch_size, checkpoint=kept, show=self._show)
        measured = subject_of(statistics)
        if self._moments is None:
            return measured
        assert self._moments.gaussian is not None
        if measured.gaussian is not None and measured.gaussian.is_like(self._moments.gaussian):
            return measured  # the moments are of these very images
        # ADM's files hold moments of the whole data set and images of a part of it.
        return replace(measured, gaussian=self._moments.gaussian, spatial=self._moments.spatial or measured.spatial)

    def check(self, network: str) -> None:
        """Refuse a network by its name before anything is measured.

        Raises:
            InputError: what is known of the reference was made with another one.
        """
        if self._shipped:
            from sostenuto.demo.judge import DemoFeatures

            if network != (own := DemoFeatures().name):
                raise InputError(f"{self.name} is known in the features of {own}, not of {network}: --network demo")
        if self._statistics is not None and self._statistics.origin.network != network:
            raise InputError(
                f"{self.name} was made with the network {self._statistics.origin.network!r}, not {network!r}"
            )
        if self._moments is not None and not network.startswith(_ADM_NETWORK):
            raise InputError(
                f"the moments in {self.name} are of Inception's features, those of the images of {network}'s"
            )

    def _shipped_subject(self) -> Subject:
        from sostenuto.demo.judge import Judge

        judge = Judge()
        if self.name == "demo:train":
            return Subject(
                judge.training_set.count, judge.training_set, held_out=judge.test_features, shuffled=True,
                logits=judge.test_logits(),
            )  # fmt: skip
        features = judge.test_features
        return Subject(
            len(features), Gaussian.of(features), features=features, logits=judge.test_logits(), shuffled=True
        )


def _digest(source: Source, network: FeatureNetwork, batch_size: int) -> str:
    """Names what the statistics of a reference are made of."""
    parts = source.identity, source.frames, source.shape, network.name, batch_size
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]
