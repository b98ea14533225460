"""Multiply-accumulates and bytes of a method on a network without its weights: large models on small machines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from sostenuto.bench.cases import UNCACHED, Case
from sostenuto.bench.networks import network_of
from sostenuto.bench.rows import Row
from sostenuto.bench.specs import method_of
from sostenuto.bench.subjects import scheduler_like
from sostenuto.cost import Carried, TensorSpec
from sostenuto.engine import attach
from sostenuto.errors import InputError, MethodError
from sostenuto.features import leaves
from sostenuto.methods import Method, NoCache
from sostenuto.methods.base import Facts
from sostenuto.plan import Op, lower, peak_bytes

_REASON = "counted without weights, nothing ran"
_WITHOUT_SCORES = "without what the scores cost by which tokens are chosen"


@dataclass(frozen=True)
class Dry:
    """What a generation would execute, step by step, and most bytes that it would keep."""

    step_macs: list[int]
    cache_bytes_peak: int
    lacks_scores: bool = False
    """Whether tokens are chosen by scores of features, whose cost isn't in ``step_macs``."""


def planned(
    denoiser: nn.Module, method: Method, scheduler: Any, num_inference_steps: int, inputs: dict[str, Any]
) -> Dry:
    """Count a generation of a method whose plan is known before the first step.

    Args:
        denoiser: the network; on the ``meta`` device it needs no memory.
        method: the method.
        scheduler: the scheduler.
        num_inference_steps: steps of the generation.
        inputs: keyword arguments of one call of the denoiser, tensors on the same device.

    Raises:
        MethodError: the method decides while the network runs.
    """
    scheduler.set_timesteps(num_inference_steps)
    with attach(denoiser, method, scheduler=scheduler) as handle:
        timesteps = tuple(float(timestep) for timestep in scheduler.timesteps)
        plan = handle.method.plan(Facts(handle.sites, timesteps, denoiser, scheduler))
        dry_run = handle._dry_runs[handle._dry_runs.number((), inputs)]
        if plan is None:
            if handle.method.skips:
                raise MethodError(
                    f"{type(method).__name__} decides while the network runs: it can't be counted without it"
                )
            return Dry([dry_run.cost.macs] * num_inference_steps, 0)
        program, cost = lower(plan), dry_run.cost
        steps = [
            dry_run.macs(carried(ops, plan.ratios[step] if plan.ratios else (), cost.site_outputs))
            for step, ops in enumerate(program.ops)
        ]
        peak = peak_bytes(program, plan.num_slots, cost.output_bytes, cost.residual_bytes)
        return Dry(steps, peak, bool(handle.method.observed(denoiser)))


def carried(ops: Sequence[Op], ratios: Sequence[float], outputs: Sequence[Any]) -> Carried:
    """What a step with these ops carries out: of partial sites how many tokens; where that is none the output is reused."""
    if Op.PARTIAL not in ops:
        return Carried(tuple(ops))
    kept = (next(leaves(output, TensorSpec), None) for output in outputs)  # of a pair the branch's output is the first
    num_tokens = [
        int(ratio * output.shape[1]) if op == Op.PARTIAL and output is not None and len(output.shape) == 3 else 0
        for op, ratio, output in zip(ops, ratios, kept, strict=True)
    ]
    done = (Op.REUSE if op == Op.PARTIAL and not n else op for op, n in zip(ops, num_tokens, strict=True))
    return Carried(tuple(done), tuple(num_tokens))


def count(case: Case, row: Row) -> Row:
    """The row of a case that is only counted.

    Raises:
        InputError: the model is no benchmark network.
    """
    network = network_of(case.model)
    if network is None:
        raise InputError(f"{case.model} can't be counted without running it: only the benchmark networks can")
    scheduler = scheduler_like(case.scheduler or network.scheduler)
    denoiser = network.build("meta")
    batch = case.batch_size or network.batch_size
    inputs = network.inputs(network, batch, torch.Generator().manual_seed(0)) | {"timestep": torch.zeros(batch)}
    inputs = {name: _bare(value) for name, value in inputs.items()}
    steps = case.num_inference_steps

    def of(text: str, num_steps: int) -> Dry:
        method = NoCache() if text == UNCACHED else method_of(text, num_steps)
        return planned(denoiser, method, scheduler, num_steps, inputs)

    own, other = of(case.method, steps), of(case.baseline, case.baseline_steps or steps)
    macs, baseline = sum(own.step_macs), sum(other.step_macs)
    counted = replace(
        row,
        scheduler=type(scheduler).__name__,
        batch_size=batch,
        macs=macs,
        baseline_macs=baseline,
        ideal_speedup=baseline / macs,
        step_macs=own.step_macs,
        baseline_step_macs=other.step_macs,
        cache_bytes_peak=own.cache_bytes_peak,
    )
    without = {"macs": _WITHOUT_SCORES} if own.lacks_scores else {}
    return replace(counted, missing=dict.fromkeys(counted.blank, _REASON) | without)


def _bare(value: Any) -> Any:
    return value.to("meta") if isinstance(value, torch.Tensor) else value
