"""What memory really holds: live tensors and objects over many generations, and kept features counted without the engine."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel
from torch._subclasses import FakeTensor

import sostenuto
from conftest import build_tiny
from sostenuto import (
    FORA,
    ABCache,
    CacheTable,
    DBCache,
    DeltaDiT,
    EBCache,
    NoCache,
    StepState,
    TaylorSeer,
    TeaCache,
    ToCa,
)

STEPS = 6
C, A, M, B = StepState
METHODS: dict[str, Callable[[], Any]] = {
    "branches": lambda: FORA(3),
    "branches, forecast": lambda: TaylorSeer(2, 2, 3),
    "table": lambda: EBCache(CacheTable((C, B, A, C, M, B)), eps_scale=0.98),
    "stack": lambda: EBCache(CacheTable((C, C, B, A, B, C), forecast_order=1, fill="stack")),
    "ranges": lambda: DeltaDiT(2, 3, 2),
    "output": lambda: ABCache(order=2, warmup=2, interval=3),
    "partial": lambda: ToCa(interval=3, fresh_ratio=0.25, middle_interval=None, selection="random"),
    "run-time decision": lambda: TeaCache(threshold=1.0),
    "run-time decision, forecast": lambda: DBCache(1, 1, 1.0, warmup=2, forecast_order=1, max_accumulated=1.5),
}


def build_wide() -> DiTTransformer2DModel:
    """A network whose features are large in comparison to its latents."""
    torch.manual_seed(0)
    network = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=64,
        in_channels=2,
        num_layers=3,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    return network.eval().requires_grad_(False)


@torch.no_grad()
def generate(network: Any, scheduler: Any, steps: int = STEPS, batch: int = 2, separate: bool = False) -> None:
    """The denoiser calls of one generation."""
    scheduler.set_timesteps(steps)
    labels = torch.arange(batch)
    for index, timestep in enumerate(scheduler.timesteps):
        noise = torch.Generator().manual_seed(index)
        latents = torch.randn(batch, 2, 8, 8, generator=noise)
        for conditioning in (labels, torch.full_like(labels, 10)) if separate else (labels,):
            network(latents, timestep.expand(batch), conditioning)


def live_tensors() -> Iterator[torch.Tensor]:
    """Every tensor that Python can reach, but for those that the collector was told to leave alone."""
    return (
        thing
        for thing in gc.get_objects()
        if issubclass(type(thing), torch.Tensor) and not isinstance(thing, FakeTensor)
    )


def live_bytes() -> int:
    """Of their storages, each once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in live_tensors()}
    return sum(storages.values())


def kept_bytes(network: Any, method: Any, separate: bool = False) -> tuple[list[int], Any]:
    """Bytes alive at the end of every call of a generation, and its handle."""
    seen: list[int] = []
    scheduler = DDPMScheduler()
    with sostenuto.enable(network, method, scheduler=scheduler) as handle:
        generate(network, scheduler, separate=separate)  # what is made once for all
        hook = network.register_forward_hook(lambda *_: seen.append(live_bytes()))
        gc.collect()
        gc.freeze()  # what there is already is left out of the count
        try:
            generate(network, scheduler, separate=separate)
        finally:
            hook.remove()
        stats, predicted = handle.stats, handle.predicted_cache_bytes
    return seen, (stats.cache_bytes_peak, predicted)


def peaks(separate: bool = False) -> dict[str, dict[str, Any]]:
    """Of each method: the peak that was counted, what the statistics and the prediction say."""
    rows = {}
    plain, _ = kept_bytes(build_wide(), NoCache(), separate)
    for name, make in METHODS.items():
        network = build_wide()
        seen, (stated, predicted) = kept_bytes(network, make(), separate)
        # Of calls that are spared nothing is seen; the others are the first, the second, … whatever the method.
        counted = max(seen) - min(
            plain[2:]
        )  # from the second step on, when the arguments of the first are held besides
        rows[name] = {"counted": counted, "stated": stated, "predicted": predicted, "ratio": counted / stated}
    return rows


def growth(generations: int, only: tuple[str, ...] | None = None, steps: int = STEPS) -> dict[str, dict[str, int]]:
    """Of each method: how many objects and tensors there are more after so many generations than after a few."""
    rows = {}
    for name, make in METHODS.items():
        if only is not None and name not in only:
            continue
        network, scheduler = build_tiny(), DDPMScheduler()
        with sostenuto.enable(network, make(), scheduler=scheduler):
            counts = []
            for count in (3, 6, generations):
                for index in range(count):
                    generate(network, scheduler, steps, batch=1 + index % 3, separate=index % 2 == 1)
                generate(network, scheduler, steps)  # ends as the others do
                gc.collect()
                counts.append((len(gc.get_objects()), sum(1 for _ in live_tensors()), live_bytes()))
            _, before, after = counts  # counting itself leaves some the first time
        rows[name] = {
            "objects_grown": after[0] - before[0],
            "tensors_grown": after[1] - before[1],
            "bytes_grown": after[2] - before[2],
        }
    return rows
