"""An independent DiT forward whose loop over the blocks is the caller's, and the promises of every method that skips blocks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import sostenuto
from conftest import sample_loop


def run_blocks(model, latents, timestep, labels, through):
    """``through(x, blocks, modulated)`` → x, with one function per block and what the first attention would be given."""
    blocks = [
        lambda x, block=block: block(x, timestep=timestep, class_labels=labels) for block in model.transformer_blocks
    ]
    x = model.pos_embed(latents)
    first = model.transformer_blocks[0].norm1
    shift, scale = first.linear(F.silu(first.emb(timestep, labels, hidden_dtype=x.dtype))).chunk(6, dim=1)[:2]
    modulated = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    x = through(x, blocks, modulated)
    emb = first.emb(timestep, labels, hidden_dtype=x.dtype)
    shift, scale = model.proj_out_1(F.silu(emb)).chunk(2, dim=1)
    x = model.proj_out_2(model.norm_out(x) * (1 + scale[:, None]) + shift[:, None])
    side, p, c = int(x.shape[1] ** 0.5), model.config.patch_size, model.out_channels
    x = x.reshape(-1, side, side, p, p, c)
    return torch.einsum("nhwpqc->nchpwq", x).reshape(-1, c, side * p, side * p)


def oracle_loop(model, scheduler, through, num_steps, separate=False, **kwargs):
    """The sampling loop on that forward: ``through(state, step, x, blocks, modulated)``, one empty ``state`` for each pass."""
    states = {}

    def naive(latents, timestep, labels):
        step = [float(t) for t in scheduler.timesteps].index(float(timestep[0]))
        state = states.setdefault(separate and int(labels[0]) == 10, {})
        output = run_blocks(model, latents, timestep, labels, lambda *args: through(state, step, *args))
        return type("Out", (), {"sample": output})

    return sample_loop(naive, scheduler, num_steps, separate_guidance=separate, **kwargs)[0]


def rows(handle):
    """The plan carried out as one letter per step and site: c computed, r reused, f forecast."""
    return ["".join(action[0] for action in row) for row in handle.stats.plan]


def check_macs(model, scheduler, method, num_steps, separate=False):
    """Counted multiply-accumulates are those of the real run; returns the statistics."""
    with sostenuto.enable(model, method, scheduler=scheduler) as handle:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            sample_loop(model, scheduler, num_steps, separate_guidance=separate)
        assert handle.stats.macs == counter.get_total_flops() // 2
        assert handle.stats.cache_bytes_peak <= handle.predicted_cache_bytes
        return handle.stats


def check_identical_when_all_is_computed(model, scheduler, method):
    stock, _ = sample_loop(model, scheduler)
    with sostenuto.enable(model, method, scheduler=scheduler) as handle:
        cached, _ = sample_loop(model, scheduler)
        assert handle.stats.actions["reuse"] == handle.stats.actions["forecast"] == 0
    assert torch.equal(stock, cached)


def check_interruption_leaves_nothing(model, scheduler, method, num_steps=6):
    with sostenuto.enable(model, method, scheduler=scheduler) as handle:
        expected, _ = sample_loop(model, scheduler, num_steps, seed=5)
        plan = handle.stats.plan
    with sostenuto.enable(model, method, scheduler=scheduler) as handle:
        with pytest.raises(KeyboardInterrupt):
            sample_loop(model, scheduler, num_steps, seed=1, stop_at=num_steps // 2)
        got, _ = sample_loop(model, scheduler, num_steps, seed=5)
        assert handle.stats.plan == plan
    assert torch.equal(expected, got)


def check_refused_when_compiled(model, scheduler, method):
    model.compile(backend="eager")
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    with pytest.raises(sostenuto.MethodError, match="looks at features while the network runs"):
        sostenuto.enable(model, method, scheduler=scheduler)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before


def check_compiles(model, scheduler, method, num_steps):
    """No graph break, and the outputs of the uncompiled run."""
    torch._dynamo.reset()
    with sostenuto.enable(model, method, scheduler=scheduler) as handle:
        expected, _ = sample_loop(model, scheduler, num_steps)
        plan = handle.stats.plan
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with sostenuto.enable(compiled, method, scheduler=scheduler) as handle:
        got, _ = sample_loop(compiled, scheduler, num_steps)
        assert handle.stats.plan == plan
    torch._dynamo.reset()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
