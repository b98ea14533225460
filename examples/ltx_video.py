"""LTX-Video with TeaCache: all blocks are skipped until the estimated change of the output adds up.

Guidance doubles the batch: one call per step.
"""

from __future__ import annotations

import torch
from diffusers import LTXPipeline

import sostenuto
import tiny
from compare import DEVICE, Comparison, arguments, compare


def main(argv: list[str] | None = None) -> Comparison:
    """Compare."""
    args = arguments(
        __doc__,
        argv,
        model="Lightricks/LTX-Video",
        method=sostenuto.TeaCache.ltx_video(0.05),
        steps=50,
        size=(480, 704, 161),
        tiny_size=(64, 64, 9),
        prompt="Waves break on black rocks below a red sky",
    )
    pipe = tiny.ltx_video() if args.tiny else LTXPipeline.from_pretrained(args.model, torch_dtype=torch.bfloat16)
    pipe.to(DEVICE)

    def sample(pipe, generator, num_inference_steps=args.steps):
        height, width, frames = args.size
        return pipe(
            args.prompt,
            height=height,
            width=width,
            num_frames=frames,
            negative_prompt="worst quality, blurry, jittery",
            guidance_scale=3.0,
            output_type="pil",
            num_inference_steps=num_inference_steps,
            generator=generator,
        ).frames[0]

    return compare(pipe, args.method, sample, args)


if __name__ == "__main__":
    main()
