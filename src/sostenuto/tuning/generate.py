"""Generations with something looking on: how they ended, how strong the predicted noise was, what they cost."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from sostenuto.calibrations.base import Settings
from sostenuto.clock import Tick
from sostenuto.engine import Handle, attach
from sostenuto.errors import MethodError
from sostenuto.features import leaves
from sostenuto.methods.base import Method
from sostenuto.probe import Prober

Drive = Callable[[Handle, Tick, Prober], Any]
"""Makes one denoiser call by the prober and returns its output."""


@dataclass
class Generated:
    """What generations left.

    Attributes:
        latents: what the last step of each was given ``[rows, values]``, in float32.
        norms: root mean square of the predicted noise by step, before it is scaled, one entry per call.
        works: of each its cost in uncached generations of one row.
        pauses: seconds between one denoiser call and the next.
        rows: rows of the denoiser's batch, of all of them.
        num_steps: steps that the scheduler lists.
        seconds: wall time.
        result: what ``sample`` returned last.
    """

    latents: list[torch.Tensor] = field(default_factory=list)
    norms: dict[int, list[float]] = field(default_factory=dict)
    works: list[float] = field(default_factory=list)
    pauses: list[float] = field(default_factory=list)
    rows: int = 0
    num_steps: int = 0
    seconds: float = 0.0
    result: Any = None

    @property
    def work(self) -> float:
        """The cost in uncached generations of one row."""
        return sum(self.works)


def generate(
    settings: Settings, stream: int, method: Method, drive: Drive | None = None, num_slots: int = 1
) -> Generated:
    """Generate ``settings.num_samples`` rows or more with a method.

    Args:
        settings: what is generated.
        stream: added to the seed.
        method: what is attached.
        drive: takes the place of the method's plan.
        num_slots: outputs that a site keeps for ``drive``.

    Raises:
        MethodError: a generation has another number of steps than asked for.
    """
    run = Generated()
    noise = settings.fresh_generator().manual_seed(settings.seed + stream)
    with attach(settings.target, method, scheduler=settings.scheduler) as handle:
        left: list[float] = []

        def driver(tick: Tick, prober: Prober) -> Any:
            if tick.step and left:
                run.pauses.append(time.perf_counter() - left[0])
            output = prober.follow() if drive is None else drive(handle, tick, prober)
            with contextlib.suppress(MethodError):  # a prediction whose noise is not known
                norm = prober.noise(output).float().flatten(1).square().mean(1).sqrt().mean()
                run.norms.setdefault(tick.step, []).append(float(norm))
            if tick.step == tick.num_steps - 1:
                _note_end(handle, tick, prober, run)
            left[:] = [time.perf_counter()]
            return output

        handle.driver, handle.driver_slots = driver, num_slots
        began = time.perf_counter()
        while run.rows < settings.num_samples:
            before = run.rows
            run.result = settings.generate(noise)
            ran = handle.stats.num_steps
            settings.check_steps(ran, run.num_steps if run.rows > before else None)
            if run.rows == before:
                raise MethodError(f"sample ran {ran} steps and ended before the last: it must run one whole generation")
        run.seconds = time.perf_counter() - began
    return run


def _note_end(handle: Handle, tick: Tick, prober: Prober, run: Generated) -> None:
    """Take down what the last step of a generation was given, and what the generation cost."""
    passes, rows = tick.pass_index + 1, prober.batch_size
    if tick.pass_index == 0:
        latents = next(leaves(prober.call.latents))
        run.latents.append(latents.detach().float().cpu().flatten(1))
        run.rows, run.num_steps = run.rows + rows, tick.num_steps
        run.works.append(0.0)
    run.works[-1] = handle.stats.macs / (prober.cost().macs * tick.num_steps * passes) * rows
