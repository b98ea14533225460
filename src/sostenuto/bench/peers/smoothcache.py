"""dit-smoothcache as a peer: SmoothCache's helper with a schedule of its own format."""

from __future__ import annotations

import json
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

from torch import nn

from sostenuto import compat
from sostenuto.bench.peers.base import Peer
from sostenuto.bench.peers.follower import Follower
from sostenuto.errors import AnatomyError, InputError
from sostenuto.sites import inspect


@dataclass(frozen=True)
class SmoothCachePeer(Peer):
    """SmoothCache: each kind of branch is computed or taken from the cache by a schedule.

    The published package lacks the calibration that makes such schedules. Without one, branches are computed every ``interval``
    steps, as in the FORA schedules that the project ships. The helper prints a line at each module call; that is silenced, so
    its time doesn't count.

    Attributes:
        interval: steps from one computed step to the next.
        schedule: a JSON file in the library's format, ``{"attn1": [1, 0, …], "ff": […]}``, 1 where it is computed.
        components: the modules of each block that are wrapped; ``None``: every module that a residual branch ends with.
    """

    interval: int = 2
    schedule: str | None = None
    components: tuple[str, ...] | None = None

    kind: ClassVar[str] = "dit-smoothcache"
    library: ClassVar[str] = "dit-smoothcache"
    distribution: ClassVar[str] = "dit-smoothcache"

    def _unfit(self, target: Any, denoiser: nn.Module) -> str | None:
        try:
            sites = inspect(denoiser)
        except AnatomyError as error:
            return str(error)
        often = next((site.id for site in sites if site.calls > 1 or site.optional), None)
        if often is not None:
            return f"it counts steps by the calls of each module, and {often} isn't called once in every step"
        network = compat.unwrapped(denoiser)
        blocks, components = self._wrapped(network)
        for path, block in network.named_modules():
            absent = [name for name in components if isinstance(block, blocks) and getattr(block, name, block) is None]
            if absent:
                return f"it wraps {absent[0]} of every block, which {path} has as None"
        return None

    def _wrapped(self, denoiser: nn.Module) -> tuple[tuple[type[nn.Module], ...], tuple[str, ...]]:
        """The classes of blocks, and the names of their modules."""
        paths = [site.id.rpartition(".") for site in inspect(denoiser)]
        blocks = dict.fromkeys(type(denoiser.get_submodule(block)) for block, _, _ in paths)
        return tuple(blocks), self.components or tuple(dict.fromkeys(name for _, _, name in paths))

    def _remedy(self) -> str:
        return "name modules that its blocks have as components"

    def _attach(self, target: Any, num_inference_steps: int, stack: ExitStack) -> None:
        with redirect_stdout(StringIO()):  # it prints what it couldn't import
            from SmoothCache import SmoothCacheHelper, smooth_cache_helper

        stack.enter_context(patch.object(smooth_cache_helper, "print", lambda *_: None, create=True))
        for caller in compat.find_denoisers(target).values():
            denoiser = compat.unwrapped(caller)
            blocks, components = self._wrapped(denoiser)
            helper = SmoothCacheHelper(
                denoiser, list(blocks), list(components), self._schedule(components, num_inference_steps)
            )
            stack.callback(helper.disable)
            helper.enable()
            Follower(caller, target, num_inference_steps, helper.reset_state).follow(stack)

    def _schedule(self, components: tuple[str, ...], num_inference_steps: int) -> dict[str, list[int]]:
        if self.schedule is None:
            return {
                name: [int(step % self.interval == 0) for step in range(num_inference_steps)] for name in components
            }
        try:
            loaded = json.loads(Path(self.schedule).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise InputError(f"{self.schedule} is no SmoothCache schedule: {error}") from None
        if not isinstance(loaded, dict):
            raise InputError(f"{self.schedule} is no SmoothCache schedule: it must map components to lists of 0 and 1")
        return loaded
