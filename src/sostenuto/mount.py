"""What a method puts on a denoiser: taps at its sites and what listens beside them; put on, looked after, taken off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from sostenuto import refusals
from sostenuto.attachment import Surroundings, not_copied
from sostenuto.execution import Executor
from sostenuto.finite import FiniteCheck
from sostenuto.methods.base import Method
from sostenuto.shared import SharedTimesteps
from sostenuto.tap import Observer


class Mount:
    """The taps of a handle and what carries out calls with them.

    Args:
        denoiser: the network.
        method: what is enabled on it.
        compiled: whether calls of the network go through ``torch.compile``.
        checks_finite: whether features are looked through for NaN and infinity.
    """

    def __init__(self, denoiser: nn.Module, method: Method, compiled: bool, checks_finite: bool) -> None:
        self._denoiser, self._method, self._checks_finite = denoiser, method, checks_finite
        self.compiled = compiled
        self.sites = method.sites(denoiser)
        self.keeps_clean = any(site.clean for site in self.sites)
        self._make()

    def _make(self) -> None:
        denoiser = self._denoiser
        self.taps = [self._method.tap(site, denoiser) for site in self.sites]
        paths = self._method.observed(denoiser)
        observers = [Observer(path, denoiser.get_submodule(path)) for path in paths]
        self.observes = bool(observers)
        finite = FiniteCheck(self.taps) if self._checks_finite else None
        shared = SharedTimesteps(denoiser, self.compiled)
        self.executor = Executor(denoiser, self.sites, self.taps, observers, shared, finite)
        # Taps come last: what stands within a tap hears of what is computed alone.
        self._attached = (shared, *(finite.watchers if finite else ()), *observers, *self.taps)

    def attach(self) -> None:
        """Put everything in its place.

        Raises:
            MethodError: a part of the network is compiled, and the method doesn't work there.
        """
        for tap in self._attached:
            tap.attach()
        replaced = [module for tap in self._attached for module in tap.modules_replaced]
        self._surroundings = Surroundings(self._denoiser, replaced)
        for tap in self._attached:
            tap.in_graph = self.compiled or not self._surroundings.in_graph.isdisjoint(tap.modules_replaced)
        self.executor.in_graph = any(tap.in_graph for tap in self._attached)
        refusals.check_graph(self._method, self._denoiser, self.executor.in_graph)

    def detach(self) -> None:
        """Take everything off, also what stands already."""
        self.executor.step_in()
        for tap in reversed(self._attached):
            tap.detach()

    def attach_anew(self) -> None:
        """Put everything on the network as it is now, which may have other modules."""
        self.detach()
        self._make()
        self.attach()

    def stands(self, between: bool) -> bool:
        """Whether all is still in place.

        Args:
            between: whether no generation is under way. Within one only what is cheap to tell is looked at: a tap that is
                displaced shows by a site that isn't reached, but in a compiled graph.
        """
        stand = self._surroundings.stand(between)
        if between:
            self.executor.step_in()
            if (
                self.executor.in_graph
            ):  # refused when it was put on or compiled, and again by whoever goes on regardless
                refusals.check_graph(self._method, self._denoiser, in_graph=True)
        if between or self.executor.in_graph:
            stand = stand and all(tap.stands for tap in self._attached)
        return stand

    @property
    def taps_stand(self) -> bool:
        """Whether the taps are still in place."""
        return all(tap.stands for tap in self.taps)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """The network for a while as if nothing was on it, to be copied.

        Raises:
            EngineError: another library's hooks are around something that is put on it.
        """
        self.executor.step_in()
        try:
            if not all(tap.step_aside() for tap in reversed(self._attached)):
                raise not_copied("a denoiser with another library's hooks around what sostenuto replaced")
            yield
        finally:
            for tap in self._attached:
                tap.step_in()

    def reset(self) -> None:
        """Drop what the taps hold of a call."""
        for tap in self.taps:
            tap.reset()
