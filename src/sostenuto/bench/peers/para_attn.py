"""ParaAttention as a peer: the FirstBlockCache that diffusers' is a port of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from sostenuto import compat
from sostenuto.bench.peers.base import Peer, Restored
from sostenuto.bench.peers.follower import Follower


@dataclass(frozen=True)
class ParaAttn(Peer):
    """FirstBlockCache: all blocks but the first are skipped while what that one adds hardly changes.

    The library patches the pipeline's class for good; here its cache is put on the network, and every call is given the context
    that the patched pipeline would give it. It is in none of this package's extras, as its last
    release is older than this diffusers.

    Attributes:
        residual_diff_threshold: bound of the relative change.
        warmup_steps: so many steps at the beginning are computed.
        enable_alter_cache: whether calls take turns between conditional and unconditional.
        enable_taylorseer: whether the residual is forecast.
    """

    residual_diff_threshold: float = 0.12
    warmup_steps: int = 0
    enable_alter_cache: bool = False
    enable_taylorseer: bool = False

    kind: ClassVar[str] = "para-attn"
    library: ClassVar[str] = "ParaAttention"
    distribution: ClassVar[str] = "para-attn"
    # Found by benchmarks/peer_support.py.
    wrong_on: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(
            ("FluxTransformer2DModel", "Flux2Transformer2DModel", "HunyuanVideoTransformer3DModel"),
            "its blocks take other arguments in this diffusers than the library passes (seen with para-attn 0.3.38)",
        ),
        **dict.fromkeys(
            ("WanAnimateTransformer3DModel", "WanVACETransformer3DModel"),
            "with identical inputs the network returns something else than without the cache (seen with para-attn 0.3.38)",
        ),
    }

    def _hooks_something(self, before: Restored) -> bool:
        return True  # it replaces the list of blocks while the network runs, and refuses those that it doesn't know

    def _attach(self, target: Any, num_inference_steps: int, stack: ExitStack) -> None:
        from para_attn.first_block_cache import utils  # pyright: ignore[reportMissingImports]
        from para_attn.first_block_cache.diffusers_adapters import (  # pyright: ignore[reportMissingImports]
            apply_cache_on_transformer,
        )

        for caller in compat.find_denoisers(target).values():
            apply_cache_on_transformer(compat.unwrapped(caller))
            self._follow(utils, target, caller, num_inference_steps, stack)

    def _follow(self, utils: Any, target: Any, caller: nn.Module, num_inference_steps: int, stack: ExitStack) -> None:
        context: Any = None

        def reset() -> None:
            nonlocal context
            context = utils.create_cache_context(
                residual_diff_threshold=self.residual_diff_threshold,
                warmup_steps=self.warmup_steps,
                enable_alter_cache=self.enable_alter_cache,
                enable_taylorseer=self.enable_taylorseer,
            )

        def tell(_: Follower) -> Callable[[], None]:
            before = utils.get_current_cache_context()
            utils.set_current_cache_context(context)
            return lambda: utils.set_current_cache_context(before)

        Follower(caller, target, num_inference_steps, reset, tell).follow(stack)
