"""Wan 2.1 with MagCache: all blocks are skipped while what they add would hardly change.

How it changes is measured once, in one uncached generation, and kept in a file. Guidance takes two calls per step.
"""

from __future__ import annotations

import torch
from diffusers import WanPipeline

import sostenuto
import tiny
from compare import DEVICE, Comparison, arguments, calibrated, compare


def main(argv: list[str] | None = None) -> Comparison:
    """Compare."""
    args = arguments(
        __doc__,
        argv,
        model="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        method=None,  # see below
        steps=50,
        size=(480, 832, 81),
        tiny_size=(64, 64, 9),
        prompt="Two otters juggle pebbles in a mountain stream",
    )
    pipe = tiny.wan() if args.tiny else WanPipeline.from_pretrained(args.model, torch_dtype=torch.bfloat16)
    pipe.to(DEVICE)

    def sample(pipe, generator, num_inference_steps=args.steps):
        height, width, frames = args.size
        return pipe(
            args.prompt,
            height=height,
            width=width,
            num_frames=frames,
            negative_prompt="blurry, static, distorted",
            guidance_scale=5.0,
            output_type="pil",
            num_inference_steps=num_inference_steps,
            generator=generator,
        ).frames[0]

    if args.method is None:
        ratios = calibrated(args, pipe, sostenuto.MagCacheCalibration(), sample, num_samples=1)
        args.method = sostenuto.MagCache.wan_1_3b(ratios)
    return compare(pipe, args.method, sample, args)


if __name__ == "__main__":
    main()
