"""Proof on the user's own model that what is reused is exact and that what ran is what the plan says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sostenuto import compat
from sostenuto.clock import Tick
from sostenuto.engine import Handle, enable
from sostenuto.errors import VerificationError
from sostenuto.methods import NoCache, by_name
from sostenuto.methods.base import Method
from sostenuto.plan import Action, Op
from sostenuto.probe import Prober
from sostenuto.unet import is_unet


def verify(
    target: Any,
    method: str | Method = "none",
    sample: Callable[..., Any] | None = None,
    *,
    scheduler: Any = None,
    num_inference_steps: int = 4,
) -> dict[str, Any]:
    """Prove on this model that caching is exact, and that the method's plan is what runs.

    At the first denoiser call of a generation it checks that an all-computed call equals the stock model's bit for bit, and
    that with identical inputs the reuse of every site, alone and all together, gives the identical output while the
    multiply-accumulates counted in the real run fall by exactly the site's share. Then it runs ``method`` and compares the
    actions carried out with its plan.

    Args:
        target: the pipeline, or its denoiser (then with ``scheduler``). Nothing may be enabled on it.
        method: the method to run in the second part.
        sample: runs one generation: ``sample(pipe, generator, num_inference_steps=…)``.
        scheduler: for a bare denoiser.
        num_inference_steps: steps of the generations, 2 or more; a method with a table needs the table's number.

    Returns:
        ``{"sites": …, "passes": …, "steps": …}``: how much was proved.

    Raises:
        VerificationError: naming the site at which it is not so.
    """
    if sample is None:
        raise VerificationError(
            "verify needs sample(pipe, generator, num_inference_steps=…): one generation of your own kind"
        )
    if isinstance(method, str):
        method = by_name(method)
    proved: dict[str, Any] = {}

    def prove(tick: Tick, prober: Prober) -> Any:
        if not proved:
            proved["sites"] = _prove_call(prober)
        return prober.run([Op.COMPUTE] * len(prober.handle.sites))

    # All branches of a transformer; of a U-Net, whose branches aren't known, what the method taps.
    tapped = method if is_unet(compat.find_denoiser(target)) else NoCache()
    with enable(target, tapped, scheduler=scheduler) as handle:
        handle.driver = prove
        sample(target, torch.Generator().manual_seed(0), num_inference_steps=num_inference_steps)
        if not proved:
            raise VerificationError("sample never called the denoiser: does it use the pipeline that it is given?")
    with enable(target, method, scheduler=scheduler) as handle:
        sample(target, torch.Generator().manual_seed(0), num_inference_steps=num_inference_steps)
        _prove_plan(handle)
        proved.update(steps=handle.stats.num_steps, passes=handle.stats.num_passes)
    return proved


def _prove_call(prober: Prober) -> int:
    sites = prober.handle.sites
    compute, store = [Op.COMPUTE] * len(sites), [Op.STORE] * len(sites)
    stock = compat.first_tensor(_stock(prober))
    for name, ops in (("computed", compute), ("stored", store)):
        if not torch.equal(compat.first_tensor(prober.run(ops)), stock):
            raise VerificationError(f"with every site {name} the output differs from the stock model's")
    cost = prober.cost()
    groups = [([index], site.id) for index, site in enumerate(sites)] + [
        (list(range(len(sites))), "all sites together")
    ]
    for members, name in groups:
        ops = [Op.REUSE if index in members else Op.COMPUTE for index in range(len(sites))]
        output, macs = _counted(prober, ops)
        if not torch.equal(output, stock):
            gap = (output - stock).abs().max().item()
            raise VerificationError(f"{name}: reused with identical inputs, the output is off by {gap:.3g}")
        expected = cost.macs - sum(cost.site_macs[index] for index in members)
        if macs != expected:
            raise VerificationError(f"{name}: reuse ran {macs} multiply-accumulates where the plan says {expected}")
    return len(sites)


def _stock(prober: Prober) -> Any:
    """The output without any of our replacements."""
    prober.handle._detach_taps()
    try:
        return prober.call.inner(*prober.call.args, **prober.call.kwargs)
    finally:
        prober.handle._attach_taps()


def _counted(prober: Prober, ops: Sequence[Op]) -> tuple[torch.Tensor, int]:
    """Output with the model's own attention kernel, and multiply-accumulates of a second run with the countable one."""
    output = compat.first_tensor(prober.run(ops))
    with ExitStack() as stack:
        counter = stack.enter_context(FlopCounterMode(display=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        prober.run(ops)
    return output, counter.get_total_flops() // 2


def _prove_plan(handle: Handle) -> None:
    plan = handle._plan
    if plan is None:
        return
    assert handle._record is not None
    first = min(step for step, *_ in handle._record.calls)  # image to image begins in the middle, and computes there
    for step, _, _, carried in handle._record.calls:
        for site, action, op in zip(handle.sites, plan.actions[step], carried.ops, strict=True):
            skipped = op.action is not Action.COMPUTE
            if skipped != (action is not Action.COMPUTE) and step != first:
                raise VerificationError(f"{site.id}: step {step} was to {action.value}, but it did {op.action.value}")
