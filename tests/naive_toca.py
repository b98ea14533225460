"""ToCa and DuCa written out on a copy of a model: every module runs on all tokens, and counters are those of the papers."""

from __future__ import annotations

import copy

import torch


def naive_copy(model, method, kinds, ratio, heads=2, mask=None):
    """A copy of a DiT or PixArt whose ``n``-th call is step ``n`` of the method; ``copy.chosen`` lists the tokens it chose.

    Args:
        model: the network; all its rows are one batch.
        method: for the parameters of the selection.
        kinds: "F", "C" or "A" for each step.
        ratio: ``(block, branch, step)`` → share of tokens.
        heads: of the attention.
        mask: ``[rows, keys]``, 1 where cross-attention sees a key.
    """
    model = copy.deepcopy(model)
    model.chosen = []
    blocks = list(model.transformer_blocks)
    memory = {"step": -1}

    def count(*_):
        memory["step"] += 1

    model.register_forward_pre_hook(count)
    for index, block in enumerate(blocks):
        scores = {}
        for name in ("attn1", "attn2", "ff"):
            module = getattr(block, name, None)
            if module is not None:
                module.forward = _branch(module, index, name, model, method, kinds, ratio, heads, mask, memory, scores)
        block.forward = _block(block.forward, index, len(blocks), kinds, memory)
    return model


def _block(compute, index, count, kinds, memory):
    def forward(hidden_states, *args, **kwargs):
        if kinds[memory["step"]] == "A":
            return memory["hidden"] if index == 0 else hidden_states
        output = compute(hidden_states, *args, **kwargs)
        if index == count - 1:
            memory["hidden"] = output.clone()
        return output

    return forward


def _branch(module, index, name, model, method, kinds, ratio, heads, mask, memory, scores):
    compute = module.forward
    kept = {}

    def forward(hidden_states, *args, **kwargs):
        step = memory["step"]
        output = compute(hidden_states, *args, **kwargs)  # of all tokens, even where few are taken
        if kinds[step] == "F":
            kept["output"], kept["age"] = output.clone(), None
            _take_scores(module, name, hidden_states, kwargs, heads, mask, method.selection, scores)
            return output
        num_tokens = int(ratio(index, name, step) * output.shape[1])
        if kept["age"] is None:
            kept["age"] = torch.zeros(output.shape[:2])
        if num_tokens == 0:
            kept["age"] += 1
            return kept["output"]
        score = scores["s"] + method.staleness_weight * kept["age"] / method.interval
        tokens = torch.stack([_best(row, num_tokens, method) for row in score])
        model.chosen.append((step, index, name, tokens))
        kept["age"] += 1
        for row, picked in enumerate(tokens):
            kept["output"][row, picked] = output[row, picked]
            kept["age"][row, picked] = 0
        return kept["output"].clone()

    return forward


def _best(score, num_tokens, method):
    """The best tokens of one row, sorted by score, after the best one of each tile was raised."""
    side = int(len(score) ** 0.5)
    raised = score.clone()
    for top in range(0, side, method.tile):
        for left in range(0, side, method.tile):
            tile = [
                y * side + x
                for y in range(top, min(top + method.tile, side))
                for x in range(left, min(left + method.tile, side))
            ]
            best = max(tile, key=lambda j: float(score[j]))
            raised[best] += method.spatial_bonus * score[best].abs()
    return torch.tensor(sorted(range(len(score)), key=lambda j: -float(raised[j]))[:num_tokens])


def _take_scores(module, name, hidden_states, kwargs, heads, mask, selection, scores):
    if name == ("attn2" if selection == "cross-entropy" else "attn1") and selection != "random":
        context = kwargs.get("encoder_hidden_states")
        context = hidden_states if context is None else context
        rows, dim = len(hidden_states), module.to_q(hidden_states).shape[-1] // heads
        query, key, value = (
            projection(x).reshape(rows, -1, heads, dim).permute(0, 2, 1, 3)
            for projection, x in ((module.to_q, hidden_states), (module.to_k, context), (module.to_v, context))
        )
        logits = torch.einsum("rhqd,rhkd->rhqk", query, key) / dim**0.5
        if mask is not None and name == "attn2":
            logits = logits.masked_fill(mask[:, None, None] == 0, -torch.inf)
        attention_map = logits.softmax(-1).mean(1)
        if selection == "attention":
            score = attention_map.sum(1)
        elif selection == "value-norm":
            score = (1 - value.pow(2).sum(-1).sqrt()).sum(1)
        else:
            score = 1 - (attention_map * attention_map.clamp_min(1e-30).log()).sum(-1)
        scores["s"] = score / score.pow(2).sum(-1, keepdim=True).sqrt()
