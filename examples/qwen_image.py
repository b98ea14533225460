"""Qwen-Image with TaylorSeer: every third step is computed, in between what the branches return is forecast.

Guidance takes two calls per step, each with features of its own. Presets of other methods for this model, for --method:
fora.qwen_image, duca.qwen_image.
"""

from __future__ import annotations

import torch
from diffusers import QwenImagePipeline

import sostenuto
import tiny
from compare import DEVICE, Comparison, arguments, compare


def main(argv: list[str] | None = None) -> Comparison:
    """Compare."""
    args = arguments(
        __doc__,
        argv,
        model="Qwen/Qwen-Image",
        method=sostenuto.TaylorSeer.qwen_image(interval=3),
        steps=50,
        size=(1328, 1328),
        tiny_size=(32, 32),
        prompt="A shop window with the words 'Fresh bread' in chalk",
    )
    pipe = tiny.qwen_image() if args.tiny else QwenImagePipeline.from_pretrained(args.model, torch_dtype=torch.bfloat16)
    pipe.to(DEVICE)

    def sample(pipe, generator, num_inference_steps=args.steps):
        height, width = args.size
        return pipe(
            args.prompt,
            height=height,
            width=width,
            negative_prompt=" ",
            true_cfg_scale=4.0,
            num_inference_steps=num_inference_steps,
            generator=generator,
        ).images

    return compare(pipe, args.method, sample, args)


if __name__ == "__main__":
    main()
