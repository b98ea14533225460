"""Tiny U-Nets of many kinds, a sampling loop, and a naive forward that carries out DeepCache from its definition."""

import torch
from diffusers import UNet2DConditionModel, UNet2DModel


def randomised(model):
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval().requires_grad_(False)


def build_plain(layers=2, **kwargs):
    torch.manual_seed(0)
    settings = dict(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        layers_per_block=layers,
        block_out_channels=(8, 8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
    )
    return randomised(UNet2DModel(**{**settings, **kwargs}))


def build_conditional(layers=2, **kwargs):
    torch.manual_seed(0)
    settings = dict(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        layers_per_block=layers,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=6,
    )
    return randomised(UNet2DConditionModel(**{**settings, **kwargs}))


BUILDERS = {
    "plain": build_plain,
    "resnet-samplers": lambda: build_plain(
        1,
        down_block_types=("ResnetDownsampleBlock2D",) * 3,
        up_block_types=("ResnetUpsampleBlock2D",) * 3,
        resnet_time_scale_shift="scale_shift",
    ),
    "no-middle": lambda: build_plain(1, mid_block_type=None),
    "conditional": build_conditional,
    "layers-differ": lambda: build_conditional((1, 2)),
    "simple-attention": lambda: build_conditional(
        1,
        down_block_types=("SimpleCrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "SimpleCrossAttnUpBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
    ),
}


def context(batch, seed=0):
    return torch.randn(batch, 3, 6, generator=torch.Generator().manual_seed(seed))


def call(model, latents, timestep, seed=0, **kwargs):
    """One call of either class; ``seed`` stands for the conditioning."""
    batch = latents.shape[0]
    if isinstance(model, UNet2DConditionModel):
        kwargs["encoder_hidden_states"] = context(batch, seed)
    return model(latents, timestep.expand(batch), **kwargs).sample


class Naive:
    """A U-Net written out layer by layer over the modules of a model: it knows nothing of blocks' own forward."""

    def __init__(self, model):
        self.model = model

    def attend(self, block, index, hidden, ctx):
        if not getattr(block, "attentions", None):
            return hidden
        if "SimpleCrossAttn" in type(block).__name__:
            return block.attentions[index](hidden, encoder_hidden_states=ctx)
        if "CrossAttn" in type(block).__name__:
            return block.attentions[index](hidden, encoder_hidden_states=ctx, return_dict=False)[0]
        return block.attentions[index](hidden)

    def sampled(self, block, name, hidden, emb):
        for sampler in getattr(block, name, None) or ():
            hidden = sampler(hidden, emb) if "Resnet" in type(sampler).__name__ else sampler(hidden)
        return hidden

    def middle(self, hidden, emb, ctx):
        block = self.model.mid_block
        if block is None:
            return hidden
        hidden = block.resnets[0](hidden, emb)
        for index, resnet in enumerate(block.resnets[1:]):
            hidden = resnet(self.attend(block, index, hidden, ctx), emb)
        return hidden

    def __call__(self, latents, timestep, ctx, branch, feature=None):
        """The prediction, and what the layer that joins the skip connection ``branch`` takes in besides it."""
        model, kept = self.model, feature
        emb = model.time_embedding(model.time_proj(timestep))
        hidden = model.conv_in(latents)
        skips = [hidden]
        deep = lambda: feature is not None and len(skips) > branch  # noqa: E731
        for block in model.down_blocks:
            for index, resnet in enumerate(block.resnets):
                if not deep():
                    hidden = self.attend(block, index, resnet(hidden, emb), ctx)
                    skips.append(hidden)
            if block.downsamplers and not deep():
                hidden = self.sampled(block, "downsamplers", hidden, emb)
                skips.append(hidden)
        if not deep():
            hidden = self.middle(hidden, emb, ctx)
        remaining = sum(len(block.resnets) for block in model.up_blocks)
        for block in model.up_blocks:
            ran = False
            for index, resnet in enumerate(block.resnets):
                remaining -= 1
                if feature is not None and remaining > branch:
                    continue
                if remaining == branch:
                    hidden = kept = hidden if feature is None else feature
                hidden, ran = resnet(torch.cat([hidden, skips.pop()], 1), emb), True
                hidden = self.attend(block, index, hidden, ctx)
            if ran:
                hidden = self.sampled(block, "upsamplers", hidden, emb)
        return model.conv_out(torch.nn.functional.silu(model.conv_norm_out(hidden))), kept


@torch.no_grad()
def loop(
    model, scheduler, num_steps=7, seed=0, batch=2, separate=False, branch=None, full=(), linear=False, stop_at=None
):
    """A sampling loop; with ``branch`` on the naive forward, with full steps where ``full`` says so."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, 2, 8, 8, generator=generator)
    scheduler.set_timesteps(num_steps)
    naive, features = Naive(model), {}

    def predict(step, timestep, which):
        if branch is None:
            return call(model, latents, timestep, which)
        past = features.setdefault(which, [])  # of the full steps, newest first
        given = None if step in full else past[0][1]
        if given is not None and linear and len(past) > 1:
            (near, given), (far, older) = past[:2]
            given = given + (given - older) * (step - near) / (near - far)
        noise, feature = naive(latents, timestep.expand(batch), context(batch, which), branch, given)
        if step in full:
            past.insert(0, (step, feature))
        return noise

    for step, timestep in enumerate(scheduler.timesteps):
        if step == stop_at:
            raise KeyboardInterrupt
        noise = predict(step, timestep, 0)
        if separate:
            unconditional = predict(step, timestep, 1)
            noise = unconditional + 2.0 * (noise - unconditional)
        latents = scheduler.step(noise, timestep, latents).prev_sample
    return latents
