"""What a step reuses: one state for all of it, or an action for each of its sites."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any

from sostenuto.anatomy import SiteKind
from sostenuto.errors import TableError
from sostenuto.plan import Action
from sostenuto.sites import Site


class StepState(Enum):
    """What a whole step reuses. The four states of FEB-Cache; EB-Cache (arXiv 2503.07120) has the first, second and fourth."""

    COMPUTE = "compute"
    REUSE_ATTENTION = "reuse-attn"
    REUSE_MLP = "reuse-mlp"
    REUSE_BOTH = "reuse-both"

    @property
    def groups(self) -> frozenset[str]:
        """The groups of branches that are reused: ``"attention"``, ``"mlp"``."""
        return _GROUPS[self]

    def skips(self, site: Site, include_cross: bool = True) -> bool:
        """Whether the branch at ``site`` is skipped in this state, where cross-attention is attention or else never is."""
        return self.skips_kind(site.kind) and (include_cross or site.kind is not SiteKind.CROSS_ATTENTION)

    def skips_kind(self, kind: SiteKind) -> bool:
        """Whether branches of this kind are skipped in this state; a fused one is both."""
        if kind is SiteKind.FUSED:
            return self is StepState.REUSE_BOTH
        return ("attention" if kind.is_attention else "mlp") in self.groups


_GROUPS = {
    StepState.COMPUTE: frozenset(),
    StepState.REUSE_ATTENTION: frozenset({"attention"}),
    StepState.REUSE_MLP: frozenset({"mlp"}),
    StepState.REUSE_BOTH: frozenset({"attention", "mlp"}),
}

StepActions = StepState | Mapping[str, Action]
_OF_SITES = tuple(action for action in Action if action not in (Action.PARTIAL, Action.SKIP))
"""What a table can say of a site: the others need tokens, or a larger site, that a table doesn't name."""


def check_state(state: object, step: int) -> None:
    """Refuse what is neither a state nor a map from site to action.

    Raises:
        TableError: with what it may be.
    """
    is_map = isinstance(state, Mapping) and all(action in _OF_SITES for action in state.values())
    if not isinstance(state, StepState) and not is_map:
        raise TableError(
            f"step {step} must be a StepState or a map from site to one of {_names(_OF_SITES)}, not {state!r}"
        )


def is_computed(state: StepActions) -> bool:
    """Whether nothing is reused in such a step."""
    if isinstance(state, StepState):
        return state is StepState.COMPUTE
    return all(action is Action.COMPUTE for action in state.values())


def read_state(entry: Any, step: int) -> StepActions:
    """What an entry of a file says of a step.

    Raises:
        TableError: with what is known.
    """
    try:
        if isinstance(entry, str):
            return StepState(entry)
        if isinstance(entry, dict):
            return {site: Action(action) for site, action in entry.items()}
    except ValueError:
        pass
    raise TableError(
        f"unknown action {entry!r} at step {step}; known are {_names(StepState)}, or a map from site to one of "
        f"{_names(_OF_SITES)}"
    )


def _names(choices: Iterable[StepState | Action]) -> str:
    return ", ".join(choice.value for choice in choices)
