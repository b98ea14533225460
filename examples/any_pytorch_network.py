"""A denoiser in plain PyTorch: say where its branches are, prove that caching them is exact, then cache.

There is no diffusers in it: the network, its sampler and its noise schedule are your own.
"""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import torch
from torch import nn

import sostenuto
from sostenuto import Anatomy, BlockList, Branch, SiteKind


class Block(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, num_heads=4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[batch, tokens, width]``."""
        normed = self.norm1(x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Denoiser(nn.Module):
    """Predicts the velocity of points ``[batch, points, 2]`` at time t from 1 (noise) to 0."""

    def __init__(self, width: int = 64, num_blocks: int = 4) -> None:
        super().__init__()
        self.enter, self.time, self.leave = nn.Linear(2, width), nn.Linear(1, width), nn.Linear(width, 2)
        self.blocks = nn.ModuleList(Block(width) for _ in range(num_blocks))

    def forward(self, points: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The velocity."""
        x = self.enter(points) + self.time(t.view(-1, 1, 1))
        for block in self.blocks:
            x = block(x)
        return self.leave(x)


BLOCK = (Branch(SiteKind.SELF_ATTENTION, "attention", front=("norm1",)), Branch(SiteKind.MLP, "mlp", front=("norm2",)))
sostenuto.register_anatomy(Denoiser, Anatomy((BlockList("blocks", BLOCK, streams=("x",)),), timestep="t"))

schedule = SimpleNamespace(timesteps=None)  # sostenuto reads from it which step a call is


@torch.no_grad()
def sample(denoiser: Denoiser, generator: torch.Generator, num_inference_steps: int) -> torch.Tensor:
    """Euler steps from noise to points."""
    times = torch.linspace(1, 0, num_inference_steps + 1)
    schedule.timesteps = times[:-1]  # a new tensor: a new generation
    points = torch.randn(4, 64, 2, generator=generator)
    for now, then in pairwise(times):
        points = points + (then - now) * denoiser(points, now.expand(len(points)))
    return points


def main() -> dict[str, float]:
    """Prove, cache, compare."""
    torch.manual_seed(0)
    denoiser, method = Denoiser().eval(), sostenuto.TaylorSeer(interval=3, order=1)
    proved = sostenuto.verify(denoiser, method, sample, scheduler=schedule, num_inference_steps=12)
    print(f"proved on {proved['sites']} sites: identical inputs, identical outputs; what ran is the plan")
    uncached = sample(denoiser, torch.Generator().manual_seed(0), 30)
    with sostenuto.enable(denoiser, method, scheduler=schedule) as handle:
        cached = sample(denoiser, torch.Generator().manual_seed(0), 30)
        speedup = handle.stats.ideal_speedup
    error = ((cached - uncached).norm() / uncached.norm()).item()
    print(f"{speedup:.2f} × fewer multiply-accumulates, {error:.2%} away from the uncached points")
    return {"sites": proved["sites"], "speedup": speedup, "error": error}


if __name__ == "__main__":
    main()
