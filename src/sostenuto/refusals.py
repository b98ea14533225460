"""What can't work is refused in a sentence that says what was found and what to do."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from sostenuto.errors import EngineError, MethodError
from sostenuto.foreign import has_foreign_cache
from sostenuto.methods.base import Method, parts
from sostenuto.plan import Action
from sostenuto.tap import Tap


def check_gaps(method: Method) -> None:
    """A forecaster needs gaps to fill.

    Raises:
        MethodError: nothing is skipped.
    """
    for part in parts(method):
        if part.refines and not method.skips:
            raise MethodError(
                f"{type(part).__name__} fills the gaps that another method leaves: combine it with one that skips, such "
                f"as FORA(3) | {type(part).__name__}()"
            )


def check_graph(method: Method, denoiser: nn.Module, in_graph: bool) -> None:
    """A compiled network can't be looked into while it runs.

    Raises:
        MethodError: the method does so.
    """
    for part in parts(method):
        if in_graph and (not part.compiles or part.observed(denoiser)):
            raise MethodError(
                f"{type(part).__name__} looks at features while the network runs, which a compiled denoiser can't: use "
                "the denoiser uncompiled, or a method with a plan (and random tokens)"
            )


def check_neighbours(denoiser: nn.Module) -> None:
    """Two caches don't go together.

    Raises:
        MethodError: one of diffusers' own is enabled.
    """
    if has_foreign_cache(denoiser):
        raise MethodError(
            f"a cache of diffusers' own is enabled on this {type(denoiser).__name__}, and two caches don't go "
            "together: call its disable_cache(), or disable sostenuto"
        )


def check_taps(method: Method, taps: Sequence[Tap], actions: Sequence[Sequence[Action]]) -> None:
    """Every site can carry out what the plan wants of it.

    Raises:
        MethodError: one can't, or the plan is of other sites.
    """
    if actions and len(actions[0]) != len(taps):
        raise MethodError(
            f"the plan of {type(method).__name__} names {len(actions[0])} sites, it has {len(taps)}: give facts.sites in plan()"
        )
    for tap, column in zip(taps, zip(*actions, strict=True), strict=bool(actions)):
        odd = next((action for action in set(column) if not tap.can(action)), None)
        if odd is None:
            continue
        why = (
            "a table with such actions is for DiTFastAttn"
            if odd.changes_attention
            else "its tokens don't come out one by one as they go in"
        )
        raise MethodError(f"{type(method).__name__} can't carry out {odd.value!r} at {tap.site.id}: {why}")


def check_gradients(method: Method, denoiser: nn.Module) -> None:
    """Nothing is skipped in a call that autograd will repeat, or whose like are no steps of one sampling.

    Raises:
        EngineError: the network is in training mode, or its calls are repeated in the backward pass.
    """
    if denoiser.training:
        raise EngineError(
            f"{type(method).__name__} would skip in a call of a denoiser in training mode: disable sostenuto while it "
            "is trained, or call its eval() for sampling"
        )
    if getattr(denoiser, "is_gradient_checkpointing", False):
        raise EngineError(
            f"{type(method).__name__} would skip in a call that gradient checkpointing repeats, when what was kept is "
            "gone: use torch.no_grad(), or the denoiser's disable_gradient_checkpointing()"
        )


def displaced() -> EngineError:
    """The error of taps that are not in their places any more."""
    return EngineError(
        "modules of the denoiser were replaced, hooked or compiled in the middle of a generation (a LoRA loaded, "
        "offloading switched): do that between generations"
    )
