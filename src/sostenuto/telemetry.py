"""What servers want to know of each generation: a line in the log, a span for OpenTelemetry. Costs nothing until asked for."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sostenuto.errors import DependencyError, EngineError, SostenutoError
from sostenuto.methods.base import parts
from sostenuto.stats import Record, Statistics

if TYPE_CHECKING:
    from sostenuto.enabling import JointHandle
    from sostenuto.engine import Handle
    from sostenuto.switch import DisabledHandle

_log = logging.getLogger("sostenuto")


@dataclass(frozen=True)
class Generation:
    """One generation of one denoiser, as it is reported.

    Attributes:
        method: the classes of the method's parts, such as ``"FORA | Forecast"``.
        denoiser: the class of the network.
        num_steps: steps that were run.
        num_steps_planned: steps of the scheduler; more than were run where the generation was given up, began in the middle
            (image to image), or was served by several denoisers.
        num_passes: most passes in one step.
        seconds: from its first denoiser call to the end of its last, as Python saw it: kernels of an accelerator may still run.
        actions: for each kind of action how many times a site carried it out.
        cache_bytes_peak: most bytes of kept features at one time.
    """

    method: str
    denoiser: str
    num_steps: int
    num_steps_planned: int
    num_passes: int
    seconds: float
    actions: Mapping[str, int]
    cache_bytes_peak: int
    _read: Callable[[], Statistics]

    def statistics(self) -> Statistics | None:
        """All of its statistics, to be asked for when it is reported; ``None`` where they can't be had (any more).

        Multiply-accumulates are counted by a dry run for every kind of step, the first time that it occurs.
        """
        try:
            return self._read()
        except SostenutoError:
            return None

    def attributes(self) -> dict[str, str | int | float]:
        """The attributes of its span, all with the prefix ``sostenuto.``."""
        names = ("method", "denoiser", "num_steps", "num_steps_planned", "num_passes", "cache_bytes_peak")
        found: dict[str, str | int | float] = {name: getattr(self, name) for name in names}
        found |= {f"actions.{name}": count for name, count in self.actions.items()}
        stats = self.statistics()
        if stats is not None:
            found |= {name: getattr(stats, name) for name in ("macs", "macs_uncached", "ideal_speedup")}
        return {f"sostenuto.{name}": value for name, value in found.items()}

    def __str__(self) -> str:
        steps = f"{self.num_steps} of {self.num_steps_planned} steps"
        if self.num_steps == self.num_steps_planned:
            steps = f"{self.num_steps} steps"
        actions = ", ".join(f"{count} {name}" for name, count in self.actions.items() if count)
        size = f"{self.cache_bytes_peak / 2**20:.1f} MiB kept"
        return f"{self.method} on {self.denoiser}: {steps} in {self.seconds:.2f} s, {actions}, {size}"


class Reporter:
    """Tells of every generation of a handle when its last call is done, or where that can't be told, when the next begins.

    Nothing is done unless the logger ``sostenuto`` takes INFO or somebody listens.

    Args:
        handle: the handle.
    """

    def __init__(self, handle: Handle) -> None:
        self._handle = handle
        self._told: Record | None = None
        self.listeners: list[Callable[[Generation], None]] = []

    @property
    def _wanted(self) -> bool:
        asked = bool(self.listeners) or _log.isEnabledFor(logging.INFO)
        return asked and self._handle.driver is None  # a calibration's runs are no generations of the user's

    def called(self, step: int, num_steps: int) -> None:
        """A denoiser call is done."""
        record = self._handle._record
        if step + 1 < num_steps or record is None or not self._wanted:
            return
        # The last step is over after as many calls as the step before it had.
        calls = [at for at, *_ in record.calls]
        if step == 0 or calls.count(step) >= calls.count(step - 1):
            self.tell()

    def tell(self) -> None:
        """Tell of the generation under way, unless that was done or nobody wants to know."""
        record = self._handle._record
        if record is None or record is self._told or not record.calls or not self._wanted:
            return
        self._told = record

        def read() -> Statistics:
            if self._handle._record is not record:
                raise EngineError("its statistics are gone: the next generation has begun")
            return self._handle.stats

        generation = Generation(
            " | ".join(type(part).__name__ for part in parts(self._handle.method)),
            type(self._handle._denoiser).__name__,
            len(record.passes),
            record.num_steps,
            record.num_passes,
            record.ended - record.began,
            record.actions,
            record.bytes_peak,
            read,
        )
        if _log.isEnabledFor(logging.INFO):
            _log.info("%s", generation)
        for listener in self.listeners:
            listener(generation)


def trace(handle: Handle | JointHandle | DisabledHandle, tracer_provider: Any = None) -> None:
    """Make a span of OpenTelemetry for every generation of a handle, named ``sostenuto.generation``.

    It is a child of the span that is current when the generation ends, such as that of the request. Its attributes are
    those of :meth:`Generation.attributes`.

    Args:
        handle: what :func:`sostenuto.enable` returned; of a handle over several denoisers each makes a span of its own.
        tracer_provider: of OpenTelemetry; by default the global one.

    Raises:
        DependencyError: opentelemetry-api isn't installed.
    """
    try:
        from opentelemetry import trace as opentelemetry
    except ImportError:
        raise DependencyError(
            "spans need opentelemetry-api, which is not installed: pip install opentelemetry-api"
        ) from None
    tracer = opentelemetry.get_tracer("sostenuto", tracer_provider=tracer_provider)

    def span(generation: Generation) -> None:
        now = time.time_ns()
        start = now - int(generation.seconds * 1e9)
        attributes = generation.attributes()
        tracer.start_span("sostenuto.generation", start_time=start, attributes=attributes).end(end_time=now)

    handle.listen(span)
