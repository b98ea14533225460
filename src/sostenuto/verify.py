"""Proof on the user's own model that what is reused is exact and that what ran is what the plan says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from sostenuto import compat
from sostenuto.anatomy import SiteKind
from sostenuto.clock import Tick
from sostenuto.counting import MacCounter
from sostenuto.engine import Handle, attach
from sostenuto.errors import SostenutoError, VerificationError
from sostenuto.methods import by_name
from sostenuto.methods.base import Method
from sostenuto.plan import Action, Op
from sostenuto.probe import Prober
from sostenuto.progress import progress
from sostenuto.sites import Site, has_stack, inspect, stack
from sostenuto.stats import Record
from sostenuto.unet import is_unet


class _Everything(Method):
    """Taps all branches of a transformer, and besides them the stack of its blocks where that can be skipped.

    Of the stack, and of blocks that are their own branch, the output is kept, not the residual, which would bring the output
    back but for rounding.
    """

    def sites(self, denoiser: nn.Module) -> list[Site]:
        found = [replace(site, residual=False) for site in inspect(denoiser)]
        return [*found, stack(denoiser, residual=False)] if has_stack(denoiser) else found


def verify(
    target: Any,
    method: str | Method = "none",
    sample: Callable[..., Any] | None = None,
    *,
    scheduler: Any = None,
    num_inference_steps: int | None = None,
    show_progress: bool = False,
) -> dict[str, Any]:
    """Prove on this model that caching is exact, and that the method's plan is what runs.

    At the first denoiser call of a generation it checks that an all-computed call equals the stock model's bit for bit, and
    that with identical inputs the reuse of every site, of all attention, of all MLPs, of all branches and of the whole stack
    of blocks gives the identical output while the multiply-accumulates counted in the real run are those of the plan. Then it
    runs ``method`` and compares the actions carried out with its plan.

    Args:
        target: the pipeline, or its denoiser (then with ``scheduler``). Nothing may be enabled on it.
        method: the method to run in the second part.
        sample: runs one generation: ``sample(pipe, generator, num_inference_steps=…)``.
        scheduler: for a bare denoiser.
        num_inference_steps: steps of the generations, 2 or more; by default those of the method's table, of a method
            without one 4, and 12 where it skips nothing in 4.
        show_progress: whether to show a progress bar over the sites.

    Returns:
        ``{"sites": …, "passes": …, "steps": …, "macs": …}``: how much was proved, and the share of the multiply-accumulates
        that is left when ``"attention"``, ``"mlp"``, ``"branches"`` or ``"stack"`` are reused.

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
            tapped = [site for site in prober.handle.sites if site.kind is not SiteKind.BLOCKS]
            proved.update(sites=len(tapped), macs=_prove_call(prober, show_progress))
        return prober.run([Op.COMPUTE] * len(prober.handle.sites))

    # Everything in a transformer; of a U-Net, whose branches aren't known, what the method taps.
    tapped = method if is_unet(compat.find_denoiser(target)) else _Everything()
    with attach(target, tapped, scheduler=scheduler) as handle:
        handle.driver = prove
        sample(target, torch.Generator().manual_seed(0), num_inference_steps=num_inference_steps or _FEW)
        if not proved:
            raise VerificationError("sample never called the denoiser: does it use the pipeline that it is given?")
    with attach(target, method, scheduler=scheduler) as handle:
        steps = num_inference_steps or handle.method.num_inference_steps
        lengths = (_FEW, _MORE) if handle.method.skips else (_FEW,)
        for tried in (steps,) if steps else lengths:
            sample(target, torch.Generator().manual_seed(0), num_inference_steps=tried)
            record = handle._record
            assert record is not None
            _prove_plan(handle, record)
            proved.update(steps=len(record.passes), passes=record.num_passes)
            if any(op.action is not Action.COMPUTE for *_, carried in record.calls for op in carried.ops):
                break
    return proved


_FEW, _MORE = 4, 12  # steps that show what a method does; some begin to skip only after a few
_ROUNDED = 1e-3  # of the largest value


def _prove_call(prober: Prober, show_progress: bool) -> dict[str, float]:
    sites = prober.handle.sites
    stock = compat.first_tensor(_stock(prober))
    for name, op in (("computed", Op.COMPUTE), ("stored", Op.STORE)):
        if not torch.equal(compat.first_tensor(prober.run([op] * len(sites))), stock):
            raise VerificationError(f"with every site {name} the output differs from the stock model's")
    groups, shares = list(_groups(sites)), {}
    with progress(total=len(groups), desc="verify", show=show_progress) as bar:
        for name, members in groups:
            shares[name] = _prove_reuse(prober, stock, name, members)
            bar.update()
    return {name: shares[name] for name in ("attention", "mlp", "branches", "stack") if name in shares}


def _prove_reuse(prober: Prober, stock: torch.Tensor, name: str, members: Sequence[int]) -> float:
    """The share of the call's multiply-accumulates that is left where these sites are reused."""
    sites, cost = prober.handle.sites, prober.cost()
    ops = _reuse(sites, members)
    try:
        output, macs = _counted(prober, ops)
    except SostenutoError:
        raise
    except Exception as error:  # as where a norm declared in front is read by somebody else
        raise VerificationError(
            f"{name}: reused with identical inputs, the network fails ({error}): check front and hollow of its Branch"
        ) from error
    # A clean sample that is turned back into a prediction is rounded twice.
    rounded = _ROUNDED * stock.abs().max().item() if any(sites[index].clean for index in members) else 0.0
    if not torch.allclose(output, stock, rtol=0.0, atol=rounded):
        gap = (output - stock).abs().max().item()
        raise VerificationError(f"{name}: reused with identical inputs, the output is off by {gap:.3g}")
    # A dry run takes long, and of one branch alone it mostly tells the sum.
    if len(members) != 1 or macs != cost.macs - cost.site_macs[members[0]]:
        expected = prober.handle.count(prober.call.signature, ops)
        if macs != expected:
            raise VerificationError(f"{name}: reuse ran {macs} multiply-accumulates where the plan says {expected}")
    return macs / cost.macs


def _groups(sites: Sequence[Site]) -> Iterator[tuple[str, list[int]]]:
    """What is reused together: the sites' indices, by name."""
    branches = [index for index, site in enumerate(sites) if site.kind is not SiteKind.BLOCKS]
    yield from ((sites[index].id, [index]) for index in branches)
    yield "attention", [index for index in branches if sites[index].kind.is_attention]
    yield "mlp", [index for index in branches if sites[index].kind is SiteKind.MLP]
    yield "branches", branches
    if len(branches) < len(sites):
        yield "stack", [len(branches)]


def _reuse(sites: Sequence[Site], members: Sequence[int]) -> list[Op]:
    """Reuse of some sites; what lies within one of them is not reached."""
    covered = [any(sites[member].covers(site) for member in members) for site in sites]
    return [Op.SKIP if within else Op.REUSE if index in members else Op.COMPUTE for index, within in enumerate(covered)]


def _stock(prober: Prober) -> Any:
    """The output without any of our replacements."""
    prober.handle._mount.detach()
    try:
        return prober.call.run()
    finally:
        prober.handle._mount.attach()


def _counted(prober: Prober, ops: Sequence[Op]) -> tuple[torch.Tensor, int]:
    """Output, and multiply-accumulates of the run."""
    with MacCounter() as counter:
        output = compat.first_tensor(prober.run(ops))
    return output, counter.macs


def _prove_plan(handle: Handle, record: Record) -> None:
    plan, sites = handle._plan, handle.sites
    if plan is None:
        return
    before: dict[int, tuple[int, Sequence[Any]]] = {}
    for step, pass_index, number, carried in record.calls:
        outputs = handle._dry_runs.cost(number).site_outputs
        # Where a pass begins (image to image in the middle), or goes on with another batch, it computes what it keeps.
        begins = pass_index not in before or before[pass_index][0] != step - 1 or before[pass_index][1] != outputs
        before[pass_index] = step, outputs
        left_out = [site for site, output in zip(sites, outputs, strict=True) if output is None]
        for site, action, op in zip(sites, plan.actions[step], carried.ops, strict=True):
            computes, is_free = op.action is Action.COMPUTE, begins or any(one.covers(site) for one in left_out)
            if computes != (action is Action.COMPUTE) and not (computes and (is_free or site in left_out)):
                raise VerificationError(f"{site.id}: step {step} was to {action.value}, but it did {op.action.value}")
