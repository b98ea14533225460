"""Z-Image-Turbo with TaylorSeer: of its few steps every second one is forecast.

The network takes lists of images, and time runs backwards in it. There is no published preset for this model.
"""

from __future__ import annotations

import torch
from diffusers import ZImagePipeline

import sostenuto
import tiny
from compare import DEVICE, Comparison, arguments, compare


def main(argv: list[str] | None = None) -> Comparison:
    """Compare."""
    args = arguments(
        __doc__,
        argv,
        model="Tongyi-MAI/Z-Image-Turbo",
        method=sostenuto.TaylorSeer(interval=2, order=1, first_enhance=2),
        steps=9,
        size=(1024, 1024),
        tiny_size=(32, 32),
        prompt="A street in the rain at night, neon signs in the puddles",
    )
    pipe = tiny.z_image() if args.tiny else ZImagePipeline.from_pretrained(args.model, torch_dtype=torch.bfloat16)
    pipe.to(DEVICE)

    def sample(pipe, generator, num_inference_steps=args.steps):
        height, width = args.size
        return pipe(
            args.prompt,
            height=height,
            width=width,
            guidance_scale=0.0,
            num_inference_steps=num_inference_steps,
            generator=generator,
        ).images

    return compare(pipe, args.method, sample, args)


if __name__ == "__main__":
    main()
