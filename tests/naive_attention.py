"""DiTFastAttn's attention from its definition, with dense masks, and a loop whose guidance is in one batch."""

import copy

import torch
import torch.nn.functional as F

from sostenuto import Action

C, R, W, G, WG = Action.COMPUTE, Action.REUSE, Action.WINDOW, Action.SHARE, Action.WINDOW_SHARE
SITES = [f"transformer_blocks.{index}.attn1" for index in range(3)]


@torch.no_grad()
def guided_loop(model, scheduler, num_steps=6, seed=0, batch=2, conditional_first=True, stop_at=None):
    """Guidance in one batched call; returns the final latents and every output of the model."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, 2, 8, 8, generator=generator)
    halves = [torch.arange(batch), torch.full((batch,), 10)]
    labels = torch.cat(halves if conditional_first else halves[::-1])
    scheduler.set_timesteps(num_steps)
    outputs = []
    for step, timestep in enumerate(scheduler.timesteps):
        if step == stop_at:
            raise KeyboardInterrupt
        outputs.append(model(torch.cat([latents] * 2), timestep.expand(2 * batch), labels).sample)
        conditional, unconditional = outputs[-1].chunk(2) if conditional_first else outputs[-1].chunk(2)[::-1]
        noise = unconditional + 3.0 * (conditional - unconditional)
        latents = scheduler.step(noise[:, :2], timestep, latents, generator=generator).prev_sample
    return latents, outputs


class NaiveAttention:
    """One self-attention carried out from the definition, with dense masks; ``keep`` says whether state advances."""

    def __init__(self, module, window, conditional_first=True):
        self.module, self.window, self.conditional_first = module, window, conditional_first
        self.action, self.keep = C, True
        self.out = self.residual = None

    def __call__(self, x, **_):
        if self.action is R:
            return self.out
        half = slice(None)
        if self.action in (G, WG):
            half = slice(len(x) // 2) if self.conditional_first else slice(len(x) // 2, None)
        full, near = self.attend(x[half], None), self.attend(x[half], self.window)
        windowed = self.action in (W, WG)
        mixed = near + self.residual[half] if windowed else full
        out = F.linear(mixed, self.module.to_out[0].weight, self.module.to_out[0].bias)
        if self.action in (G, WG):
            out, residual = torch.cat([out, out]), torch.cat([full - near] * 2)
        else:
            residual = full - near
        if self.keep:
            self.out = out
            self.residual = self.residual if windowed else residual
        return out

    def attend(self, x, window):
        m = self.module
        q, k, v = (
            (x @ p.weight.T + p.bias).reshape(*x.shape[:2], m.heads, -1).permute(0, 2, 1, 3)
            for p in (m.to_q, m.to_k, m.to_v)
        )
        logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if window is not None:
            place = torch.arange(x.shape[1])
            logits = logits.masked_fill((place[:, None] - place[None]).abs() > window, -torch.inf)
        return (logits.softmax(-1) @ v).permute(0, 2, 1, 3).reshape(*x.shape[:2], -1)


def naive_copy(model, window, conditional_first=True):
    """A copy of the model whose self-attentions are naive, and these."""
    model = copy.deepcopy(model)
    attentions = [NaiveAttention(block.attn1, window, conditional_first) for block in model.transformer_blocks]
    for block, attention in zip(model.transformer_blocks, attentions, strict=True):
        block.attn1.forward = attention
    return model, attentions
