"""Whether what a call computes is finite: one look at every feature, one answer read off the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sostenuto import compat
from sostenuto.errors import NotFiniteError
from sostenuto.features import Feature, leaves
from sostenuto.plan import Op
from sostenuto.tap import Observer, Tap


class FiniteCheck:
    """Looks for NaN and infinity in what a call is given, in what its sites compute, and in what it returns.

    Of a site in a compiled graph it sees what is kept. What is filled in is made of features that were looked at when they
    were computed.

    Args:
        taps: the tap of each site, in the order in which the sites run.
    """

    def __init__(self, taps: Sequence[Tap]) -> None:
        self._taps = taps
        watched = [(tap.site.id, place) for tap in taps if (place := tap.watched()) is not None]
        self.watchers = [Observer(name, place.last) for name, place in watched]
        self._seen: list[tuple[str, torch.Tensor]] = []

    def begin(self, latents: Feature) -> None:
        """Begin a call with these latents."""
        self._seen = []
        self._look("", latents)
        in_graph = {tap.site.id for tap in self._taps if tap.in_graph}
        for watcher in self.watchers:
            watcher.hear = None if watcher.path in in_graph else self._hear

    def end(self, step: int, output: Any) -> None:
        """End it, while the taps still hold what they keep.

        Raises:
            NotFiniteError: naming the first site that put out something else, and the step.
        """
        for tap in self._taps:
            if tap.in_graph and tap.op & Op.STORE:
                self._look(tap.site.id, tap.slots[0])
        self._look("output", compat.prediction_of(output))
        if not self._seen:
            return
        device = self._seen[0][1].device
        finite = torch.stack([bounds.isfinite().all().to(device) for _, bounds in self._seen]).tolist()
        odd = next((seen for seen, is_finite in zip(self._seen, finite, strict=True) if not is_finite), None)
        if odd is None:
            return
        name, bounds = odd
        value = "NaN" if bool(bounds.isnan().any()) else "infinity"
        if not name:
            raise NotFiniteError(
                f"the latents that the denoiser is given at step {step} hold {value}: what made them is at fault (the "
                "scheduler, the step before, the pipeline's own arithmetic)"
            )
        raise NotFiniteError(
            f"{name} puts out {value} at step {step}: run the network in bfloat16 or float32 if this is float16; if it also "
            "happens with sostenuto disabled, look for the fault in the weights or in the inputs"
        )

    def leave(self) -> None:
        """Let go of everything that belongs to a call, also one that failed."""
        self._seen = []
        for watcher in self.watchers:
            watcher.hear = None

    def _hear(self, name: str, output: Any, _: Any) -> None:
        self._look(name, output)

    def _look(self, name: str, feature: Feature) -> None:
        for tensor in leaves(feature):
            if tensor.is_floating_point() and tensor.numel():
                # NaN goes through both; no copy of the tensor is made.
                self._seen.append((name, torch.stack(tensor.detach().aminmax())))
