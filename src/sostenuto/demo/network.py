"""The demo denoiser: a class-conditional DiT for 28x28 grey images, small enough to train on one CPU core."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sostenuto.compat import diffusers_name

if TYPE_CHECKING:
    from diffusers import DDPMScheduler, DiTTransformer2DModel

CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
NUM_CLASSES = len(CLASS_NAMES)
NULL_CLASS = NUM_CLASSES  # the label that stands for "no label" in classifier-free guidance
IMAGE_SIZE = 28
HEAD_DIM = 48


def build_denoiser(num_layers: int = 8, num_heads: int = 4) -> DiTTransformer2DModel:
    """An untrained denoiser, by default 8 blocks of width 192, 49 tokens, 6.1 M parameters, ε-prediction.

    Its input is ``[batch, 1, 28, 28]`` in ``[-1, 1]``, a timestep in ``0 … 999`` and a class label in ``0 … 10`` (10: none).

    Args:
        num_layers: blocks.
        num_heads: heads of 48 channels, which make the width.
    """
    denoiser = diffusers_name("DiTTransformer2DModel")(
        num_attention_heads=num_heads,
        attention_head_dim=HEAD_DIM,
        in_channels=1,
        out_channels=1,
        num_layers=num_layers,
        sample_size=IMAGE_SIZE,
        patch_size=4,
        num_embeds_ada_norm=NUM_CLASSES,
    )
    # adaLN-Zero (arXiv 2212.09748, section 3.2): every block starts as the identity. diffusers leaves this to the trainer.
    for block in denoiser.transformer_blocks:
        torch.nn.init.zeros_(block.norm1.linear.weight)
        torch.nn.init.zeros_(block.norm1.linear.bias)
    for layer in (denoiser.proj_out_1, denoiser.proj_out_2):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    return denoiser


def build_scheduler() -> DDPMScheduler:
    """The noise schedule that the demo denoiser is trained on: 1000 steps, linear β from 1e-4 to 0.02, ε-prediction."""
    return diffusers_name("DDPMScheduler")(
        num_train_timesteps=1000, beta_schedule="linear", prediction_type="epsilon", clip_sample=True
    )
