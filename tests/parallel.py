"""One of several processes that share a denoiser's tokens; run by ``test_parallel``."""

from __future__ import annotations

import json
import os
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import torch
import torch.distributed as dist
from diffusers import DDPMScheduler
from torch import nn

import sostenuto
from conftest import build_tiny, sample_loop
from sostenuto import (
    FORA,
    Anatomy,
    BlockList,
    Branch,
    CacheTable,
    DBCache,
    DuCa,
    EBCache,
    SiteKind,
    StepState,
    TeaCache,
    ToCa,
)
from sostenuto.zoo import TINY_MODELS

METHODS = {
    "fora": lambda: FORA(2),
    "teacache": lambda: TeaCache(threshold=0.3),
    "dbcache": lambda: DBCache(1, 0, 0.2, warmup=1),
}
OWN_METHODS = {"teacache": lambda: TeaCache(threshold=0.25), "dbcache": lambda: DBCache(1, 0, 0.15, warmup=1)}
STEPS = 8


def tiny_inputs(name, step):
    """The same conditioning at every step, latents that move more and more slowly; an even number of tokens of each kind."""
    timestep = 900.0 - 100 * step
    inputs = TINY_MODELS[name].inputs(timestep, torch.Generator().manual_seed(0))
    inputs["hidden_states"] = inputs["hidden_states"] * (1 + 0.5**step)
    if name.startswith("Flux"):
        inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"][:, :4]
        inputs["txt_ids"] = inputs["txt_ids"][:4]
    return timestep, inputs | {"return_dict": False}


def generate(model, name, method):
    scheduler = SimpleNamespace(timesteps=torch.tensor([900.0 - 100 * step for step in range(STEPS)]))
    outputs = []
    with torch.no_grad(), sostenuto.enable(model, method, scheduler=scheduler) as handle:
        for step in range(STEPS):
            outputs.append(model(**tiny_inputs(name, step)[1])[0])
        return torch.stack(outputs), [[row[0] for row in handle.stats.plan], handle.stats.cache_bytes_peak]


def parallelize(model):
    """What ``enable_parallelism`` does; itself it looks for an accelerator."""
    from diffusers import ContextParallelConfig
    from diffusers.hooks.context_parallel import apply_context_parallel
    from diffusers.models._modeling_parallel import ParallelConfig

    mesh = dist.device_mesh.init_device_mesh("cpu", mesh_shape=(1, 2), mesh_dim_names=("ring", "ulysses"))
    config = ParallelConfig(context_parallel_config=ContextParallelConfig(ulysses_degree=2, mesh=mesh))
    config.setup(dist.get_rank(), 2, torch.device("cpu"), mesh=mesh)
    model._parallel_config = config
    for module in model.modules():
        if hasattr(getattr(module, "processor", None), "_parallel_config"):
            module.processor._parallel_config = config
    apply_context_parallel(model, config.context_parallel_config, model._cp_plan)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, hidden_states):
        return hidden_states + torch.tanh(self.mix(self.norm(hidden_states)))


class Own(nn.Module):
    """A network that is given its part of the tokens."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(4))

    def forward(self, hidden_states, timestep):
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return hidden_states


def run_own(method, parts, part, group):
    """The part's output and what was decided, of tokens whose two halves change at different rates."""
    branch = Branch(SiteKind.SELF_ATTENTION, "mix", front=("norm",))
    sostenuto.register_anatomy(Own, Anatomy((BlockList("layers", (branch,), streams=("hidden_states",)),)))
    torch.manual_seed(0)
    model = Own().eval()
    latents, other = torch.randn(2, 2, 8, 8)
    rates = torch.cat([torch.full((4, 1), 0.9), torch.full((4, 1), 0.2)])
    scheduler = SimpleNamespace(timesteps=torch.tensor([900.0 - 100 * step for step in range(STEPS)]))
    outputs = []
    with torch.no_grad(), sostenuto.sharded_over(group), sostenuto.enable(model, method, scheduler=scheduler) as handle:
        for step in range(STEPS):
            now = latents + rates**step * other
            outputs.append(model(now.chunk(parts, dim=1)[part], scheduler.timesteps[step]))
        return torch.stack(outputs), [row[0] for row in handle.stats.plan]


def share_weights(model, mesh):
    """Megatron's split of a transformer: heads and hidden channels over the processes; every output is a plain tensor."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    for block in model.transformer_blocks:
        columns = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "ff.net.0.proj")
        plan = {
            **dict.fromkeys(columns, ColwiseParallel()),
            "attn1.to_out.0": RowwiseParallel(),
            "ff.net.2": RowwiseParallel(),
        }
        parallelize_module(block, mesh, plan)
        block.attn1.heads //= mesh.size()


def generate_dit(method, mesh=None, order="before", steps=6):
    """A guided generation of a tiny DiT, its weights split before or after the method is enabled."""
    model, scheduler = build_tiny(), DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    if mesh is not None and order == "before":
        share_weights(model, mesh)
    with sostenuto.enable(model, method, scheduler=scheduler) as handle:
        if mesh is not None and order == "after":
            share_weights(model, mesh)
        latents, outputs = sample_loop(model, scheduler, steps, separate_guidance=True)
        assert all(type(output) is torch.Tensor for output in outputs)
        stats = handle.stats
        return latents, [stats.as_dict()["plan"], stats.cache_bytes_peak, stats.macs / stats.macs_uncached]


@contextmanager
def counted_collectives():
    """How many all-reduces are asked for by name, as sostenuto does; torch's own tensor parallelism has another way."""
    count, plain = [0], dist.all_reduce

    def counting(*args, **kwargs):
        count[0] += 1
        return plain(*args, **kwargs)

    dist.all_reduce = counting
    try:
        yield count
    finally:
        dist.all_reduce = plain


def refusal(run):
    """The kind of the error and what it says, or what came out."""
    try:
        return ["", str(run())]
    except sostenuto.SostenutoError as error:
        return [type(error).__name__, str(error)]


class Unwilling(FORA):
    """Refuses in one process."""

    def plan(self, facts):
        if dist.get_rank() == 1:
            raise sostenuto.MethodError("process 1 has reasons of its own")
        return super().plan(facts)


def weights_and_agreement(rank):
    """Tensor parallelism, and what happens where processes differ."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    found = {}
    for label, method, order in (
        ("eb", EBCache(STATES, eps_scale=0.98), "after"),
        ("dbcache", DBCache(1, 0, 0.9, warmup=1), "before"),
        ("toca", ToCa(3, 0.5, "random", "constant", spatial_bonus=0.0), "before"),
    ):
        whole, facts = generate_dit(method)
        with counted_collectives() as count:
            shared, own = generate_dit(method, mesh, order)
        found[f"weights {label}"] = [(whole - shared).abs().max().item(), facts, own, count[0]]
    group, flux = dist.group.WORLD, TINY_MODELS["FluxTransformer2DModel"].build()
    parallelize(flux)
    found["refusals"] = {
        "differ": refusal(lambda: generate_dit(FORA(2 + rank), mesh)),
        "differ in tokens": refusal(lambda: generate_dit(ToCa(3, selection="random", seed=rank), mesh)),
        "differ at run time": refusal(lambda: run_own(DBCache(1, 0, 0.15 + rank, warmup=1), 2, rank, group)),
        "one refuses": refusal(lambda: generate_dit(Unwilling(2), mesh)),
        "scored tokens": refusal(lambda: generate_dit(ToCa(3), mesh)),
        "split tokens": refusal(lambda: generate(flux, "FluxTransformer2DModel", DuCa(3))),
        "no tokens": refusal(lambda: generate(flux, "FluxTransformer2DModel", DuCa(3, fresh_ratio=0.0))[1]),
    }
    return found


STATES = CacheTable(
    (
        StepState.COMPUTE,
        StepState.REUSE_BOTH,
        StepState.REUSE_MLP,
        StepState.COMPUTE,
        StepState.REUSE_ATTENTION,
        StepState.COMPUTE,
    )
)


def main():
    rank, store = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    found = {}
    for name in ("FluxTransformer2DModel", "WanTransformer3DModel"):
        for label, method in METHODS.items():
            whole, (plan, size) = generate(TINY_MODELS[name].build(), name, method())
            for order in ("before", "after"):
                model = TINY_MODELS[name].build()
                if order == "before":
                    parallelize(model)
                    sharded, (own_plan, own_size) = generate(model, name, method())
                else:
                    scheduler = SimpleNamespace(timesteps=torch.tensor([900.0 - 100 * step for step in range(STEPS)]))
                    with torch.no_grad(), sostenuto.enable(model, method(), scheduler=scheduler) as handle:
                        parallelize(model)
                        sharded = torch.stack([model(**tiny_inputs(name, step)[1])[0] for step in range(STEPS)])
                        own_plan = [row[0] for row in handle.stats.plan]
                        own_size = handle.stats.cache_bytes_peak
                gap = (whole - sharded).abs().max().item()
                found[f"{name} {label} {order}"] = [gap, plan, own_plan, size, own_size]
    for label, method in OWN_METHODS.items():
        whole, plan = run_own(method(), 1, 0, None)
        part, own_plan = run_own(method(), 2, rank, dist.group.WORLD)
        _, alone = run_own(method(), 2, rank, None)
        gap = (whole.chunk(2, dim=2)[rank] - part).abs().max().item()
        found[f"own {label}"] = [gap, plan, own_plan, alone]
    found |= weights_and_agreement(rank)
    dist.destroy_process_group()
    with open(f"{store}.{rank}", "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
