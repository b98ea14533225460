"""CogVideoX with PAB: attention is broadcast to every second step in the middle of the sampling.

Guidance doubles the batch: one call per step. Other presets for this model, for --method: teacache.cogvideox_5b, and
pab.cogvideox_2b with --model zai-org/CogVideoX-2b.
"""

from __future__ import annotations

import torch
from diffusers import CogVideoXPipeline

import sostenuto
import tiny
from compare import DEVICE, Comparison, arguments, compare


def main(argv: list[str] | None = None) -> Comparison:
    """Compare."""
    args = arguments(
        __doc__,
        argv,
        model="zai-org/CogVideoX-5b",
        method=sostenuto.PAB.cogvideox_5b(),
        steps=50,
        size=(480, 720, 49),
        tiny_size=(32, 32, 9),
        prompt="A panda plays a guitar in a bamboo grove",
    )
    pipe = tiny.cogvideox() if args.tiny else CogVideoXPipeline.from_pretrained(args.model, torch_dtype=torch.bfloat16)
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
