"""The processes that make one generation together (they split its tokens or its weights): which are they, do they agree?"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from sostenuto.errors import EngineError, MethodError
from sostenuto.plan import Action, Plan

_GROUPS: ContextVar[tuple[Any, ...]] = ContextVar("groups", default=())


@contextmanager
def sharded_over(group: Any) -> Iterator[None]:
    """Take the processes of a group for ones that make one generation together, each with an equal part of the tokens.

    Signals are measured over all of them, so that methods that decide while they run decide alike, and their plans are
    compared when a generation begins. A denoiser under diffusers' context parallelism, and one whose weights are ``DTensor``
    (tensor parallelism, ``fully_shard``), needs nothing: its processes are found. Around the calls of one that shards its
    tokens by other means every process of the group enters this.

    Args:
        group: a process group of ``torch.distributed``, or ``None`` for one process.
    """
    with over(() if group is None else (group,)):
        yield


@contextmanager
def over(groups: Sequence[Any]) -> Iterator[None]:
    """The same for several groups, such as those of the dimensions of a mesh."""
    token = _GROUPS.set(tuple(groups))
    try:
        yield
    finally:
        _GROUPS.reset(token)


def current_groups() -> tuple[Any, ...]:
    """The groups of :func:`sharded_over`."""
    return _GROUPS.get()


def token_groups(denoiser: nn.Module) -> tuple[Any, ...]:
    """The processes among which a denoiser's tokens are split: those of :func:`sharded_over`, or of context parallelism."""
    config = getattr(getattr(denoiser, "_parallel_config", None), "context_parallel_config", None)
    mesh = getattr(config, "_flattened_mesh", None)
    found = () if mesh is None or mesh.size() == 1 else (mesh.get_group(),)
    return current_groups() or found


def weight_groups(denoiser: nn.Module) -> tuple[Any, ...]:
    """The processes among which a denoiser's weights are split, as far as they are ``DTensor``."""
    if not (dist.is_available() and dist.is_initialized()):
        return ()
    from torch.distributed.tensor import DTensor

    meshes = {parameter.device_mesh for parameter in denoiser.parameters() if isinstance(parameter, DTensor)}
    groups = {group.group_name: group for mesh in meshes for group in mesh.get_all_groups() if group.size() > 1}
    return tuple(groups[name] for name in sorted(groups))


def groups_of(denoiser: nn.Module) -> tuple[Any, ...]:
    """All processes that make one generation of a denoiser together, as groups; nothing for one process."""
    groups = {group.group_name: group for group in (*token_groups(denoiser), *weight_groups(denoiser))}
    return tuple(groups.values())


def digest(*decided: Any) -> int:
    """62 bits of what was decided: plain data, enumerations, and dataclasses by their fields; else by the type alone."""
    text = json.dumps(decided, default=_plain)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value) and not isinstance(value, type):
        return [type(value).__name__, *(getattr(value, field.name) for field in fields(value))]
    return type(value).__name__


def _numbers_of(method: Any) -> list[Any]:
    """The parameters of a method that are numbers; where its table lies may differ from machine to machine."""
    members = getattr(method, "methods", (method,))
    values = ([getattr(member, field.name) for field in fields(member)] for member in members)
    return [
        [type(member).__name__, *(value if _is_numeric(value) else "" for value in row)]
        for member, row in zip(members, values, strict=True)
    ]


def _is_numeric(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, tuple) and all(map(_is_numeric, value)))


_REFUSED = -1  # stands for the digest of a process that could not decide, so that the others don't wait for it in vain


@contextmanager
def deciding(denoiser: nn.Module, device: torch.device) -> Iterator[Agree]:
    """Around the decision of what a generation will do, by every process that takes part in it.

    What is yielded is to be told the decision. At the end the processes compare it, in one small collective: a plan known
    before the first step needs no other.

    Args:
        denoiser: the network.
        device: where the collective may have its data: that of the latents.

    Raises:
        MethodError: tokens would be chosen by a process that doesn't see all of them, or not all of what they are scored by.
        EngineError: the processes differ.
    """
    groups, mine = groups_of(denoiser), _REFUSED

    def agree(method: Any, plan: Plan | None, scores: bool, *others: Any) -> None:
        nonlocal mine
        if groups:
            _check_tokens(denoiser, method, plan, scores)
            mine = digest(plan, _numbers_of(method), others)

    try:
        yield agree
    finally:
        for group in groups:
            _check_same(group, mine, device)


Agree = Callable[..., None]


def _check_same(group: Any, mine: int, device: torch.device) -> None:
    extremes = torch.tensor([mine, -mine], dtype=torch.int64, device=device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    highest, lowest = extremes[0].item(), -extremes[1].item()
    if highest != lowest and mine != _REFUSED:
        reason = "one of them refused" if lowest == _REFUSED else "they have different plans"
        raise EngineError(
            f"the {group.size()} processes that make this generation together disagree, {reason}: give all of them the same "
            "method, table, scheduler and number of steps"
        )


def _check_tokens(denoiser: nn.Module, method: Any, plan: Plan | None, scores: bool) -> None:
    """Refuse to choose tokens where the processes would not choose the same as one of them alone."""
    if plan is None or all(Action.PARTIAL not in row for row in plan.actions):
        return
    if token_groups(denoiser):
        raise MethodError(
            f"{type(method).__name__} chooses among all tokens, of which a process sees only its part under context "
            "parallelism: use fresh_ratio=0, or a method that treats all tokens alike"
        )
    if scores and weight_groups(denoiser):
        raise MethodError(
            f"{type(method).__name__} scores tokens by attention, of which a process sees only its part of the heads under "
            'tensor parallelism: use selection="random"'
        )
