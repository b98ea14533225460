"""Stable Diffusion 3.5 with FORA, its gaps filled by forecasts: every second step is computed.

Guidance doubles the batch: one call per step. There is no published preset for this model; two methods are combined.
"""

from __future__ import annotations

import torch
from diffusers import StableDiffusion3Pipeline

import sostenuto
import tiny
from compare import DEVICE, Comparison, arguments, compare


def main(argv: list[str] | None = None) -> Comparison:
    """Compare."""
    args = arguments(
        __doc__,
        argv,
        model="stabilityai/stable-diffusion-3.5-medium",
        method=sostenuto.FORA(2) | sostenuto.Forecast(order=1),
        steps=28,
        size=(1024, 1024),
        tiny_size=(32, 32),
        prompt="A lighthouse in a storm, oil on canvas",
    )
    pipe = tiny.sd3() if args.tiny else StableDiffusion3Pipeline.from_pretrained(args.model, torch_dtype=torch.bfloat16)
    pipe.to(DEVICE)

    def sample(pipe, generator, num_inference_steps=args.steps):
        height, width = args.size
        return pipe(
            args.prompt,
            height=height,
            width=width,
            negative_prompt="",
            guidance_scale=4.5,
            num_inference_steps=num_inference_steps,
            generator=generator,
        ).images

    return compare(pipe, args.method, sample, args)


if __name__ == "__main__":
    main()
