"""HunyuanVideo with TeaCache: all blocks are skipped until the estimated change of the output adds up.

Guidance is an input of this network: one call per step. Presets of other methods for this model, for --method:
taylorseer.hunyuan_video, fora.hunyuan_video, duca.hunyuan_video, toca.hunyuan_video.
"""

from __future__ import annotations

import torch
from diffusers import HunyuanVideoPipeline

import sostenuto
import tiny
from compare import DEVICE, Comparison, arguments, compare


def main(argv: list[str] | None = None) -> Comparison:
    """Compare."""
    args = arguments(
        __doc__,
        argv,
        model="hunyuanvideo-community/HunyuanVideo",
        method=sostenuto.TeaCache.hunyuan_video(),
        steps=50,
        size=(544, 960, 61),
        tiny_size=(32, 32, 9),
        prompt="A paper boat drifts down a gutter in heavy rain",
    )
    pipe = (
        tiny.hunyuan_video()
        if args.tiny
        else HunyuanVideoPipeline.from_pretrained(args.model, torch_dtype=torch.bfloat16)
    )
    pipe.to(DEVICE)
    pipe.vae.enable_tiling()  # the whole video at once takes much memory to decode

    def sample(pipe, generator, num_inference_steps=args.steps):
        height, width, frames = args.size
        return pipe(
            args.prompt,
            height=height,
            width=width,
            num_frames=frames,
            guidance_scale=6.0,
            output_type="pil",
            num_inference_steps=num_inference_steps,
            generator=generator,
        ).frames[0]

    return compare(pipe, args.method, sample, args)


if __name__ == "__main__":
    main()
