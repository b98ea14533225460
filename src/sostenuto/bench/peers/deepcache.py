"""DeepCache's own package as a peer, for U-Nets."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from sostenuto import compat
from sostenuto.bench.peers.base import Peer
from sostenuto.bench.peers.follower import Follower
from sostenuto.unet import is_unet


@dataclass(frozen=True)
class DeepCachePeer(Peer):
    """DeepCache: all of a U-Net beyond one of its skip connections is computed every few steps.

    The helper reads the timestep from the second positional argument of the U-Net's call, as Stable Diffusion's pipelines pass
    it, and looks it up among the scheduler's.

    Attributes:
        cache_interval: steps from one computed step to the next. The library's default is 1, which caches nothing.
        cache_branch_id: the skip connection, 0 is the outermost.
        skip_mode: the library's only one that it documents.
    """

    cache_interval: int = 3
    cache_branch_id: int = 0
    skip_mode: str = "uniform"

    kind: ClassVar[str] = "deepcache"
    library: ClassVar[str] = "DeepCache"
    distribution: ClassVar[str] = "DeepCache"

    def _unfit(self, target: Any, denoiser: nn.Module) -> str | None:
        if not is_unet(denoiser):
            return f"it caches U-Nets, and a {type(compat.unwrapped(denoiser)).__name__} is none"
        if isinstance(target, nn.Module):
            return "it needs a pipeline, whose scheduler tells it the step"
        return None

    def _attach(self, target: Any, num_inference_steps: int, stack: ExitStack) -> None:
        from DeepCache import DeepCacheSDHelper

        helper = DeepCacheSDHelper(pipe=target)
        helper.set_params(
            cache_interval=self.cache_interval, cache_branch_id=self.cache_branch_id, skip_mode=self.skip_mode
        )
        stack.callback(helper.disable)
        helper.enable()

        def reset() -> None:  # its own reset_states also forgets what it wrapped
            helper.cached_output, helper.start_timestep = {}, None

        Follower(target.unet, target, num_inference_steps, reset).follow(stack)
