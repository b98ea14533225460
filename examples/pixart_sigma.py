"""PixArt-Σ with DuCa: a full step, one that runs a part of the tokens, one that skips all blocks.

The preset is the one published for PixArt-α, the same network. Also for --method: toca.pixart_alpha, fora.pixart_alpha,
delta-dit.pixart_alpha.
"""

from __future__ import annotations

import torch
from diffusers import PixArtSigmaPipeline

import sostenuto
import tiny
from compare import DEVICE, Comparison, arguments, compare


def main(argv: list[str] | None = None) -> Comparison:
    """Compare."""
    args = arguments(
        __doc__,
        argv,
        model="PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
        method=sostenuto.DuCa.pixart_alpha(),
        steps=20,
        size=(1024, 1024),
        tiny_size=(256, 256),
        prompt="A small cactus with a happy face in the Sahara desert",
    )
    pipe = (
        tiny.pixart_sigma() if args.tiny else PixArtSigmaPipeline.from_pretrained(args.model, torch_dtype=torch.float16)
    )
    pipe.to(DEVICE)

    def sample(pipe, generator, num_inference_steps=args.steps):
        height, width = args.size
        return pipe(
            args.prompt,
            height=height,
            width=width,
            guidance_scale=4.5,
            clean_caption=False,  # which would need Beautiful Soup
            num_inference_steps=num_inference_steps,
            generator=generator,
        ).images

    return compare(pipe, args.method, sample, args)


if __name__ == "__main__":
    main()
