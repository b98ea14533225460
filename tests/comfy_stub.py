"""Stands for ComfyUI: the parts of its model patcher, guider and samplers that a node meets, and networks built as its own are.

Calls reach a network as there: cond and uncond as chunks of one batch where memory allows, else one after the other; the
noise levels, the whole list of them and the chunks in ``transformer_options``; the attention of Flux is a function, and its
blocks add in place.
"""

from __future__ import annotations

import copy
import uuid
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

# --- what samples ---------------------------------------------------------------------------------------------------


class WrapperExecutor:
    def __init__(self, original, class_obj, wrappers, index=0):
        self.original, self.class_obj, self.wrappers, self.index = original, class_obj, wrappers, index

    def __call__(self, *args, **kwargs):
        if self.index == len(self.wrappers):
            return self.original(*args, **kwargs)
        following = WrapperExecutor(self.original, self.class_obj, self.wrappers, self.index + 1)
        return self.wrappers[self.index](following, *args, **kwargs)


class CONST:
    """Flow matching: the network is given the noise level itself."""

    def percent_to_sigma(self, percent):
        return 1 - percent

    def timestep(self, sigma):
        return sigma

    def calculate_input(self, sigma, noise):
        return noise

    def calculate_denoised(self, sigma, output, x):
        return x - output * sigma.view(-1, *[1] * (x.ndim - 1))


class EPS:
    """Noise prediction on a grid of a thousand noise levels."""

    grid = torch.linspace(0.03**0.5, 14.6**0.5, 1000) ** 2

    def timestep(self, sigma):
        return (sigma.log()[:, None] - self.grid.log()[None]).abs().argmin(1)

    def calculate_input(self, sigma, noise):
        return noise / (sigma.view(-1, *[1] * (noise.ndim - 1)) ** 2 + 1) ** 0.5

    def calculate_denoised(self, sigma, output, x):
        return x - output * sigma.view(-1, *[1] * (x.ndim - 1))


class BaseModel(nn.Module):
    def __init__(self, network, model_sampling):
        super().__init__()
        self.diffusion_model, self.model_sampling = network, model_sampling

    def apply_model(self, x, t, c_crossattn=None, control=None, transformer_options=None, **kwargs):
        given = self.model_sampling.calculate_input(t, x)
        timestep = self.model_sampling.timestep(t).float()
        extra = {name: value.to(x.dtype) for name, value in kwargs.items()}
        output = self.diffusion_model(
            given, timestep, context=c_crossattn, control=control, transformer_options=transformer_options, **extra
        )
        return self.model_sampling.calculate_denoised(t, output.float(), x)


class ModelPatcher:
    """A ``MODEL``; its clones share the network."""

    def __init__(self, model):
        self.model, self.model_options, self.wrappers = model, {"transformer_options": {}}, {}

    def clone(self):
        other = ModelPatcher(self.model)
        other.model_options = copy.deepcopy(self.model_options)
        other.wrappers = {
            kind: {key: [*items] for key, items in keyed.items()} for kind, keyed in self.wrappers.items()
        }
        return other

    def add_wrapper_with_key(self, wrapper_type, key, wrapper):
        self.wrappers.setdefault(wrapper_type, {}).setdefault(key, []).append(wrapper)

    def get_wrappers(self, wrapper_type, key):
        return self.wrappers.get(wrapper_type, {}).get(key, [])


class Guider:
    """Classifier-free guidance over the chunks; ``batched`` says whether memory allows both in one call."""

    def __init__(self, patcher, cond, uncond, cfg=3.0, batched=True, controlled=False):
        self.model_patcher, self.inner_model, self.controlled = patcher, None, controlled
        self.conds, self.cfg, self.batched, self.uuids = (cond, uncond), cfg, batched, [uuid.uuid4(), uuid.uuid4()]
        self.calls = 0

    def __call__(self, x, sigma, model_options):
        chunks = [[1, 0]] if self.batched else [[0], [1]]
        out = {}
        for chunk in chunks:
            conds = [self.conds[which] for which in chunk]
            given = {name: torch.cat([cond[name] for cond in conds]) for name in conds[0]}
            times = torch.cat([sigma] * len(chunk))
            options = {
                **model_options["transformer_options"],
                "cond_or_uncond": chunk[:],
                "uuids": [self.uuids[which] for which in chunk],
                "sigmas": sigma,
            }
            if self.controlled:  # a ControlNet's residuals, others at every step
                given["control"] = {
                    "input": [sigma[:1, None, None].sin(), None],
                    "output": [None, sigma[:1, None, None]],
                }
            self.calls += 1
            both = self.inner_model.apply_model(
                torch.cat([x] * len(chunk)), times, transformer_options=options, **given
            )
            out.update(zip(chunk, both.chunk(len(chunk)), strict=True))
        return out[1] + (out[0] - out[1]) * self.cfg

    def sample(self, noise, sampler, sigmas):
        self.inner_model = self.model_patcher.model
        options = copy.deepcopy(self.model_patcher.model_options)
        options["transformer_options"]["sample_sigmas"] = sigmas
        wrappers = [w for keyed in self.model_patcher.wrappers.get("sampler_sample", {}).values() for w in keyed]
        executor = WrapperExecutor(sampler.sample, sampler, wrappers)
        with torch.inference_mode():
            return executor(self, sigmas, {"model_options": options}, None, noise, None, None, True)


class KSAMPLER:
    """What the menu's samplers are: a function and its options."""

    def __init__(self, sampler_function, extra_options=None):
        self.sampler_function, self.extra_options = sampler_function, extra_options or {}

    def sample(self, guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar):
        return self.sampler_function(guider, sigmas, extra_args, callback, noise, **self.extra_options)


def sample_euler(guider, sigmas, extra_args, callback, noise):
    x = noise * sigmas[0]
    for i in range(len(sigmas) - 1):
        denoised = guider(x, sigmas[i] * x.new_ones(x.shape[0]), **extra_args)
        if callback is not None:
            callback(i)
        x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
    return x


def sample_heun(guider, sigmas, extra_args, callback, noise):
    x = noise * sigmas[0]
    for i in range(len(sigmas) - 1):
        slope = (x - guider(x, sigmas[i] * x.new_ones(x.shape[0]), **extra_args)) / sigmas[i]
        step = sigmas[i + 1] - sigmas[i]
        if sigmas[i + 1] > 0:
            ahead = x + slope * step
            again = (ahead - guider(ahead, sigmas[i + 1] * x.new_ones(x.shape[0]), **extra_args)) / sigmas[i + 1]
            slope = (slope + again) / 2
        x = x + slope * step
    return x


def sampler_between(name, between):
    """A sampler that calls the model a second time at a level between those of a step, and goes on with what that gave.

    Args:
        name: as ComfyUI's menu has it.
        between: the level, of the levels that a step begins and ends with, in closed form.
    """

    def sample(guider, sigmas, extra_args, callback, noise, **options):
        x = noise * sigmas[0]
        for begin, end in pairwise(sigmas):
            slope = (x - guider(x, begin * x.new_ones(x.shape[0]), **extra_args)) / begin
            if end > 0:
                middle = torch.as_tensor(between(begin, end, **options)).float()
                ahead = x + slope * (middle - begin)
                slope = (ahead - guider(ahead, middle * x.new_ones(x.shape[0]), **extra_args)) / middle
            x = x + slope * (end - begin)
        return x

    sample.__name__ = f"sample_{name}"
    return sample


# --- what is sampled ------------------------------------------------------------------------------------------------


def attention(q, k, v):
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def heads(qkv, num_heads):
    batch, tokens, _ = qkv.shape
    return qkv.view(batch, tokens, 3, num_heads, -1).permute(2, 0, 3, 1, 4)


class Projections(nn.Module):
    """Holds the projections of an attention; it is never called."""

    def __init__(self, width):
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)


def mlp(width):
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(approximate="tanh"), nn.Linear(2 * width, width))


class DoubleBlock(nn.Module):
    def __init__(self, width, num_heads):
        super().__init__()
        self.num_heads = num_heads
        for stream in ("img", "txt"):
            setattr(self, f"{stream}_mod", nn.Linear(width, 6 * width))
            setattr(self, f"{stream}_norm1", nn.LayerNorm(width, elementwise_affine=False))
            setattr(self, f"{stream}_attn", Projections(width))
            setattr(self, f"{stream}_norm2", nn.LayerNorm(width, elementwise_affine=False))
            setattr(self, f"{stream}_mlp", mlp(width))

    def forward(self, img, txt, vec, attn_mask=None, transformer_options=None):
        shift_i, scale_i, gate_i, shift_i2, scale_i2, gate_i2 = self.img_mod(vec)[:, None].chunk(6, -1)
        shift_t, scale_t, gate_t, shift_t2, scale_t2, gate_t2 = self.txt_mod(vec)[:, None].chunk(6, -1)
        of_img = heads(self.img_attn.qkv((1 + scale_i) * self.img_norm1(img) + shift_i), self.num_heads)
        of_txt = heads(self.txt_attn.qkv((1 + scale_t) * self.txt_norm1(txt) + shift_t), self.num_heads)
        mixed = attention(*torch.cat((of_txt, of_img), dim=3))
        mixed_txt, mixed_img = mixed[:, : txt.shape[1]], mixed[:, txt.shape[1] :]
        img += gate_i * self.img_attn.proj(mixed_img)
        img += gate_i2 * self.img_mlp((1 + scale_i2) * self.img_norm2(img) + shift_i2)
        txt += gate_t * self.txt_attn.proj(mixed_txt)
        txt += gate_t2 * self.txt_mlp((1 + scale_t2) * self.txt_norm2(txt) + shift_t2)
        return img, txt


class SingleBlock(nn.Module):
    def __init__(self, width, num_heads):
        super().__init__()
        self.width, self.num_heads = width, num_heads
        self.modulation = nn.Linear(width, 3 * width)
        self.pre_norm = nn.LayerNorm(width, elementwise_affine=False)
        self.linear1, self.linear2 = nn.Linear(width, 5 * width), nn.Linear(3 * width, width)

    def forward(self, x, vec, attn_mask=None, transformer_options=None):
        shift, scale, gate = self.modulation(vec)[:, None].chunk(3, -1)
        qkv, inner = self.linear1((1 + scale) * self.pre_norm(x) + shift).split([3 * self.width, 2 * self.width], -1)
        x += gate * self.linear2(torch.cat((attention(*heads(qkv, self.num_heads)), F.gelu(inner)), -1))
        return x


def embedding(timestep, width):
    angles = 2 * timestep[:, None] * torch.logspace(0, -3, width // 2)  # slow: neighbouring steps are alike
    return torch.cat((angles.cos(), angles.sin()), -1)


class Flux(nn.Module):
    def __init__(self, channels=4, width=32, num_heads=2, depth=2, depth_single=3):
        super().__init__()
        self.width = width
        self.img_in, self.txt_in = nn.Linear(4 * channels, width), nn.Linear(8, width)
        self.time_in, self.vector_in = nn.Linear(width, width), nn.Linear(6, width)
        self.double_blocks = nn.ModuleList(DoubleBlock(width, num_heads) for _ in range(depth))
        self.single_blocks = nn.ModuleList(SingleBlock(width, num_heads) for _ in range(depth_single))
        self.final_norm = nn.LayerNorm(width, elementwise_affine=False)
        self.final_layer = nn.Linear(width, 4 * channels)

    def forward(self, x, timestep, context, y=None, guidance=None, control=None, transformer_options=None, **kwargs):
        return self._forward(x, timestep, context, y, control, transformer_options)

    def _forward(self, x, timestep, context, y, control, transformer_options):
        img = self.img_in(F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2))
        vec = F.silu(self.time_in(embedding(timestep, self.width)) + self.vector_in(y))
        txt = self.txt_in(context)
        for index, block in enumerate(self.double_blocks):
            img, txt = block(img=img, txt=txt, vec=vec, transformer_options=transformer_options)
            if control is not None and control["input"][index] is not None:
                img += control["input"][index]
        img = torch.cat((txt, img), 1)
        for index, block in enumerate(self.single_blocks):
            img = block(img, vec=vec, transformer_options=transformer_options)
            if control is not None and index < len(control["output"]) and control["output"][index] is not None:
                img[:, txt.shape[1] :] += control["output"][index]
        out = self.final_layer(self.final_norm(img[:, txt.shape[1] :]))
        return F.pixel_shuffle(out.transpose(1, 2).unflatten(2, (x.shape[2] // 2, -1)), 2)


class Attention(nn.Module):
    def __init__(self, width, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x, context=None, transformer_options=None):
        context = x if context is None else context
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in (self.q(x), self.k(context), self.v(context))
        )
        return self.o(attention(q, k, v))


class WanBlock(nn.Module):
    def __init__(self, width, num_heads):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.self_attn, self.cross_attn = Attention(width, num_heads), Attention(width, num_heads)
        self.norm3, self.ffn = nn.LayerNorm(width), mlp(width)
        self.modulation = nn.Parameter(torch.randn(1, 6, width) / 4)

    def forward(self, x, e, context, transformer_options=None):
        e = (self.modulation + e).chunk(6, dim=1)
        y = self.self_attn(torch.addcmul(e[0], self.norm1(x), 1 + e[1]), transformer_options=transformer_options)
        x = torch.addcmul(x, y, e[2])
        x = x + self.cross_attn(self.norm3(x), context, transformer_options=transformer_options)
        y = self.ffn(torch.addcmul(e[3], self.norm2(x), 1 + e[4]))
        return torch.addcmul(x, y, e[5])


class WanModel(nn.Module):
    def __init__(self, channels=4, width=32, num_heads=2, depth=3):
        super().__init__()
        self.width = width
        self.patch, self.text, self.time = nn.Linear(4 * channels, width), nn.Linear(8, width), nn.Linear(width, width)
        self.blocks = nn.ModuleList(WanBlock(width, num_heads) for _ in range(depth))
        self.head = nn.Linear(width, 4 * channels)

    def forward(self, x, timestep, context, clip_fea=None, transformer_options=None, **kwargs):
        return self.forward_orig(x, timestep, context, transformer_options)

    def forward_orig(self, x, t, context, transformer_options):
        tokens = self.patch(F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2))
        e = self.time(embedding(t, self.width))[:, None]
        for block in self.blocks:
            tokens = block(tokens, e=e, context=self.text(context), transformer_options=transformer_options)
        return F.pixel_shuffle(self.head(tokens).transpose(1, 2).unflatten(2, (x.shape[2] // 2, -1)), 2)


def build(network_class=Flux, model_sampling=CONST, **options):
    """A ``MODEL`` of a tiny network with random weights large enough that every block shows in the output."""
    torch.manual_seed(0)
    network = network_class(**options)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15)
    return ModelPatcher(BaseModel(network.eval().requires_grad_(False), model_sampling()))


def conditionings(network_class=Flux):
    generator = torch.Generator().manual_seed(1)
    made = [{"c_crossattn": torch.randn(1, 5, 8, generator=generator)} for _ in range(2)]
    if issubclass(network_class, Flux):
        for cond in made:
            cond["y"] = torch.randn(1, 6, generator=generator)
    return made


def generate(patcher, sampler=sample_euler, num_steps=8, seed=0, sigmas=None, sampler_options=None, **options):
    """A generation of one image, and the guider that called the network."""
    kind = type(patcher.model.diffusion_model)
    guider = Guider(patcher, *conditionings(kind), **options)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    if sigmas is None:
        sigmas = torch.linspace(1, 0, num_steps + 1)
    return guider.sample(noise, KSAMPLER(sampler, sampler_options), sigmas), guider
