"""How one of diffusers' caches is put on a network: blocks made known, hooks applied, contexts and resets looked after."""

from __future__ import annotations

import importlib
from abc import abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from sostenuto import compat
from sostenuto.anatomy import Anatomy, BlockList
from sostenuto.bench.peers.base import Peer
from sostenuto.bench.peers.follower import Follower, context_setter, resetter
from sostenuto.errors import AnatomyError
from sostenuto.sites import anatomy_of

STREAMS = ("hidden_states", "encoder_hidden_states")
"""The arguments that diffusers' caches look for in a block."""


@dataclass(frozen=True)
class DiffusersCache(Peer):
    """Base of them: a configuration and the function that applies it, which also works on models without ``enable_cache``."""

    library: ClassVar[str] = "diffusers"
    distribution: ClassVar[str] = "diffusers"
    config_name: ClassVar[str] = ""
    apply_name: ClassVar[str] = ""
    wants_context: ClassVar[bool] = True
    wants_steps: ClassVar[bool] = False
    wants_blocks: ClassVar[bool] = False
    """Whether it looks up what the blocks return."""

    def _unfit(self, target: Any, denoiser: nn.Module) -> str | None:
        hooks = importlib.import_module("diffusers.hooks")
        if not (hasattr(hooks, self.config_name) and hasattr(hooks, self.apply_name)):
            return f"diffusers {self.version()} has no {self.config_name}"
        anatomy = known_anatomy(denoiser)
        if not self.wants_blocks or anatomy is None:
            return None
        if not seen_lists(anatomy):
            paths = ", ".join(place.path for place in anatomy.blocks)
            return f"its blocks are in {paths}, where diffusers' caches don't look for any"
        if anatomy.interleaved:
            return "two lists of its blocks run in turn on tokens laid out in different ways, and one residual is kept"
        return None

    def _attach(self, target: Any, num_inference_steps: int, stack: ExitStack) -> None:
        hooks = importlib.import_module("diffusers.hooks")
        for caller in compat.find_denoisers(target).values():
            denoiser = compat.unwrapped(caller)
            if self.wants_blocks:
                _register_blocks(denoiser, stack)
            followers: list[Follower] = []
            config = getattr(hooks, self.config_name)(
                **self._options(denoiser, num_inference_steps, lambda known=followers: known[0])
            )
            kept = compat.diffusers_hooks(denoiser)
            stack.callback(compat.renew_diffusers_hooks, denoiser)
            stack.callback(compat.remove_diffusers_hooks, denoiser, kept)
            getattr(hooks, self.apply_name)(denoiser, config)
            compat.renew_diffusers_hooks(denoiser)
            tell = context_setter(denoiser, self.wants_steps) if self.wants_context else None
            followers.append(Follower(caller, target, num_inference_steps, resetter(denoiser), tell))
            followers[0].follow(stack)

    @abstractmethod
    def _options(
        self, denoiser: nn.Module, num_inference_steps: int, follower: Callable[[], Follower]
    ) -> dict[str, Any]:
        """What its configuration is made with."""


def _register_blocks(denoiser: nn.Module, stack: ExitStack) -> None:
    """Tell diffusers of blocks that it doesn't know, from what is known of the network here."""
    for place in seen_lists(known_anatomy(denoiser)):
        for block_class in {type(block) for block in denoiser.get_submodule(place.path).children()}:
            usual = len(place.streams) == 1 or place.streams == STREAMS
            if usual and not compat.block_is_registered(block_class):
                stack.callback(compat.register_block(block_class, place.streams, place.returns or place.streams))


def known_anatomy(denoiser: nn.Module) -> Anatomy | None:
    """What is known of a network here, if anything."""
    try:
        return anatomy_of(denoiser)
    except AnatomyError:
        return None  # the library says itself what it misses


def seen_lists(anatomy: Anatomy | None) -> tuple[BlockList, ...]:
    """The lists of blocks that diffusers' caches look at."""
    names = compat.block_lists_of_diffusers()
    return () if anatomy is None else tuple(place for place in anatomy.blocks if place.path in names)
