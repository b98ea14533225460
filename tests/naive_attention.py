"""DiTFastAttn's attention from its definition, with dense masks, and a loop whose guidance is in one batch."""

import copy
from functools import partial

import torch
import torch.nn.functional as F

from conftest import sample_loop
from sostenuto import Action

C, R, W, G, WG = Action.COMPUTE, Action.REUSE, Action.WINDOW, Action.SHARE, Action.WINDOW_SHARE
SITES = [f"transformer_blocks.{index}.attn1" for index in range(3)]


guided_loop = partial(sample_loop, fused_guidance=True)


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
