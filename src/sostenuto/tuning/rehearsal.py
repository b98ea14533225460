"""A rehearsal of a sample: what it does around the network, which hardly runs, to know it again and to know what it costs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from sostenuto import compat
from sostenuto.calibrations.base import Settings, Tapped
from sostenuto.calibrations.claims import Sketch
from sostenuto.clock import Tick
from sostenuto.cost import signature
from sostenuto.engine import Handle, scheduler_of
from sostenuto.plan import Op
from sostenuto.prediction import tells_clean_samples
from sostenuto.probe import Prober
from sostenuto.tuning.generate import generate
from sostenuto.tuning.instrument import macs_of
from sostenuto.tuning.measurement import Kind

_MOST_ROWS = 16  # of the final latents that are sketched


@dataclass(frozen=True)
class Rehearsal:
    """What one call of a ``sample`` is, whatever the network makes of it.

    Attributes:
        rows: of the denoiser's batch, of all its generations.
        num_steps: steps that the scheduler lists.
        work: what the rehearsal cost, in uncached generations of one row.
        macs: multiply-accumulates of a step of each kind, ``"compute"`` being 1.
        sketch: of what the network is given first, and of the final latents of the first rows.
        num_results: images, or what else the sample returned; ``None`` where that has no length.
        clean_samples: whether the scheduler, as it is set up for these steps, tells the clean sample in a prediction.
        score: what a score says of what came out; ``None`` without one, and where it has nothing to say of noise.
    """

    rows: int
    num_steps: int
    work: float = 0.0
    macs: Mapping[str, float] = field(default_factory=dict)
    sketch: Sketch = ()
    score: float | None = None
    num_results: int | None = None
    clean_samples: bool = False


def rehearse(settings: Settings, stream: int, tapped: Tapped, kinds: Sequence[Kind]) -> Rehearsal:
    """Run a sample's one call, with noise in place of what the network predicts; it runs once for every pass and shape.

    So guidance, sampler, sizes, labels and prompts show in what comes out, and the precision of the network doesn't.

    Args:
        settings: with the sample, and the score that is asked.
        stream: added to the seed.
        tapped: the sites that ``kinds`` are of.
        kinds: of reuse, to be counted.

    Raises:
        MethodError: the sample doesn't run the steps asked for.
    """
    outputs: dict[Any, Any] = {}
    sketch: list[tuple[float, float]] = []
    macs: dict[str, float] = {}
    rows: list[int] = []
    told: list[bool] = []  # whether the scheduler takes what the network predicts

    def drive(handle: Handle, tick: Tick, prober: Prober) -> Any:
        what = tick.pass_index, signature(prober.call.latents)
        if what not in outputs:
            outputs[what] = prober.run([Op.COMPUTE] * len(handle.sites))
            given = tree_leaves((prober.call.args, prober.call.kwargs))
            sketch.extend(_sketched(value) for value in given if isinstance(value, (torch.Tensor, int, float)))
            rows.append(prober.batch_size)
            told.append(prober.tells_noise)
            if not macs:
                macs.update(macs_of(prober, kinds) | {Kind.SAMPLE.value: 0.0})
        noise = torch.Generator().manual_seed(1000 * tick.step + tick.pass_index)
        return compat.map_prediction(outputs[what], lambda values: _noise_like(values, noise))

    run = generate(settings, stream, tapped, drive)
    sketch.extend(map(_sketched, torch.cat(run.latents)[:_MOST_ROWS]))
    said = None
    if settings.score is not None:
        with contextlib.suppress(Exception):  # pictures of noise may be nothing that it can judge
            said = float(settings.score(run.result))
    said = said if said is not None and math.isfinite(said) else None
    made = len(run.result) if hasattr(run.result, "__len__") else None
    tells = tells_clean_samples(scheduler_of(settings.target, settings.scheduler)) and all(told)
    return Rehearsal(run.rows, run.num_steps, sum(rows) / run.num_steps, macs, tuple(sketch), said, made, tells)


def _noise_like(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(values.shape, generator=generator).to(values.device, values.dtype)


def _sketched(given: torch.Tensor | float) -> tuple[float, float]:
    values = torch.as_tensor(given)
    values = torch.view_as_real(values) if values.is_complex() else values
    flat = values.detach().cpu().double().flatten().nan_to_num()
    direction = torch.randn(len(flat), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    size = max(1, len(flat)) ** 0.5
    return round(float(flat.norm()) / size, 6), round(float(flat @ direction) / size, 6)
