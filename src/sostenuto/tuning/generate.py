"""Generations with something looking on: how they ended, how strong the predicted noise was, how long they took."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from sostenuto import compat
from sostenuto.calibrations.base import Settings
from sostenuto.clock import Tick
from sostenuto.engine import Handle, attach
from sostenuto.errors import MethodError
from sostenuto.features import as_rows
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
        pauses: seconds between one denoiser call and the next.
        rows: rows of the denoiser's batch, of all of them.
        num_steps: steps that the scheduler lists.
        seconds: wall time.
        noise: state of the generator after the last of them.
        result: what ``sample`` returned last.
    """

    latents: list[torch.Tensor] = field(default_factory=list)
    norms: dict[int, list[float]] = field(default_factory=dict)
    pauses: list[float] = field(default_factory=list)
    rows: int = 0
    num_steps: int = 0
    seconds: float = 0.0
    noise: torch.Tensor | None = None
    result: Any = None


def generate(
    settings: Settings,
    stream: int,
    method: Method,
    drive: Drive | None = None,
    num_slots: int = 1,
    begun: Generated | None = None,
    after: Callable[[Generated], object] | None = None,
) -> Generated:
    """Generate ``settings.num_samples`` rows or more with a method.

    Args:
        settings: what is generated.
        stream: added to the seed.
        method: what is attached.
        drive: takes the place of the method's plan.
        num_slots: outputs that a site keeps for ``drive``.
        begun: what was generated before, to go on from.
        after: is told after every generation but the last.

    Raises:
        MethodError: a generation has another number of steps than asked for.
    """
    run = begun or Generated()
    noise = settings.fresh_generator().manual_seed(settings.seed + stream)
    if run.noise is not None:
        noise.set_state(run.noise)
    with attach(settings.target, method, scheduler=settings.scheduler) as handle:
        left: list[float] = []
        ran: set[int] = set()

        def driver(tick: Tick, prober: Prober) -> Any:
            if tick.step and left:
                run.pauses.append(time.perf_counter() - left[0])
            ran.add(tick.step)
            output = prober.follow() if drive is None else drive(handle, tick, prober)
            with contextlib.suppress(MethodError):  # a prediction whose noise is not known
                norm = prober.noise(output).float().flatten(1).square().mean(1).sqrt().mean()
                run.norms.setdefault(tick.step, []).append(float(norm))
            if tick.step == tick.num_steps - 1 and tick.pass_index == 0:
                latents = as_rows(prober.call.latents)
                run.latents.append(latents.detach().float().cpu().flatten(1))
                if run.latents[-1].shape[1] != run.latents[0].shape[1]:
                    raise MethodError(
                        "sample makes latents of several sizes, which can't be compared: give it one height, width and length"
                    )
                run.rows, run.num_steps = run.rows + prober.batch_size, tick.num_steps
            left[:] = [time.perf_counter()]
            return output

        handle.driver, handle.driver_slots = driver, num_slots
        device = compat.execution_device(handle._denoiser)
        began = time.perf_counter()
        while run.rows < settings.num_samples:
            before = run.rows
            ran.clear()
            run.result = settings.generate(noise)
            settings.check_steps(len(ran), run.num_steps if run.rows > before else None)
            if run.rows == before:
                raise MethodError("sample ended before the last step: it must run one whole generation")
            run.noise = noise.get_state()
            if after is not None and run.rows < settings.num_samples:
                after(run)
        compat.synchronize(device)  # what decodes the latents may still run
        run.seconds = time.perf_counter() - began
    return run
