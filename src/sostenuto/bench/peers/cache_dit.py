"""cache-dit as a peer: DBCache, with and without TaylorSeer as its predictor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from sostenuto import compat
from sostenuto.bench.peers.base import Peer, Restored
from sostenuto.bench.peers.follower import Follower


@dataclass(frozen=True)
class DBCachePeer(Peer):
    """DBCache: the first blocks always run, and tell whether the ones behind them are skipped.

    A pipeline that the library knows by name is given to it whole. Of another one it is given the network, where it knows that,
    and is told of every new generation; the library's copy of the network's ``forward``, where it needs one, comes with it.

    Attributes:
        Fn_compute_blocks: blocks in front that always run. The library's default is 8, which small networks don't have.
        Bn_compute_blocks: blocks behind that always run.
        residual_diff_threshold: bound of the relative change of what the front blocks add.
        max_warmup_steps: so many steps at the beginning are computed.
        max_cached_steps: most steps that are cached; −1: no bound.
        max_continuous_cached_steps: most of them in a row; −1: no bound.
        enable_separate_cfg: whether calls take turns between conditional and unconditional; ``None``: as the library knows of
            the pipeline. A bare denoiser is called once a step.
    """

    Fn_compute_blocks: int = 1
    Bn_compute_blocks: int = 0
    residual_diff_threshold: float = 0.08
    max_warmup_steps: int = 8
    max_cached_steps: int = -1
    max_continuous_cached_steps: int = -1
    enable_separate_cfg: bool | None = None

    kind: ClassVar[str] = "cache-dit"
    library: ClassVar[str] = "cache-dit"
    distribution: ClassVar[str] = "cache-dit"
    # Found by benchmarks/peer_support.py; ConsisID adds to what is between its blocks, which a residual then takes twice.
    wrong_on: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("AnyFlowFARTransformer3DModel", "ConsisIDTransformer3DModel"),
        "with identical inputs the network returns something else than without the cache (seen with cache-dit 1.5.3)",
    )

    def _unfit(self, target: Any, denoiser: nn.Module) -> str | None:
        import cache_dit

        network = compat.unwrapped(denoiser)
        register = cache_dit.BlockAdapterRegister
        if not (_takes_whole(target) or register.is_supported(network)):
            return f"cache-dit {self.version()} knows neither the pipeline nor a {type(network).__name__}"
        kept = self.Fn_compute_blocks + self.Bn_compute_blocks
        lengths = [len(child) for child in network.children() if isinstance(child, nn.ModuleList)]
        if lengths and max(lengths) <= kept:
            return (
                f"nothing is left to be skipped: {self.Fn_compute_blocks} blocks in front and {self.Bn_compute_blocks} behind "
                f"always run, and the network has {max(lengths)}; set Fn_compute_blocks=1"
            )
        return None

    def _hooks_something(self, before: Restored) -> bool:
        return True  # it replaces the list of blocks while the network runs, and refuses those that it doesn't know

    def _attach(self, target: Any, num_inference_steps: int, stack: ExitStack) -> None:
        if _takes_whole(target):
            stack.enter_context(_class_restored(type(target)))
            stack.callback(_forget_pipeline, target)
            self._enable(target, None, self.enable_separate_cfg, stack)
            return
        for caller in compat.find_denoisers(target).values():
            self._attach_network(target, caller, num_inference_steps, stack)

    def _attach_network(self, target: Any, caller: nn.Module, num_inference_steps: int, stack: ExitStack) -> None:
        import cache_dit
        from cache_dit.caching.block_adapters import FakeDiffusionPipeline

        denoiser = compat.unwrapped(caller)
        separate = False if target is caller and self.enable_separate_cfg is None else self.enable_separate_cfg
        stack.enter_context(_class_restored(FakeDiffusionPipeline))
        self._enable(denoiser, num_inference_steps, separate, stack)
        Follower(caller, target, num_inference_steps, lambda: cache_dit.refresh_context(denoiser)).follow(stack)

    def _enable(self, target: Any, num_inference_steps: int | None, separate: bool | None, stack: ExitStack) -> None:
        import cache_dit

        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=self.Fn_compute_blocks,
            Bn_compute_blocks=self.Bn_compute_blocks,
            residual_diff_threshold=self.residual_diff_threshold,
            max_warmup_steps=self.max_warmup_steps,
            max_cached_steps=self.max_cached_steps,
            max_continuous_cached_steps=self.max_continuous_cached_steps,
            enable_separate_cfg=separate,
            num_inference_steps=num_inference_steps,
        )
        stack.callback(cache_dit.disable_cache, target)
        cache_dit.enable_cache(target, cache_config=config, calibrator_config=self._calibrator())

    def _calibrator(self) -> Any:
        return None


@dataclass(frozen=True)
class DBCacheTaylorSeerPeer(DBCachePeer):
    """DBCache whose residual is forecast by a Taylor polynomial.

    Attributes:
        taylorseer_order: order of the polynomial.
    """

    taylorseer_order: int = 1

    kind: ClassVar[str] = "cache-dit-taylorseer"

    def _calibrator(self) -> Any:
        import cache_dit

        return cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=self.taylorseer_order)


def _takes_whole(target: Any) -> bool:
    import cache_dit

    return not isinstance(target, nn.Module) and cache_dit.BlockAdapterRegister.is_supported(target)


@contextmanager
def _class_restored(owner: type) -> Iterator[None]:
    """A pipeline's class as it was: the library replaces ``__call__`` there and marks the class as cached."""
    before = dict(vars(owner))
    try:
        yield
    finally:
        for name in vars(owner).keys() - before.keys():
            delattr(owner, name)
        if vars(owner).get("__call__") is not before.get("__call__"):
            setattr(owner, "__call__", before["__call__"])  # noqa: B010 (a class attribute)


def _forget_pipeline(pipeline: Any) -> None:
    for name in ("_context_manager", "_context_kwargs"):
        vars(pipeline).pop(name, None)


PEERS: tuple[type[Peer], ...] = (DBCachePeer, DBCacheTaylorSeerPeer)
