"""One generation by one process and by two that split the network's weights (gloo, CPU): same result, what time and memory?

    python benchmarks/parallel.py --json docs/results/parallel.json

Tensor parallelism of a DiT with random weights, one thread for each process. Both are run in turn, uncached and cached.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import time
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from diffusers import DDIMScheduler, DiTTransformer2DModel
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import sostenuto
from sostenuto import FORA, NoCache, TaylorSeer
from sostenuto.machine import machine

STEPS, SIZE, BATCH = 8, 2, 1
METHODS = {"uncached": NoCache(), "FORA N=2": FORA(2), "TaylorSeer N=3 O=1": TaylorSeer(interval=3, order=1)}


def network() -> DiTTransformer2DModel:
    """A DiT of 8 blocks, 256 channels wide, of 256 tokens."""
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=64, in_channels=4, num_layers=8, sample_size=32, patch_size=2
    ).eval().requires_grad_(False)  # fmt: skip


def split(model: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """Its heads and hidden channels over the processes."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (SIZE,))
    for block in model.transformer_blocks:
        columns = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "ff.net.0.proj")
        rows = ("attn1.to_out.0", "ff.net.2")
        plan = {name: ColwiseParallel() for name in columns} | {name: RowwiseParallel() for name in rows}
        parallelize_module(block, mesh, plan)
        block.attn1.heads //= SIZE
    return model


def generate(model: DiTTransformer2DModel, scheduler: DDIMScheduler) -> tuple[torch.Tensor, float]:
    """The latents of one generation, and its seconds."""
    latents = torch.randn(BATCH, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(BATCH)
    scheduler.set_timesteps(STEPS)
    began = time.perf_counter()
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            noise = model(latents, timestep.expand(BATCH), labels).sample[:, :4]
            latents = scheduler.step(noise, timestep, latents).prev_sample
    return latents, time.perf_counter() - began


def measure(rank: int, port: int, repeats: int, out: str) -> None:
    """One of the processes; the first one also runs by itself while the others wait."""
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=SIZE)
    whole, shared, rows = network(), split(network()), []
    for name, method in METHODS.items():
        times: dict[str, list[float]] = {"one": [], "two": []}
        scheduler_one, scheduler_two = DDIMScheduler(), DDIMScheduler()
        with (
            sostenuto.enable(whole, method, scheduler=scheduler_one) as alone,
            sostenuto.enable(shared, method, scheduler=scheduler_two) as together,
        ):
            for repeat in range(repeats + 1):  # the first one warms up
                if rank == 0:
                    expected, seconds = generate(whole, scheduler_one)
                    times["one"] += [seconds] * (repeat > 0)
                dist.barrier()
                found, seconds = generate(shared, scheduler_two)
                times["two"] += [seconds] * (repeat > 0)
            if rank == 0:
                one, two = alone.stats, together.stats
                row = {
                    "method": name,
                    "largest_difference": (expected - found).abs().max().item(),
                    "largest_value": expected.abs().max().item(),
                    "same_plan": one.plan == two.plan,
                    "wall_s_one": median(times["one"]),
                    "wall_s_two": median(times["two"]),
                    "speedup": median(a / b for a, b in zip(times["one"], times["two"], strict=True)),
                    "macs_one": one.macs,
                    "macs_each_of_two": two.macs,
                    "cache_bytes_one": one.cache_bytes_peak,
                    "cache_bytes_each_of_two": two.cache_bytes_peak,
                }
                rows.append(row)
                print(
                    f"{name:20} {row['wall_s_one']:6.2f} s by one, {row['wall_s_two']:6.2f} s by two ({row['speedup']:.2f}×), "
                    f"same plan: {row['same_plan']}, differs by {row['largest_difference']:.1e} of {row['largest_value']:.1f}",
                    flush=True,
                )
    if rank == 0:
        Path(out).write_text(
            json.dumps({"rows": rows, "steps": STEPS, "batch_size": BATCH, "machine": machine()}, indent=1) + "\n"
        )
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, default=Path("parallel.json"))
    options = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    mp.spawn(measure, (port, options.repeats, str(options.json)), nprocs=SIZE)


if __name__ == "__main__":
    main()
